"""Floating-point experts into NVFP4 ones: one expert at a time, on whatever device the weights are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertWeights
from dsv4.nvfp4 import (
    BLOCK,
    GS_DIVISOR,
    GS_DIVISOR_4_OVER_6,
    Nvfp4Tensor,
    finite_row_amax,
    global_scale,
    quantize_blocks,
    quantize_blocks_4_over_6,
)

_SLAB_VALUES = 1 << 18


def quantize_expert(gate: Tensor, up: Tensor, down: Tensor, *, four_over_six: bool = False) -> ExpertWeights:
    """Quantize one expert.

    gate and up share a global scale: readers that know only one scale for both (there are such) then get them right,
    and e4m3's range of 2^17 leaves no precision to be gained from two.

    Args:
        gate, up: any floating dtype ``[I, H]``.
        down: any floating dtype ``[H, I]``.
        four_over_six: choose each block's scale between two, by squared error: see :mod:`dsv4.nvfp4`.

    Returns:
        The expert without input scales: those come from data, not from weights.
    """
    l1_gs = _global_scale((gate, up), four_over_six)
    return ExpertWeights(
        _quantize(gate, l1_gs, four_over_six),
        _quantize(up, l1_gs, four_over_six),
        _quantize(down, _global_scale((down,), four_over_six), four_over_six),
    )


def _global_scale(matrices: Sequence[Tensor], four_over_six: bool) -> Tensor:
    """One global scale for ``matrices``, as :meth:`dsv4.nvfp4.Nvfp4Tensor.quantize` has it for one."""
    amax = torch.stack([finite_row_amax(matrix).amax() for matrix in matrices]).amax()
    return global_scale(amax, GS_DIVISOR_4_OVER_6 if four_over_six else GS_DIVISOR)


def _quantize(matrix: Tensor, gs: Tensor, four_over_six: bool) -> Nvfp4Tensor:
    """``matrix [out, in]`` under ``gs``.

    On a CPU slab by slab, so that what the operations pass on stays in its cache: that takes a third of the time, and
    no memory for the intermediate results of a whole matrix.
    """
    quantize = quantize_blocks_4_over_6 if four_over_six else quantize_blocks
    rows, columns = matrix.shape
    slab = max(1, _SLAB_VALUES // columns) if matrix.device.type == "cpu" else rows
    codes = matrix.new_empty((rows, columns // 2), dtype=torch.uint8)
    sf = matrix.new_empty((rows, columns // BLOCK), dtype=torch.float8_e4m3fn)
    for start in range(0, rows, slab):
        part = slice(start, start + slab)
        codes[part], sf[part] = quantize(matrix[part], gs)
    return Nvfp4Tensor(codes, sf, gs)
