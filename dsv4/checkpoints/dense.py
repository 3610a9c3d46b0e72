"""Floating-point experts into NVFP4 ones: one expert at a time, on whatever device the weights are."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertWeights
from dsv4.nvfp4 import Nvfp4Tensor


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
    both = Nvfp4Tensor.quantize(torch.cat((gate, up)), four_over_six=four_over_six)
    rows = gate.shape[0]
    return ExpertWeights(
        Nvfp4Tensor(both.codes[:rows], both.sf[:rows], both.gs),
        Nvfp4Tensor(both.codes[rows:], both.sf[rows:], both.gs),
        Nvfp4Tensor.quantize(down, four_over_six=four_over_six),
    )
