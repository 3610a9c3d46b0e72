"""What the layer tests share: building a layer from oracle weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from oracle import OracleWeights, random_weights
from torch import Tensor

from dsv4 import BackendError, Nvfp4MoE
from dsv4.backends import BACKENDS
from dsv4.config import MoEConfig

BAR = 3e-3
"""Relative L2 against the float64 oracle with the same rounding points: the accuracy bar of the numbers' contract."""

# name -> (constructor keywords, oracle keywords). Static scales are given with the weights.
MODES: dict[str, dict[str, Any]] = {
    "w4a16": {"activation_format": "bf16"},
    "w4a4-static": {"activation_format": "nvfp4", "activation_scale": "static"},
    "w4a4-token": {"activation_format": "nvfp4", "activation_scale": "token"},
    "w4a4-tensor": {"activation_format": "nvfp4", "activation_scale": "tensor"},
}


def fitted(target: tuple[str, torch.device], hidden: int, intermediate: int) -> tuple[int, int]:
    """The two sizes, each raised to a multiple of what the target's backend is made for, where it takes no others."""
    name, device = target
    backend = next(b for b in BACKENDS if b.name == name)
    for multiple in (1, 128, 256):
        sizes = [-(-size // multiple) * multiple for size in (hidden, intermediate)]
        verdict = backend.explain(MoEConfig(8, *sizes, top_k=2), device)
        if verdict.usable:
            return sizes[0], sizes[1]
    raise BackendError(f"{name} on {device}: {verdict.reason}")


def largest_call(table: Sequence[Any], line: Any, top_k: int) -> tuple[int, int]:
    """Tokens and experts, few of both, of the largest call that a line of a backend's table of tilings serves.

    For the last line, which has no end: half as many rows again as the line before serves.
    """
    mean = line.rows_per_expert if line is not table[-1] else 1.5 * table[-2].rows_per_expert
    experts = max(8, ceil(top_k / mean))
    tokens = int(mean * experts / top_k)
    assert next(t for t in table if tokens * top_k / experts <= t.rows_per_expert) is line
    return tokens, experts


def weights_on(weights: OracleWeights, device: torch.device) -> list[Tensor]:
    """The arguments of ``prepare_weights_from_stacked``, in order."""
    names = ("l1_fp4", "l1_sf", "l1_gs", "l2_fp4", "l2_sf", "l2_gs")
    tensors = [getattr(weights, name) for name in names]
    tensors[1], tensors[4] = (sf.view(torch.float8_e4m3fn) for sf in (tensors[1], tensors[4]))
    return [t.to(device) for t in tensors]


def build(
    target: tuple[str, torch.device],
    weights: OracleWeights,
    *,
    top_k: int,
    max_num_tokens: int = 256,
    l1_input_scale: Tensor | float | None = None,
    l2_input_scale: Tensor | float | None = None,
    **settings: Any,
) -> Nvfp4MoE:
    """A prepared layer of the target's backend on its device."""
    backend, device = target
    experts, hidden, half_i = weights.l2_fp4.shape
    moe = Nvfp4MoE(experts, hidden, 2 * half_i, max_num_tokens, top_k, device, backend=backend, **settings)
    moe.prepare_weights_from_stacked(
        *weights_on(weights, device), l1_input_scale=l1_input_scale, l2_input_scale=l2_input_scale
    )
    return moe


def inputs(
    tokens: int, hidden: int, top_k: int, num_ids: int, *, seed: int = 0, dtype: torch.dtype = torch.int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``(hidden_states, topk_weights, topk_ids)`` on the CPU, distinct ids in a row where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size: a wrong scale of one row cannot hide in a norm dominated by the others.
    row = torch.exp2(torch.randint(-3, 4, (tokens, 1), generator=generator).float())
    x = (torch.randn(tokens, hidden, generator=generator) * row).bfloat16()
    w = torch.rand(tokens, top_k, generator=generator) + 0.05
    if num_ids >= top_k:
        ids = torch.rand(tokens, num_ids, generator=generator).argsort(dim=1)[:, :top_k]
    else:
        ids = torch.randint(0, num_ids, (tokens, top_k), generator=generator)
    return x, w, ids.to(dtype).contiguous()


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in tensors)


def poisoned(tokens: int, hidden: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An ``out=`` full of NaN: an element that is not written shows."""
    return torch.full((tokens, hidden), torch.nan, dtype=dtype, device=device)


__all__ = [
    "BAR",
    "MODES",
    "build",
    "fitted",
    "inputs",
    "largest_call",
    "on",
    "poisoned",
    "random_weights",
    "weights_on",
]
