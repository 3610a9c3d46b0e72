"""The reference grouped GEMM: ``out[row] = x[row] @ W[expert of row]`` in fp32, decoding a slab of weights at a time.

Operands are the exact products ``e2m1 * e4m3`` (or plain bf16 activations) held in fp32; global scales are applied by
the caller, afterwards and in fp32, so the only rounding in here is that of the fp32 accumulation.

Which rows belong to which expert is known on the device only. On a CPU there is no device to wait for: the counts are
read, and inactive experts cost nothing. On a GPU the loop runs over the row tiles of :class:`~dsv4.ops.routing.Routing`
instead, a number that depends on shapes alone, and each tile fetches its expert's weights by a device index: slow, but
free of host synchronisation, so that it can be captured and compared with anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4.nvfp4 import BLOCK
from dsv4.ops.routing import Routing

# Rows of K decoded at once. Large enough to hide the cost of launching ten small torch operations, small enough that
# the decoded slab is still in the cache when the GEMM reads it.
K_SLAB = 512

# Up to this many rows share an expert, applying block scales to partial sums costs less than applying them to weights.
FEW_ROWS = 4


@dataclass(frozen=True)
class Slab:
    """Some rows of K of one expert's matrix, decoded: ``W = values * scales``, 16 rows to a scale.

    Attributes:
        start: the first row of K.
        values: fp32 ``[B, 16, N]``, e2m1 values; may be scratch that the next slab overwrites.
        scales: fp32 ``[B, 1, N]``, block scales.
    """

    start: int
    values: Tensor
    scales: Tensor

    @property
    def stop(self) -> int:
        """The end row of K."""
        return self.start + self.values.shape[0] * self.values.shape[1]

    def multiply(self, blocks: Tensor, out: Tensor) -> None:
        """``out (+)= x[:, start:stop] @ W`` for ``blocks = x`` by block, ``[K/16, M, 16]``, and ``out [M, N]``.

        The first slab overwrites ``out``. The slab itself is left as it is.
        """
        first = self.start // self.values.shape[1]
        # [B, M, 16] @ [B, 16, N]: the sums over each block, still without its scale.
        partial = torch.bmm(blocks[first : first + self.values.shape[0]], self.values).mul_(self.scales)
        if first:
            out += partial.sum(dim=0)
        else:
            torch.sum(partial, dim=0, out=out)

    def scaled(self) -> Tensor:
        """``W [16B, N]``, computed in place of the values."""
        return self.values.mul_(self.scales).flatten(0, 1)


class ExpertMatrices(Protocol):
    """The weights ``W[e]`` of a grouped GEMM, each ``[K, N]``, decoded on demand."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def out_features(self) -> int:
        """N."""

    def slabs(self, expert: int | Tensor) -> Iterator[Slab]:
        """One expert's matrix, decoded slab by slab from the first row of K to the last.

        Args:
            expert: local id, as an int or as a one-element integer tensor on the weights' device.
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
        step = 1 if row_by_row else r.stop - r.start
        if step <= FEW_ROWS:
            parts = [slice(start, start + step) for start in range(r.start, r.stop, step)]
            few = [(x[rows].view(step, -1, BLOCK).transpose(0, 1), out[rows]) for rows in parts]
            for slab in matrices.slabs(r.expert):
                for blocks, result in few:
                    slab.multiply(blocks, result)
            continue
        rows, result = x[r.start : r.stop], out[r.start : r.stop]
        for slab in matrices.slabs(r.expert):
            if slab.start:
                result.addmm_(rows[:, slab.start : slab.stop], slab.scaled())
            else:
                torch.mm(rows[:, : slab.stop], slab.scaled(), out=result)
    return out
