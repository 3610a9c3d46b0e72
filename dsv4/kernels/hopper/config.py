"""What distinguishes one compiled kernel from another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4.kernels.hopper.layout import BLOCK_BYTES

ROW_UNIT = 8
"""Rows of a row tile: an expert's rows are padded to it, and row groups are whole row tiles."""

_PRODUCER_REGISTERS = 24
"""The least that a producer thread keeps, where registers move to the consumers."""

COMPARED_SLOTS = (16, 32, 64)
FEW_SLOTS = COMPARED_SLOTS[-1]
"""Calls of up to so many slots are routed and their tokens scattered in one launch, by comparing slots with each other:
as many as the first of ``COMPARED_SLOTS`` that is enough."""

MMA_TOKENS = 8
"""A loop for up to so many rows multiplies with ``mma`` (a warp's), others with ``wgmma`` (a warpgroup's).

For 8 tokens ``mma`` is the faster one, 6 %; for 16 they are equal, and for more ``wgmma`` is."""


@dataclass(frozen=True)
class HopperConfig:
    """One compiled kernel.

    Attributes:
        loops: main loops, each with the numbers of tokens (widths) that it multiplies by, ascending multiples of 8 up
            to 256 in all. A row group takes the first width that holds it. A loop costs 16 registers, although one is
            used at a time: with too many, ptxas waits for every single wgmma (tests/kernels/test_hopper_compile.py
            counts). Further widths of a loop cost none, but branches: see :mod:`dsv4.kernels.hopper.main_loops`.
        warpgroups: consumers of 64 weight rows each.
        blocks: 128s of K in a pipeline stage.
        stages: depth of the pipeline.
        programs_per_sm: programs that share a multiprocessor.
        gated: rows alternate between gate and up by eights, and the result is SwiGLU's, written as an image.
        wide_out: fp32 results, else bf16 (not with ``gated``).
        row_scale: multiply each token's results by its own fp32 number, before SwiGLU (with ``gated``; results that are
            written as they are take one for each token, for each expert or none, as a launch says).
        weighted: multiply SwiGLU's result by the routing weight.
        requantized: the image that is written is ``e2m1 * sf``, under a global scale for each expert (with ``gated``).
            A scale group lies in two warpgroups, so that there is an even number of those.
        limited: clamp SwiGLU's operands.
        follows_routing: the launch before writes the tables of routing, and nothing of them is read before it has
            ended; else they are older than that launch.
        every_lane_releases: all lanes of a consumer warp say that a stage is free, where one says it for all: slower,
            for compute-sanitizer, which does not see that they have read by then.
    """

    loops: tuple[tuple[int, ...], ...]
    warpgroups: int
    blocks: int
    stages: int
    programs_per_sm: int
    gated: bool = False
    wide_out: bool = False
    row_scale: bool = False
    weighted: bool = False
    limited: bool = False
    requantized: bool = False
    follows_routing: bool = False
    every_lane_releases: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all loops."""
        return tuple(width for loop in self.loops for width in loop)

    @property
    def tokens(self) -> int:
        """The most rows of a row group."""
        return self.widths[-1]

    @property
    def producer_group(self) -> bool:
        """Whether registers move from the producer to the consumers, which takes a whole warpgroup of producers.

        For many tokens, and for several widths of four warpgroups.
        """
        several = self.warpgroups == 4 and len(self.widths) > 1
        return self.programs_per_sm == 1 and self.warpgroups > 1 and (self.tokens >= 128 or several)

    @property
    def threads(self) -> int:
        """Of a program."""
        return 128 * self.warpgroups + (128 if self.producer_group else 32)

    @property
    def consumer_registers(self) -> int:
        """Of a consumer thread, where registers move: what producers leave of those that the program starts with."""
        return min(240, (self._launched_registers - _PRODUCER_REGISTERS) // self.warpgroups // 8 * 8)

    @property
    def producer_registers(self) -> int:
        """Of a producer thread, where registers move: the rest."""
        return self._launched_registers - self.warpgroups * self.consumer_registers

    @property
    def _launched_registers(self) -> int:
        """Registers of a thread at the start, summed over the warpgroups, producers too.

        ptxas gives all threads the same number, a multiple of 8.
        """
        warpgroups = self.warpgroups + 1
        return warpgroups * (512 // warpgroups // 8 * 8)

    @property
    def stage_bytes(self) -> int:
        """Of weights and tokens."""
        return self.blocks * (self.warpgroups * BLOCK_BYTES + self.tokens * 256)

    @property
    def block_table_bytes(self) -> int:
        """Of what two warpgroups tell each other about scale groups: 16 bytes for each, tokens by sixteens."""
        return -(-self.tokens // 16) * 1024 if self.requantized else 0

    @property
    def tiles_at(self) -> int:
        """Where in shared memory it stands which tile begins in each stage, 16 bytes each: behind the pipeline and its
        barriers."""
        return self.stages * (self.stage_bytes + 16)

    @property
    def tables_at(self) -> int:
        """Where two tables of row slots and factors stand, and behind them one of scale groups for every two
        warpgroups."""
        return self.tiles_at + self.stages * 16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a program."""
        tables = 2 * self.tokens * 8 + self.warpgroups // 2 * self.block_table_bytes
        return self.tables_at + tables + 1024

    def fitted(self, rows: int, k: int) -> HopperConfig:
        """The nearest one of whose tiles a ``rows x k`` matrix is made, where this one's do not fit a small matrix."""
        groups, blocks = self.warpgroups, self.blocks
        while groups > 1 and rows % (64 * groups):
            groups //= 2
        while blocks > 1 and k % (128 * blocks):
            blocks //= 2
        return replace(self, warpgroups=groups, blocks=blocks)
