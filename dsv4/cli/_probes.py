"""Weights that make a layer show what happens inside it.

A backend gives nothing but the layer's output. So each stage is made visible by replacing some of the weights with
matrices whose effect is known exactly, and run through the very kernels that serve the real ones:

* ``down`` that *selects*: row h is 1 at column ``first + h``. The output is GEMM 2's operand itself, at most ``H``
  columns of it at a time.
* ``up`` (or ``gate``) that *reads a constant*: every row is 1 at column 0, where all probing tokens have the value 1.
  Then the intermediate depends on the other of the two alone.
* gate and up that *make a pattern*: the same random code for both at column 0 of every row. Then the intermediate is
  known, differs by column, needs one product of GEMM 1, and does not care which of the two is gate.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4.checkpoints.base import LayerWeights
from dsv4.nvfp4 import BLOCK

_ONE = 0x2  # e2m1 codes
_THREE = 0x5
_ONE_SCALE = 0x38  # the e4m3 byte of 1


def probing_tokens(count: int, hidden_size: int, generator: torch.Generator) -> Tensor:
    """Normal hidden states whose first block is all ones: bf16 ``[T, H]``."""
    hidden = torch.randn(count, hidden_size, generator=generator)
    hidden[:, :BLOCK] = 1
    return hidden.bfloat16()


def with_constant(weights: LayerWeights, half: int) -> LayerWeights:
    """``weights`` with gate (``half`` 0) or up (1) replaced by a matrix that reads the tokens' constant."""
    inter = weights.shape.intermediate_size
    rows = slice(half * inter, (half + 1) * inter)
    fp4, sf, gs = weights.l1_fp4.clone(), weights.l1_sf.clone(), weights.l1_gs.clone()
    fp4[:, rows] = 0
    fp4[:, rows, 0] = _ONE
    sf.view(torch.uint8)[:, rows] = _ONE_SCALE
    gs[:, half] = 1
    return replace(weights, l1_fp4=fp4, l1_sf=sf, l1_gs=gs)


def with_pattern(weights: LayerWeights, limit: float | None) -> LayerWeights:
    """``weights`` with gate and up replaced by a pattern that stays within the clamp."""
    inter = weights.shape.intermediate_size
    # From 1 to 3: silu(v) * v then spans what a block of 16 can hold without rounding the smallest to 0.
    codes = torch.randint(_ONE, _THREE + 1, (inter,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fp4 = torch.zeros_like(weights.l1_fp4)
    fp4[:, :, 0] = codes.repeat(2)
    sf = torch.full_like(weights.l1_sf.view(torch.uint8), _ONE_SCALE).view(torch.float8_e4m3fn)
    # The tokens' constant may come out of its quantization a little above 1.
    gs = 1.0 if limit is None else min(1.0, limit / 4)
    return replace(weights, l1_fp4=fp4, l1_sf=sf, l1_gs=torch.full_like(weights.l1_gs, gs))


def with_selection(weights: LayerWeights, first: int) -> LayerWeights:
    """``weights`` whose output is their intermediate's columns from ``first`` on, as many as there are outputs."""
    width, inter = weights.shape.hidden_size, weights.shape.intermediate_size
    row = torch.arange(min(width, inter - first), device=weights.l2_fp4.device)
    column = row + first
    fp4 = torch.zeros_like(weights.l2_fp4)
    fp4[:, row, column // 2] = (_ONE << (4 * (column % 2))).to(torch.uint8)
    sf = torch.full_like(weights.l2_sf.view(torch.uint8), _ONE_SCALE).view(torch.float8_e4m3fn)
    return replace(weights, l2_fp4=fp4, l2_sf=sf, l2_gs=torch.ones_like(weights.l2_gs))
