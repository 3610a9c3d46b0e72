"""Which layers of a model are computed by dsv4, and why others are not."""

from __future__ import annotations

import logging
import os
from typing import Any, get_args

import torch
import vllm.envs as envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from dsv4.backends import choose, explain_all
from dsv4.config import MoEConfig
from dsv4.errors import BackendError, ConfigError
from dsv4.integrations.vllm.methods import METHODS, Plan
from dsv4.integrations.vllm.parameters import ACTIVATIONS, Activations
from dsv4.nvfp4 import BLOCK

_log = logging.getLogger("vllm.dsv4")

MAX_NUM_TOKENS = 8192
"""Scratch is sized for no more; larger calls are cut."""


def take_over(layer: Any, name: str, method: Any) -> Any:
    """The method for a layer of routed experts: ours, or vLLM's as it is.

    Args:
        layer: vLLM's RoutedExperts, not yet with parameters.
        name: its name in the model.
        method: what vLLM chose for it.

    Raises:
        ConfigError: this rank's share of the experts splits a block of 16 values, which nothing can load right; or the
            environment asks for something that there is not.
    """
    ours = METHODS.get(type(method))
    if ours is None:
        _log.debug("dsv4: %s: left to vLLM: %s is not one of its NVFP4 methods", name, type(method).__name__)
        return method
    try:
        reason = why_not(layer)
    except Exception as error:  # something of vLLM's that is no longer there
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        _require_whole_blocks(layer, name)
        plan = _plan(layer, name, method)
        reason = _backend_problem(layer, plan)
        if reason is None:
            return ours.replacing(method, plan)
    _log.warning("dsv4: %s: left to vLLM: %s", name, reason)
    return method


def why_not(layer: Any) -> str | None:
    """Why dsv4 cannot or shall not compute this layer, or None."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    reasons = (
        (moe.moe_backend != "auto", f"the MoE backend {moe.moe_backend!r} was asked for"),
        (layer.activation != MoEActivation.SILU, f"activation {layer.activation.value}, expected silu"),
        (layer.swiglu_alpha not in (None, 1.0), f"SwiGLU with alpha {layer.swiglu_alpha}"),
        (layer.swiglu_beta not in (None, 0.0), f"SwiGLU with beta {layer.swiglu_beta}"),
        (moe.has_bias, "experts with biases"),
        (moe.is_lora_enabled, "LoRA on experts"),
        (moe.in_dtype != torch.bfloat16, f"activations in {moe.in_dtype}, expected torch.bfloat16"),
        (moe.hidden_dim % BLOCK != 0, f"hidden size {moe.hidden_dim} is no multiple of {BLOCK}"),
        (
            parallel.use_all2all_kernels and not parallel.use_ag_rs_all2all_kernels,
            f"the all-to-all backend {parallel.all2all_backend!r}, expected 'allgather_reducescatter'",
        ),
        (layer.expert_map_manager.num_fused_shared_experts > 0, "shared experts fused with the routed ones"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _require_whole_blocks(layer: Any, name: str) -> None:
    moe = layer.moe_config
    if moe.intermediate_size_per_partition % BLOCK:
        raise ConfigError(
            f"{name}: intermediate size {moe.intermediate_size} over {moe.tp_size} tensor-parallel ranks is "
            f"{moe.intermediate_size_per_partition}, which splits a block of {BLOCK} values that share a scale; choose "
            f"another tensor-parallel size, or expert parallelism (--enable-expert-parallel)"
        )


def _plan(layer: Any, name: str, method: Any) -> Plan:
    vllm_config = get_current_vllm_config()
    moe = layer.moe_config
    tokens = vllm_config.scheduler_config.max_num_batched_tokens * moe.dp_size  # all ranks' tokens are gathered
    wanted = os.environ.get(ACTIVATIONS, "static")
    if wanted not in get_args(Activations):
        raise ConfigError(f"{ACTIVATIONS}={wanted}: expected one of {', '.join(get_args(Activations))}")
    if getattr(method, "use_a16", False):
        wanted = "bf16"
    elif getattr(method, "per_token_activation", False):
        wanted = "token"
    return Plan(
        name=name,
        activations=wanted,  # type: ignore[arg-type]
        max_num_tokens=min(tokens, MAX_NUM_TOKENS),
        swiglu_limit=layer.swiglu_limit or None,
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        dummy=str(vllm_config.load_config.load_format) == "dummy",
    )


def _backend_problem(layer: Any, plan: Plan) -> str | None:
    """Why no backend of dsv4 would run the layer well here, or None. Backends prove themselves now, not later."""
    moe = layer.moe_config
    device = torch.device(moe.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        config = MoEConfig(
            layer.local_num_experts,
            moe.hidden_dim,
            moe.intermediate_size_per_partition,
            plan.max_num_tokens,
            moe.experts_per_token,
            activation_format="bf16" if plan.activations == "bf16" else "nvfp4",
            activation_scale="token" if plan.activations == "bf16" else plan.activations,
            swiglu_limit=plan.swiglu_limit,
            batch_invariant=plan.batch_invariant,
            l1_scale_policy="per_expert",
        )
        chosen = choose("auto", config, device, proven=True)
    except (BackendError, ConfigError) as error:
        return str(error)
    if chosen.name == "reference" and device.type == "cuda" and os.environ.get("DSV4_BACKEND") != "reference":
        verdicts = explain_all(config, device)
        return "no kernels for this GPU: " + "; ".join(
            f"{backend}: {verdict.reason}" for backend, verdict in verdicts.items() if backend != "reference"
        )
    return None
