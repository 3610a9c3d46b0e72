"""Combine: the slot rows of GEMM 2 back into one row a token, in a fixed order, without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(rows: Tensor, slot_row: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """``out[t] = sum over j of weights[t, j] * rows[slot_row[t, j]]``, in fp32, j ascending, rounded once.

    A dropped slot is skipped by selection, not by a zero weight, so that an Inf in some unused row, or in its weight,
    never meets a zero.

    Args:
        rows: fp32 or bf16 ``[R, H]``.
        slot_row: int32 ``[T, k]``, -1 for a dropped slot.
        weights: fp32 ``[T, k]``, or None where the weight was applied earlier.
        out: ``[T, H]``, any floating dtype; every element is written.
    """
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    if rows.shape[0]:
        served, row = (slot_row >= 0).unsqueeze(2), slot_row.clamp(min=0)
        for j in range(slot_row.shape[1]):
            term = rows[row[:, j]].float()
            if weights is not None:
                term = term * weights[:, j : j + 1]
            total = torch.where(served[:, j], total + term, total)
    return out.copy_(total)
