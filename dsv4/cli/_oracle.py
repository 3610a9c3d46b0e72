"""The routed experts in float64, from the definitions alone: what ``dsv4 verify`` compares a backend with.

It shares no arithmetic with the backends, nor with :mod:`dsv4.nvfp4`: values are decoded through tables built from the
bit patterns, rounding is a search among all representable values, products are float64. Only quantizing uses fp32,
since its definition does (docs/numerics.md). The rounding points are the contract's: the intermediate is rounded once
to bf16, activations are quantized where the mode says so, nothing else is rounded.

One expert is decoded at a time, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv4.checkpoints.base import LayerWeights

_BLOCK = 16
_NAN_SCALE = 0x7F
_SMALLEST_GLOBAL_SCALE = 2.0**-100

NEAR_TIES = (0.0, 1e-6, -1e-6, 1e-5, -1e-5)
"""Relative shifts of the intermediate. Within 1e-5 of a midpoint, sums in fp32 may round either way: both are right."""


@dataclass(frozen=True)
class ActivationMode:
    """How activations reach the two products.

    Attributes:
        quantized: W4A4, else W4A16.
        static_l1: the global scale of GEMM 1's operand, None for one from each token's amax.
        static_l2: fp32 ``[E]``, that of GEMM 2's, likewise.
    """

    quantized: bool
    static_l1: float | None = None
    static_l2: Tensor | None = None


def operands(
    weights: LayerWeights,
    hidden: Tensor,
    experts: Tensor,
    mode: ActivationMode,
    limit: float | None,
    shifts: Sequence[float] = NEAR_TIES,
) -> Tensor:
    """What GEMM 2 multiplies, decoded: float64 ``[N, S, I]``, for each of the N shifts.

    Args:
        weights: E experts, on the CPU.
        hidden: bf16 ``[S, H]``, the token of each slot.
        experts: int64 ``[S]``, rows of ``weights``.
        mode: of the activations.
        limit: L of the clamped SwiGLU, or None.
        shifts: relative changes of the intermediate before it is rounded; the first is the plain result.
    """
    shape = (len(shifts), len(experts), weights.shape.intermediate_size)
    result = torch.full(shape, torch.nan, dtype=torch.float64)
    rows = _quantized_rows(hidden, mode.static_l1) if mode.quantized else hidden.double()
    for expert, chosen in _slots_of(experts):
        inner = _swiglu(*gate_up(weights, expert, rows[chosen]), limit)
        shifted = torch.stack([round_to_bf16(inner * (1 + shift)) for shift in shifts])
        if mode.quantized:
            scale = None if mode.static_l2 is None else float(mode.static_l2[expert])
            shifted = _quantized_rows(shifted.flatten(0, 1), scale).view_as(shifted)
        result[:, chosen] = shifted
    return result


def down_rows(weights: LayerWeights, operand: Tensor, experts: Tensor) -> Tensor:
    """GEMM 2 of ``operand [N, S, I]``, with its global scale: float64 ``[N, S, H]``."""
    shape = (*operand.shape[:2], weights.shape.hidden_size)
    result = torch.full(shape, torch.nan, dtype=torch.float64)
    for expert, chosen in _slots_of(experts):
        product = operand[:, chosen] @ decode(weights.l2_fp4[expert], weights.l2_sf[expert]).T
        result[:, chosen] = product * float(weights.l2_gs[expert])
    return result


def gate_up(weights: LayerWeights, expert: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """GEMM 1: float64 ``[n, H]`` -> gate and up, float64 ``[n, I]`` each, with their global scales."""
    product = rows @ decode(weights.l1_fp4[expert], weights.l1_sf[expert]).T
    gate, up = product.chunk(2, dim=1)
    return gate * float(weights.l1_gs[expert, 0]), up * float(weights.l1_gs[expert, 1])


def decode(fp4: Tensor, sf: Tensor) -> Tensor:
    """``e2m1 * sf``: packed uint8 ``[N, K/2]`` and e4m3 ``[N, K/16]`` -> float64 ``[N, K]``, exact."""
    values = torch.embedding(_byte_values(), fp4.int()).view(*sf.shape, _BLOCK)
    values *= _e4m3_values()[sf.view(torch.uint8).int()].unsqueeze(-1)
    return values.flatten(-2)


def round_to_bf16(x: Tensor) -> Tensor:
    """float64 -> the nearest bf16, ties to even, as float64: in one step, where torch's cast goes through fp32."""
    exponent = torch.frexp(x).exponent.clamp(min=-125)
    quantum = torch.ldexp(torch.ones_like(x), exponent - 8)  # 8 significant bits; fixed steps below 2^-126
    rounded = (x / quantum).round() * quantum
    return torch.where(rounded.abs() >= 2.0**128, torch.inf * x.sign(), rounded)


def _quantized_rows(x: Tensor, scale: float | None) -> Tensor:
    """Quantize ``[n, K]`` under one global scale, or one a row from its amax, and decode: float64, exact."""
    x = x.float()
    blocks = x.unflatten(1, (-1, _BLOCK))
    amax = blocks.abs().amax(dim=2)
    if scale is None:
        row_amax = amax.amax(dim=1, keepdim=True)
        gs = torch.where(row_amax.isfinite(), row_amax, 0.0) / 2688
        gs = torch.where(gs < _SMALLEST_GLOBAL_SCALE, 1.0, gs)
    else:
        gs = torch.full((1, 1), scale)
    wanted = (amax / 6 / gs).clamp(max=448)
    finite = amax.isfinite()
    sf = _nearest(torch.where(finite, wanted, 0.0).double(), _e4m3_values()[:_NAN_SCALE])
    sf_value = _e4m3_values()[sf]
    step = sf_value.float() * gs
    usable = step > 0
    quotient = blocks / torch.where(usable, step, 1.0).unsqueeze(2)
    magnitude = _e2m1_values()[:8][_nearest(quotient.abs().nan_to_num(0.0).clamp(max=6).double(), _e2m1_values()[:8])]
    values = torch.where(usable.unsqueeze(2), magnitude.copysign(quotient.double()), 0.0)
    values = torch.where(finite.unsqueeze(2), values, torch.nan)
    return (values * (sf_value * gs.double()).unsqueeze(2)).flatten(1)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index of the value nearest to each ``x``, the even index on a tie; ``x`` within the range of sorted values."""
    midpoints = (values[:-1] + values[1:]) / 2
    below = torch.searchsorted(midpoints, x.contiguous())  # midpoints that are smaller than x
    on_midpoint = midpoints[below.clamp(max=len(midpoints) - 1)] == x
    return below + (on_midpoint & (below % 2 == 1)).long()


def _swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return gate / (1 + torch.exp(-gate)) * up


def _slots_of(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    for expert in experts.unique().tolist():
        yield expert, (experts == expert).nonzero().flatten()


@cache
def _e2m1_values() -> Tensor:
    """float64 ``[16]``: sign, two exponent bits (bias 1), one mantissa bit; exponent 0 is subnormal."""
    magnitudes = [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in range(2)]
    return torch.tensor(magnitudes + [-value for value in magnitudes], dtype=torch.float64)


@cache
def _byte_values() -> Tensor:
    """float64 ``[256, 2]``: the values of a byte's two codes, the even K index in the low nibble."""
    return torch.stack((_e2m1_values().repeat(16), _e2m1_values().repeat_interleave(16)), dim=1)


@cache
def _e4m3_values() -> Tensor:
    """float64 ``[256]``: sign, four exponent bits (bias 7), three mantissa bits; 0x7F and 0xFF are NaN."""
    magnitudes = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)]
    magnitudes[_NAN_SCALE] = float("nan")
    return torch.tensor(magnitudes + [-value for value in magnitudes], dtype=torch.float64)
