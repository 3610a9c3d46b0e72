"""Experts modules of Transformers models: finding them, putting an ``Nvfp4MoE`` into them, computing with it.

The half of :mod:`dsv4.integrations.transformers` that knows one experts module; that one knows models and checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dsv4.checkpoints import ExpertShape, LayerWeights
from dsv4.config import ActivationFormat, ActivationScale
from dsv4.errors import ConfigError, Dsv4Error, StateError
from dsv4.moe import Nvfp4MoE

IMPLEMENTATION = "dsv4"
"""The name under which Transformers knows this experts implementation."""

ATTRIBUTE = "nvfp4_moe"
"""The attribute of an experts module that holds its ``Nvfp4MoE``."""

PARAMETERS = ("gate_up_proj", "down_proj")
"""The parameters of an experts module: ``[E, 2I, H]`` and ``[E, H, I]``."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class ExpertsModule:
    """An experts module and what it takes to compute it.

    Attributes:
        name: its path in the model.
        module: the module.
        layer: the decoder layer.
        num_experts: E.
        shape: H and I.
        top_k: experts per token.
        swiglu_limit: the clamp before SwiGLU, None for none.
    """

    name: str
    module: nn.Module
    layer: int
    num_experts: int
    shape: ExpertShape
    top_k: int
    swiglu_limit: float | None


def find_experts(model: nn.Module) -> list[ExpertsModule]:
    """The experts modules of ``model``, in order; their parameters may be on the meta device.

    Raises:
        ConfigError: there is none, or one that does not compute what ``Nvfp4MoE`` computes.
    """
    found = [_describe(name, module) for name, module in model.named_modules() if _is_experts(module)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no module with parameters {' and '.join(PARAMETERS)} of three dimensions: "
            f"not a mixture-of-experts model, or one whose experts are already NVFP4"
        )
    return found


def layer_number(name: str) -> int:
    """The decoder layer in a module path.

    Raises:
        ConfigError: the path has none.
    """
    numbers = _LAYER.findall(name)
    if not numbers:
        raise ConfigError(f"{name}: expected a module path with 'layers.<number>.' in it")
    return int(numbers[-1])


def build(
    experts: ExpertsModule,
    weights: LayerWeights,
    activation_format: ActivationFormat,
    activation_scale: ActivationScale,
    max_num_tokens: int,
    options: Mapping[str, Any],
) -> Nvfp4MoE:
    """The layer that replaces ``experts``, with its weights, on the device of the weights."""
    try:
        moe = Nvfp4MoE(
            experts.num_experts,
            experts.shape.hidden_size,
            experts.shape.intermediate_size,
            max_num_tokens,
            experts.top_k,
            weights.l1_fp4.device,
            activation_format=activation_format,
            activation_scale=activation_scale,
            swiglu_limit=experts.swiglu_limit,
            **options,
        )
        moe.prepare_weights_from_stacked(**weights.prepare_arguments())
    except Dsv4Error as error:
        raise type(error)(f"{experts.name}: {error}") from error
    return moe


def strip(module: nn.Module) -> None:
    """Take an experts module's parameters away."""
    for name in PARAMETERS:
        delattr(module, name)
    # Transformers would otherwise initialise "missing" weights here, by attribute name.
    module._is_hf_initialized = True  # type: ignore[assignment]


def install(module: nn.Module, moe: Nvfp4MoE) -> None:
    """Let ``moe`` compute in place of a stripped ``module``."""
    setattr(module, ATTRIBUTE, moe)


def chunks(
    moe: Nvfp4MoE, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What an experts module is called with, as ``Nvfp4MoE.run`` takes it, ``max_num_tokens`` at a time.

    Args:
        hidden_states: ``[T, H]``, any floating dtype.
        top_k_index: int ``[T, k]``. An id of E means "skip", which is what the layer does with ids it does not have.
        top_k_weights: ``[T, k]``, any floating dtype.

    Yields:
        ``(hidden bf16 [t, H], weights fp32 [t, k], ids [t, k])``; nothing for T = 0.
    """
    size = moe.config.max_num_tokens
    for start in range(0, hidden_states.shape[0], size):
        rows = slice(start, start + size)
        yield hidden_states[rows].to(torch.bfloat16), top_k_weights[rows].float(), top_k_index[rows]


class _InferenceOnly(torch.autograd.Function):
    """Passes the experts' result on; a backward pass through it would be silently wrong, so it raises."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise StateError("NVFP4 experts have no backward pass: train with the floating-point experts, quantize after")


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation ``"dsv4"``: ``[T, H]`` in, ``[T, H]`` of the same dtype out.

    Args:
        self: the experts module.
        hidden_states, top_k_index, top_k_weights: see :func:`chunks`.

    Raises:
        StateError: the module has no ``Nvfp4MoE``.
    """
    moe: Nvfp4MoE | None = getattr(self, ATTRIBUTE, None)
    if moe is None:
        raise StateError(
            f'experts implementation "{IMPLEMENTATION}" is selected, but this {type(self).__name__} has no NVFP4 '
            f"experts: call dsv4.integrations.transformers.quantize_experts, or load the model with its from_pretrained"
        )
    # Results leave in fp32 unless the model computes in bf16 itself: one rounding, to the model's own dtype.
    dtype = torch.bfloat16 if hidden_states.dtype == torch.bfloat16 else torch.float32
    with torch.no_grad():
        parts = [
            moe.run(hidden, weights, ids, out_dtype=dtype)
            for hidden, weights, ids in chunks(moe, hidden_states, top_k_index, top_k_weights)
        ]
        if not parts:
            return torch.zeros_like(hidden_states)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        out = out.to(hidden_states.dtype)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        result: Tensor = _InferenceOnly.apply(out, hidden_states)
        return result
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def _is_experts(module: nn.Module) -> bool:
    parameters = [getattr(module, name, None) for name in PARAMETERS]
    return all(isinstance(parameter, nn.Parameter) and parameter.dim() == 3 for parameter in parameters)


def _describe(name: str, module: nn.Module) -> ExpertsModule:
    gate_up, down = (tuple(getattr(module, parameter).shape) for parameter in PARAMETERS)
    experts, rows, hidden = gate_up
    inter = rows // 2
    if rows % 2 or down != (experts, hidden, inter):
        raise ConfigError(
            f"{name}: expected gate_up_proj [E, 2I, H] and down_proj [E, H, I], found {list(gate_up)} and {list(down)}"
        )
    for attribute, expected in (
        ("has_gate", True),
        ("has_bias", False),
        ("is_concatenated", True),
        ("is_transposed", False),
        ("has_post_expert_norm", False),
        ("_is_expert_parallel", False),
    ):
        if getattr(module, attribute, expected) != expected:
            raise ConfigError(f"{name}: experts with {attribute}={not expected} are not supported")
    # Scales or biases beside the weights would be dropped, and FP8 codes taken for values.
    held = {parameter: tensor.dtype for parameter, tensor in module.named_parameters(recurse=False)}
    if set(held) != set(PARAMETERS) or not all(dtype in _DTYPES for dtype in held.values()):
        raise ConfigError(
            f"{name}: expected the parameters {' and '.join(PARAMETERS)} in a floating-point dtype and no others, "
            f"found {held}"
        )
    config = module.config
    limit = getattr(module, "limit", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        raise ConfigError(f"{name}: expected num_experts_per_tok in the model's configuration, found {top_k!r}")
    described = ExpertsModule(
        name,
        module,
        layer_number(name),
        experts,
        ExpertShape(hidden, inter),
        top_k,
        None if limit is None else float(limit),
    )
    _check_gate(described)
    return described


def _check_gate(experts: ExpertsModule) -> None:
    """Compare the module's gate function with (clamped) SwiGLU on a grid that reaches past the limit."""
    limit = experts.swiglu_limit
    reach = 4.0 if limit is None else 2 * limit
    axis = torch.linspace(-reach, reach, 17, device="cpu")
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(axis, axis, indexing="ij"))
    found = experts.module._apply_gate(torch.cat((gate, up), dim=-1))  # type: ignore[operator]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    expected = functional.silu(gate) * up
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{experts.name}: {type(experts.module).__name__} does not compute silu(gate) * up"
            + (f" with both clamped at {limit}" if limit is not None else "")
            + "; its activation is not supported"
        )
