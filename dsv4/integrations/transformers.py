"""NVFP4 experts in a Hugging Face Transformers model.

::

    import dsv4.integrations.transformers as dsv4_hf

    dsv4_hf.quantize_experts(model, activation_scale="token")      # a model in memory: bf16 experts -> NVFP4
    model = dsv4_hf.from_pretrained("folder", device="cuda")       # an NVFP4 checkpoint: no bf16 experts at any time

Importing this module registers the experts implementation ``"dsv4"`` with Transformers. A model that uses it keeps its
own modules: router, shared expert, attention and head are Transformers' and are not touched. Only each experts module
loses its parameters (``gate_up_proj`` and ``down_proj``) and gains an attribute ``nvfp4_moe``, the
:class:`~dsv4.moe.Nvfp4MoE` that computes in their place. That layer is not a ``torch.nn.Module``: ``model.to(dtype)``
must not reinterpret packed weights, and does not see them. For the same reason ``model.to(device)`` leaves them
where they are: choose the device first, then quantize or load.

**Numbers.** The hidden states are rounded to bf16 on the way in, whatever the model's dtype; the routing weights are
used in fp32. The result comes back in the model's dtype, rounded once.

**Limits.** Inference only: ``backward`` through the experts raises. ``save_pretrained`` raises as well, since the
experts are no longer in the state dict. Forward passes longer than ``max_num_tokens`` run in chunks; with
``activation_scale="tensor"`` each chunk then has its own scale.

Works with any model whose experts follow Transformers' experts interface in its default layout (``gate_up_proj
[E, 2I, H]``, ``down_proj [E, H, I]``) with SwiGLU, clamped or not: DeepSeek-V4, Qwen3-MoE, Mixtral and relatives. The
gate function of each module is compared with ours when it is converted, so that others are refused, not computed wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsv4.checkpoints import ExpertWeights, MissingScalePolicy, open_checkpoint
from dsv4.checkpoints.dense import quantize_expert
from dsv4.checkpoints.stacking import stack_experts
from dsv4.config import ActivationFormat, ActivationScale
from dsv4.errors import ConfigError, StateError
from dsv4.integrations.hf_experts import (
    ATTRIBUTE,
    IMPLEMENTATION,
    PARAMETERS,
    ExpertsModule,
    build,
    chunks,
    find_experts,
    install,
    layer_number,
    strip,
)
from dsv4.integrations.hf_loading import load_without_experts
from dsv4.moe import Nvfp4MoE

__all__ = ["IMPLEMENTATION", "ActivationScales", "calibrate", "experts_of", "from_pretrained", "quantize_experts"]


def quantize_experts(
    model: PreTrainedModel,
    *,
    activation_format: ActivationFormat = "nvfp4",
    activation_scale: ActivationScale = "token",
    four_over_six: bool = False,
    max_num_tokens: int = 8192,
    **moe_options: Any,
) -> PreTrainedModel:
    """Turn the routed experts of a model in memory into NVFP4, in place, and free the floating-point ones.

    One layer is quantized at a time, on the device where its experts are. After an error in the middle the model is
    part one, part the other, and of no further use.

    Args:
        model: a model whose experts are loaded, in any floating dtype.
        activation_format: ``"nvfp4"`` (W4A4) or ``"bf16"`` (W4A16).
        activation_scale: of W4A4. ``"calibrated"`` and ``"static"`` need :func:`calibrate` before the first forward.
        four_over_six: quantize weights with 4-over-6 block scales (see :mod:`dsv4.nvfp4`).
        max_num_tokens: scratch is sized for this many tokens; longer forward passes are cut into chunks.
        moe_options: further keyword arguments of :class:`~dsv4.moe.Nvfp4MoE`: ``backend``, ``batch_invariant``, ...

    Returns:
        ``model``.

    Raises:
        ConfigError: no experts that can be converted, or settings that are not allowed.
        InputError: weights that hold NaN or Inf.
    """
    for experts in find_experts(model):
        _quantize(experts, activation_format, activation_scale, four_over_six, max_num_tokens, moe_options)
    model.set_experts_implementation(IMPLEMENTATION)
    _forbid_saving(model)
    return model


def from_pretrained(
    path: str | Path,
    *,
    activation_format: ActivationFormat = "nvfp4",
    activation_scale: ActivationScale = "static",
    on_missing_input_scale: MissingScalePolicy = "error",
    four_over_six: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    max_num_tokens: int = 8192,
    progress: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    moe_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model with its routed experts in NVFP4: one expert is read, and cast if need be, at a time.

    Everything else is loaded by Transformers, through its own renaming and, where the rest of the model is stored in
    FP8, its own FP8 quantizer (which needs accelerate).

    Args:
        path: the folder of the checkpoint, with ``config.json``, or a Hugging Face id; experts in any of
            :data:`dsv4.checkpoints.FORMATS`.
        activation_format: ``"nvfp4"`` (W4A4) or ``"bf16"`` (W4A16).
        activation_scale: of W4A4; ``"static"`` uses the checkpoint's input scales.
        on_missing_input_scale: with static scales, what to do for a layer that lacks them: see
            :meth:`dsv4.checkpoints.Checkpoint.load_layer`.
        four_over_six: for floating-point experts, which are quantized while they are read.
        device: where the model goes; None leaves the placement to Transformers (``device_map=...`` in ``kwargs``, the
            CPU without it). Experts go where their layer's router is.
        dtype: of everything but the experts; ``"auto"`` takes the configuration's.
        max_num_tokens, moe_options: as in :func:`quantize_experts`.
        progress: draw a progress bar for the experts (needs rich).
        model_class: the Transformers class; None takes the causal language model of the configuration.
        kwargs: passed on to Transformers' ``from_pretrained``.

    Raises:
        CheckpointError: a checkpoint that cannot be read, does not fit its configuration, or lacks weights.
        ConfigError: a model whose experts cannot be converted, or settings that are not allowed.
    """
    static = activation_format == "nvfp4" and activation_scale == "static"
    with open_checkpoint(path, four_over_six=four_over_six) as checkpoint:
        model, found = load_without_experts(checkpoint, model_class, dtype, kwargs)
        if device is not None:
            cast(nn.Module, model).to(device)
        by_layer = {experts.layer: experts for experts in found}
        for target, group in itertools.groupby(found, key=lambda experts: _router_device(model, experts)):
            layers = checkpoint.iter_layers(
                [experts.layer for experts in group],
                device=target,
                on_missing_input_scale=on_missing_input_scale if static else "ignore",
                progress=progress,
            )
            for weights in layers:
                experts = by_layer[weights.layer]
                modes: tuple[Any, Any] = (activation_format, activation_scale)
                if static:
                    modes = (weights.activation_format, weights.activation_scale)
                install(experts.module, build(experts, weights, *modes, max_num_tokens, moe_options or {}))
    _forbid_saving(model)
    return model


def experts_of(model: nn.Module) -> dict[int, Nvfp4MoE]:
    """The model's NVFP4 layers by decoder layer: to warm up, to inspect, to re-prepare.

    Raises:
        StateError: the model has none.
    """
    found = {
        layer_number(name): getattr(module, ATTRIBUTE)
        for name, module in model.named_modules()
        if hasattr(module, ATTRIBUTE)
    }
    if not found:
        raise StateError("this model has no NVFP4 experts: call quantize_experts, or load it with from_pretrained")
    return found


@dataclass(frozen=True)
class ActivationScales:
    """The activation scales observed in one layer; multipliers (``amax / 2688``), as a checkpoint's ``input_scale``.

    Attributes:
        l1: fp32 ``[E]``, of what enters gate and up.
        l2: fp32 ``[E]``, of what enters down.
    """

    l1: Tensor
    l2: Tensor


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Any]) -> dict[int, ActivationScales]:
    """Run sample data through the model and observe what reaches its experts.

    The scales are the running maximum over all batches, of this and earlier calls. They take effect at once where
    ``activation_scale`` is ``"calibrated"`` (or ``"static"`` without scales in the checkpoint), and are what a
    checkpoint writer stores as input scales.

    Args:
        model: a model with NVFP4 experts.
        batches: each a mapping of keyword arguments for the model, or its ``input_ids``.

    Returns:
        layer -> scales on the CPU. An expert that no token reached has the largest scale of its layer.

    Raises:
        StateError: the model has no NVFP4 experts, or there was no batch.
    """
    experts_of(model)
    observed: dict[int, ActivationScales] = {}

    def observe(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moe: Nvfp4MoE = getattr(module, ATTRIBUTE)
        for hidden, weights, ids in chunks(moe, *args, **kwargs):
            l1, l2 = moe.compute_activation_global_scales(hidden, weights, ids)
            observed[layer_number(name)] = ActivationScales(l1.cpu(), l2.cpu())

    hooks = [
        module.register_forward_pre_hook(partial(observe, name), with_kwargs=True)
        for name, module in model.named_modules()
        if hasattr(module, ATTRIBUTE)
    ]
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not observed:
        raise StateError("calibrate: expected at least one batch with tokens, found none")
    return observed


def _quantize(
    experts: ExpertsModule,
    activation_format: ActivationFormat,
    activation_scale: ActivationScale,
    four_over_six: bool,
    max_num_tokens: int,
    options: Mapping[str, Any],
) -> None:
    """One layer of :func:`quantize_experts`; its floating-point weights are gone when this returns."""
    gate_up, down = (getattr(experts.module, name).detach() for name in PARAMETERS)
    if gate_up.is_meta:
        raise ConfigError(f"{experts.name}: the experts are on the meta device; load the model's weights first")

    def read(expert: int) -> ExpertWeights:
        gate, up = gate_up[expert].chunk(2)
        return quantize_expert(gate, up, down[expert], four_over_six=four_over_six)

    weights = stack_experts(
        experts.layer,
        range(experts.num_experts),
        experts.shape,
        read,
        device=gate_up.device,
        on_missing_input_scale="ignore",
    )
    moe = build(experts, weights, activation_format, activation_scale, max_num_tokens, options)
    strip(experts.module)
    install(experts.module, moe)


def _router_device(model: nn.Module, experts: ExpertsModule) -> torch.device:
    """Where the block around the experts is: they have no parameters that would tell."""
    block = model.get_submodule(experts.name.rpartition(".")[0])
    return next(block.parameters()).device


def _forbid_saving(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` raise: it would write a model without experts and say nothing."""
    model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise StateError(
        "save_pretrained would leave out the NVFP4 experts, which are no parameters of the model; keep the checkpoint "
        "that the model was loaded from, or save the model before quantize_experts"
    )
