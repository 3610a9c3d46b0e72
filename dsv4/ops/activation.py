"""Clamped SwiGLU, with the rounding points that every backend keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float | None, weight: Tensor | None = None) -> Tensor:
    """``silu(min(gate, L)) * clamp(up, -L, L)`` in fp32, times the routing weight if given, rounded once to bf16.

    The clamp comes before SiLU, and gate has no lower bound: DeepSeek-V4's definition (``swiglu_limit`` in its
    config; ``_apply_gate`` in Transformers). A NaN passes through.

    Args:
        gate: fp32 ``[R, I]``, straight from GEMM 1.
        up: fp32 ``[R, I]``.
        limit: L, positive, or None for no clamp.
        weight: fp32 ``[R, 1]``, the routing weight of ``route_weight="before_down"``.

    Returns:
        bf16 ``[R, I]``.
    """
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    result = torch.nn.functional.silu(gate) * up
    if weight is not None:
        result = result * weight
    return result.to(torch.bfloat16)
