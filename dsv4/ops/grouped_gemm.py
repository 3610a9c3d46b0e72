"""The reference grouped GEMM: ``out[row] = x[row] @ W[expert of row]`` in fp32, decoding a slab of weights at a time.

Operands are the exact products ``e2m1 * e4m3`` (or plain bf16 activations) held in fp32; global scales are applied by
the caller, afterwards and in fp32, so the only rounding in here is that of the fp32 accumulation.

Which rows belong to which expert is known on the device only. On a CPU there is no device to wait for: the counts are
read, and inactive experts cost nothing. On a GPU the loop runs over the row tiles of :class:`~dsv4.ops.routing.Routing`
instead, a number that depends on shapes alone, and each tile fetches its expert's weights by a device index: slow, but
free of host synchronisation, so that it can be captured and compared with anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4.ops.routing import Routing

# Rows of K decoded at once. Large enough to hide the cost of launching ten small torch operations, small enough that
# the decoded slab is still in the cache when the GEMM reads it.
K_SLAB = 512


class ExpertMatrices(Protocol):
    """The weights ``W[e]`` of a grouped GEMM, each ``[K, N]``, decoded on demand."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def out_features(self) -> int:
        """N."""

    def decode(self, expert: int | Tensor, k0: int, k1: int) -> Tensor:
        """Rows ``k0:k1`` of one expert's ``e2m1 * sf`` as fp32 ``[k1 - k0, N]``; valid until the next call.

        Args:
            expert: local id, as an int or as a one-element integer tensor on the weights' device.
            k0: first row, a multiple of 16.
            k1: end row, a multiple of 16.
        """


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows that share one expert."""

    expert: int | Tensor
    start: int
    stop: int


def row_ranges(routing: Routing) -> list[RowRange]:
    """The rows of each expert (CPU), or the row tiles with their experts on the device (GPU)."""
    if routing.counts.device.type == "cpu":
        starts, counts = routing.row_starts.tolist(), routing.counts.tolist()
        return [RowRange(e, starts[e], starts[e] + n) for e, n in enumerate(counts) if n]
    # Tiles beyond the last (expert -1) multiply rows that nobody reads with expert 0.
    experts = routing.tile_expert.clamp(min=0).unsqueeze(1)
    tile = routing.row_tile
    return [RowRange(experts[i], i * tile, (i + 1) * tile) for i in range(experts.shape[0])]


def grouped_gemm(
    x: Tensor, matrices: ExpertMatrices, ranges: list[RowRange], out: Tensor, *, row_by_row: bool = False
) -> Tensor:
    """Multiply each range of rows with its expert's matrix.

    Args:
        x: fp32 ``[R, K]``.
        matrices: the weights.
        ranges: which rows meet which expert; rows outside all of them are left as they are in ``out``.
        out: fp32 ``[R, N]``.
        row_by_row: multiply one row at a time. A BLAS chooses its kernel, and with it the order of summation, by the
            number of rows; one row has one order, whatever else is in the batch.

    Returns:
        ``out``.
    """
    for r in ranges:
        for k0 in range(0, matrices.in_features, K_SLAB):
            k1 = min(k0 + K_SLAB, matrices.in_features)
            w = matrices.decode(r.expert, k0, k1)
            step = 1 if row_by_row else r.stop - r.start
            for start in range(r.start, r.stop, step):
                block, result = x[start : start + step, k0:k1], out[start : start + step]
                if k0:
                    result.addmm_(block, w)
                else:
                    torch.mm(block, w, out=result)
    return out
