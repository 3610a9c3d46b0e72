"""Blocks quantized by the Triton functions of :mod:`dsv4.kernels.triton.numerics` alone, and what they should be."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.numerics import block_scales, block_terms, quantize_values
from dsv4.nvfp4 import block_codes, decode_e2m1
from kernels.hard_blocks import all_ones, below_powers, blocks, ties

AT_ONCE = 128
DATA = [blocks, ties, below_powers, all_ones]
TERMS = [block_scales, block_terms]


@triton.jit
def _quantized(x, amax, gs, out, TERMS: tl.constexpr, AT_ONCE: tl.constexpr):
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    divisor, reciprocal, factor = TERMS(tl.load(amax + block), tl.load(gs + block))
    tl.store(out + at, quantize_values(tl.load(x + at), divisor[:, None], reciprocal[:, None], factor[:, None]))


def check_quantized(data: Any, terms: Any, device: str) -> None:
    """``e2m1 * sf`` of the blocks equals the torch twin's, NaN for blocks that are not finite; zeros keep their signs
    where their block keeps its codes."""
    x, gs = data()
    codes, sf = block_codes(x, gs[:, None])
    want = (decode_e2m1(codes) * sf.float()[..., None]).flatten(1)
    out = torch.full_like(x, -7.0, device=device)
    assert len(x) % AT_ONCE == 0
    amax = x.abs().amax(1)
    _quantized[(len(x) // AT_ONCE,)](x.to(device), amax.to(device), gs.to(device), out, TERMS=terms, AT_ONCE=AT_ONCE)
    got: Tensor = out.cpu()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool(same.all()), (same.logical_not().nonzero(), x[~same], got[~same], want[~same])
    numbers = ~got.isnan() & (sf.float() > 0)
    assert torch.equal(torch.signbit(got)[numbers], torch.signbit(x)[numbers])
