"""What vLLM's NVFP4 methods keep in a layer, before and after our packing. Plain torch; nothing of vLLM is imported.

Per layer, E local experts, H the hidden and I the intermediate size of this rank:

=============  ======================  ===========================  ======================
what           ModelOpt                compressed-tensors           shape
=============  ======================  ===========================  ======================
codes          ``w13_weight``          ``w13_weight_packed``        uint8 ``[E, 2I, H/2]``
\\             ``w2_weight``           ``w2_weight_packed``         uint8 ``[E, H, I/2]``
block scales   ``w13_weight_scale``    ``w13_weight_scale``         e4m3 ``[E, 2I, H/16]``
\\             ``w2_weight_scale``     ``w2_weight_scale``          e4m3 ``[E, H, I/16]``
global scales  ``w13_weight_scale_2``  ``w13_weight_global_scale``  fp32 ``[E, 2]``
\\             ``w2_weight_scale_2``   ``w2_weight_global_scale``   fp32 ``[E]``
input scales   ``w13_input_scale``     ``w13_input_global_scale``   fp32 ``[E, 2]``
\\             ``w2_input_scale``      ``w2_input_global_scale``    fp32 ``[E]``
=============  ======================  ===========================  ======================

Rows of w13 are gate, then up, and so are its pairs of scales. Global scales are multipliers in ModelOpt's layout and
divisors in the other. vLLM allocates them all without a value and loads what the checkpoint has, so that what it lacks
is whatever was in memory; :func:`poison` puts NaN there first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dsv4.config import ActivationFormat, L1ScalePolicy
from dsv4.errors import InputError

Activations = Literal["static", "token", "bf16"]
"""W4A4 with the checkpoint's scales, W4A4 with each token's own, or W4A16."""

ACTIVATIONS = "DSV4_VLLM_ACTIVATIONS"
"""The environment variable that chooses between them; ``static`` without it."""

_NAN_E4M3 = 0x7F
_DUMMY_BLOCK_SCALE, _DUMMY_SCALE = 1.0, 1e-3


@dataclass(frozen=True)
class ParameterNames:
    """The names of a layer's parameters, w13 and w2 of each.

    Attributes:
        codes, block_scales, global_scales, input_scales: see the module's table.
        divisors: global and input scales are divisors on decode.
    """

    codes: tuple[str, str]
    block_scales: tuple[str, str]
    global_scales: tuple[str, str]
    input_scales: tuple[str, str]
    divisors: bool

    @property
    def all(self) -> tuple[str, ...]:
        """Every parameter."""
        return (*self.codes, *self.block_scales, *self.global_scales, *self.input_scales)


def _both(suffix: str) -> tuple[str, str]:
    return f"w13_{suffix}", f"w2_{suffix}"


MODELOPT = ParameterNames(
    _both("weight"), _both("weight_scale"), _both("weight_scale_2"), _both("input_scale"), divisors=False
)
COMPRESSED_TENSORS = ParameterNames(
    _both("weight_packed"),
    _both("weight_scale"),
    _both("weight_global_scale"),
    _both("input_global_scale"),
    divisors=True,
)


@torch.no_grad()
def poison(layer: nn.Module, names: ParameterNames) -> None:
    """Fill every scale with NaN, so that one that is never loaded is seen."""
    for name in names.block_scales:
        getattr(layer, name).data.view(torch.uint8).fill_(_NAN_E4M3)
    for name in (*names.global_scales, *names.input_scales):
        getattr(layer, name).data.fill_(torch.nan)


@torch.no_grad()
def fill_dummy(layer: nn.Module, names: ParameterNames) -> None:
    """Replace scales by some that any weights can have: vLLM's dummy loader draws them at random, negative ones too."""
    for name in names.block_scales:
        getattr(layer, name).data.fill_(_DUMMY_BLOCK_SCALE)
    for name in (*names.global_scales, *names.input_scales):
        getattr(layer, name).data.fill_(1 / _DUMMY_SCALE if names.divisors else _DUMMY_SCALE)


@dataclass(frozen=True)
class LoadedWeights:
    """A layer as the checkpoint has it, global scales as multipliers.

    Attributes:
        arguments: of :meth:`~dsv4.moe.Nvfp4MoE.prepare_weights_from_stacked`, input scales left out. Codes and block
            scales are the layer's own memory.
        l1_input_scale, l2_input_scale: fp32 ``[E]``; None where the checkpoint has not got a usable one for every
            expert.
        problem: which input scales cannot be used, if any.
    """

    arguments: Mapping[str, Tensor]
    l1_input_scale: Tensor | None
    l2_input_scale: Tensor | None
    problem: str | None


@torch.no_grad()
def read(layer: nn.Module, names: ParameterNames) -> LoadedWeights:
    """The loaded parameters of a layer. Reads values: synchronises on a GPU.

    gate and up read one activation: of their two input scales the larger is taken, which loses no range.

    Raises:
        InputError: a weight scale was not in the checkpoint.
    """
    w13, w13_sf, w13_gs, w13_input, w2, w2_sf, w2_gs, w2_input = (
        getattr(layer, names_of[half]).data
        for half in (0, 1)
        for names_of in (names.codes, names.block_scales, names.global_scales, names.input_scales)
    )
    for name, scale in zip(names.global_scales, (w13_gs, w2_gs), strict=True):
        _require_loaded(name, scale)
    if names.divisors:
        w13_gs, w2_gs, w13_input, w2_input = (1.0 / scale for scale in (w13_gs, w2_gs, w13_input, w2_input))
    unusable = [
        f"{name} of {_experts(bad)}"
        for name, scale in zip(names.input_scales, (w13_input, w2_input.unsqueeze(1)), strict=True)
        if bool((bad := ~(scale.isfinite() & (scale > 0)).all(dim=1)).any())
    ]
    return LoadedWeights(
        arguments={
            "l1_fp4_stacked": w13,
            "l1_sf_stacked": w13_sf,
            "l1_gs": w13_gs,
            "l2_fp4_stacked": w2,
            "l2_sf_stacked": w2_sf,
            "l2_gs": w2_gs,
        },
        l1_input_scale=None if unusable else w13_input.amax(dim=1),
        l2_input_scale=None if unusable else w2_input,
        problem=" and ".join(unusable) or None,
    )


def _require_loaded(name: str, scale: Tensor) -> None:
    bad = scale.isnan().reshape(scale.shape[0], -1).any(dim=1)
    if bool(bad.any()):
        raise InputError(
            f"{name}: found none (or NaN) in the checkpoint for {_experts(bad)}; expected one for every projection of "
            f"every expert"
        )


def _experts(bad: Tensor) -> str:
    """``3 of 64 local experts (first: 5)``."""
    return f"{int(bad.sum())} of {len(bad)} local experts (first: {int(bad.nonzero()[0])})"


@dataclass(frozen=True)
class Mode:
    """How a layer's activations are computed with; the fields are :class:`~dsv4.config.MoEConfig`'s.

    Attributes:
        activation_format: W4A4 (``"nvfp4"``) or W4A16 (``"bf16"``).
        activation_scale: of W4A4.
        l1_scale_policy: how static scales of GEMM 1 that differ by expert are used.
        reason: what the user should know, or None.
    """

    activation_format: ActivationFormat
    activation_scale: Literal["static", "token"]
    l1_scale_policy: L1ScalePolicy
    reason: str | None = None

    @property
    def static(self) -> bool:
        """True where the checkpoint's input scales are used."""
        return self.activation_format == "nvfp4" and self.activation_scale == "static"

    def __str__(self) -> str:
        if self.activation_format == "bf16":
            return "W4A16"
        return f"W4A4 with {self.activation_scale} scales" + (
            ", one for each expert" if self.l1_scale_policy == "per_expert" else ""
        )


def choose_mode(wanted: Activations, weights: LoadedWeights, *, experts_move: bool) -> Mode:
    """What a layer with these weights is computed in.

    Args:
        wanted: the user's or the checkpoint's wish.
        weights: what was loaded.
        experts_move: a load balancer exchanges experts between ranks, whose scales differ from those that are here now.
    """
    if wanted != "static":
        return Mode("bf16" if wanted == "bf16" else "nvfp4", "token", "max")
    if weights.l1_input_scale is None:
        return Mode(
            "bf16",
            "token",
            "max",
            f"the checkpoint has no usable {weights.problem}: activations are not quantized (W4A16)",
        )
    scales = weights.l1_input_scale
    same = bool((scales == scales[0]).all()) and not experts_move
    return Mode("nvfp4", "static", "max" if same else "per_expert")


@torch.no_grad()
def replace_packed(layer: nn.Module, names: ParameterNames, tensors: Mapping[str, Tensor]) -> None:
    """Take vLLM's parameters out of the layer, which frees them, and put the packed experts there, without a copy.

    What vLLM looks at afterwards keeps its name: ``w13_weight`` and ``w2_weight`` are passed to the kernel, which has
    its own reference, and their first dimension is the number of experts. vLLM's load balancer moves rows of all
    parameters but those called ``w13_input_scale`` and ``w2_input_scale``, so ours are called otherwise.

    Args:
        tensors: from :meth:`~dsv4.moe.Nvfp4MoE.expert_tensors`.
    """
    for name in {*names.all, *_PACKED_NAMES.values()}:
        layer._parameters.pop(name, None)
    for key, tensor in tensors.items():
        rows = tensor.unsqueeze(1) if key == "experts" else tensor
        layer.register_parameter(_PACKED_NAMES[key], nn.Parameter(rows, requires_grad=False))
    layer.register_parameter("w2_weight", layer.get_parameter("w13_weight"))  # one parameter: its rows move once


_PACKED_NAMES = {
    "experts": "w13_weight",
    "l1_gs": "w13_weight_scale_2",
    "l2_gs": "w2_weight_scale_2",
    "l1_input_scale": "w13_expert_input_scale",
    "l2_input_scale": "w2_expert_input_scale",
}
