"""What distinguishes one compiled kernel from another, and what follows from it: sizes, counts, shared memory, TMEM."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.kernels.cutedsl.sizes import TABLE_BYTES
from dsv4.ops.layouts import ROW_TILE, ceil_div, round_up

ARCHS = ("sm_100a", "sm_100f", "sm_103a")
"""What kernels are compiled for: a B200, all of its family, a B300."""

MMA_K = 64
"""K of one NVFP4 tensor-core instruction: four block scales of a row, one word."""

SUBTILE = 32
"""Accumulator columns that an epilogue thread has in registers at a time: one block of 16 of SwiGLU's results."""

TMEM_COLUMNS = 512
SHARED_BYTES = 227 * 1024
THREADS = 192
EPILOGUE_WARPS = 4
_SCALE_TILE_BYTES = 512
_SCALE_COLUMNS = 4  # of TMEM, for one 128 x 4 tile of scales


@dataclass(frozen=True)
class BlackwellConfig:
    """One compiled kernel.

    Attributes:
        m: rows of a tile, 128, or 256 over a pair of CTAs.
        n: columns of B in a tile: 64, 128, 192 or 256.
        k: values of K in a pipeline stage: 64, 128 or 256.
        stages: depth of the pipeline.
        gated: columns alternate between gate and up by fours, and the result is SwiGLU's.
        interleaved: SwiGLU's results stay in the places of the gates (with ``gated``).
        requantize: SwiGLU's results are written as NVFP4 codes and swizzled block scales (with ``gated``).
        wide_out: fp32 results, else bf16 (not with ``gated``).
        row_scale: multiply each row's products by its own fp32 number.
        weighted: multiply SwiGLU's result by the routing weight of the row's slot.
        scattered: a row of the result stands at the row's slot.
        limited: clamp SwiGLU's operands.
    """

    m: int
    n: int
    k: int
    stages: int
    gated: bool = False
    interleaved: bool = False
    requantize: bool = False
    wide_out: bool = False
    row_scale: bool = False
    weighted: bool = False
    scattered: bool = False
    limited: bool = False

    @property
    def ctas(self) -> int:
        """That work on one tile."""
        return self.m // ROW_TILE

    @property
    def b_rows(self) -> int:
        """Of B, loaded by one CTA."""
        return self.n // self.ctas

    @property
    def b_scale_tiles(self) -> int:
        """Tiles of 128 rows that hold the scales of n columns; each CTA of a pair has them all."""
        return ceil_div(self.n, ROW_TILE)

    @property
    def b_scale_order(self) -> tuple[int, ...]:
        """Dimensions of B's scales (within a tile, along K, along rows, experts) in the order of TMA's coordinates.

        CuTe puts behind the others those of which a box has one.
        """
        return (0, 2, 1, 3) if self.steps == 1 < self.b_scale_tiles else (0, 1, 2, 3)

    @property
    def steps(self) -> int:
        """Tensor-core instructions for one stage."""
        return self.k // MMA_K

    @property
    def a_bytes(self) -> int:
        """Codes of A in a stage of one CTA."""
        return ROW_TILE * self.k // 2

    @property
    def b_bytes(self) -> int:
        """Codes of B in a stage of one CTA."""
        return self.b_rows * self.k // 2

    @property
    def a_scale_bytes(self) -> int:
        """Scales of A in a stage of one CTA."""
        return self.steps * _SCALE_TILE_BYTES

    @property
    def b_scale_bytes(self) -> int:
        """Scales of B in a stage of one CTA."""
        return self.b_scale_tiles * self.steps * _SCALE_TILE_BYTES

    @property
    def stage_bytes(self) -> int:
        """That one CTA loads for a stage."""
        return self.a_bytes + self.b_bytes + self.a_scale_bytes + self.b_scale_bytes

    @property
    def barriers(self) -> int:
        """Two for each stage, two for each accumulator."""
        return 2 * self.stages + 4

    @property
    def layout_bytes(self) -> int:
        """What a CTA puts in shared memory: stages, barriers, the address of TMEM, the table of the schedule."""
        return self.stages * self.stage_bytes + 8 * self.barriers + 16 + TABLE_BYTES

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: more than half, since each takes all of its multiprocessor's TMEM."""
        return max(self.layout_bytes, SHARED_BYTES // 2 + 1)

    @property
    def a_scale_columns(self) -> int:
        """Of TMEM, for the scales of A in a stage."""
        return self.steps * _SCALE_COLUMNS

    @property
    def scale_columns(self) -> int:
        """Of TMEM, for all scales of a stage."""
        return self.a_scale_columns + self.steps * self.b_scale_tiles * _SCALE_COLUMNS

    @property
    def overlapped(self) -> bool:
        """Whether two accumulators and the scales are more than TMEM holds, and the accumulators share columns."""
        return 2 * self.n + self.scale_columns > TMEM_COLUMNS

    @property
    def accumulator_stride(self) -> int:
        """Columns from the first accumulator to the second."""
        return TMEM_COLUMNS - self.scale_columns - self.n if self.overlapped else self.n

    @property
    def release_after(self) -> int:
        """Subtiles after which the next product may overwrite: the shared columns, or all of them."""
        shared = self.n - self.accumulator_stride if self.overlapped else self.n
        return ceil_div(shared, SUBTILE)

    @property
    def scale_base(self) -> int:
        """First column of TMEM that holds scales."""
        return self.accumulator_stride + self.n

    @property
    def out_columns(self) -> int:
        """Results of a subtile's columns."""
        return SUBTILE // 2 if self.gated else SUBTILE

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        if self.m not in (128, 256) or self.n not in (64, 128, 192, 256) or self.k not in (64, 128, 256):
            return (
                f"tiles are 128 or 256 by 64, 128, 192 or 256 by 64, 128 or 256, found {self.m} x {self.n} x {self.k}"
            )
        if self.stages < 2 or self.shared_bytes > SHARED_BYTES:
            return f"{self.stages} stages take {self.shared_bytes} bytes of shared memory, at most {SHARED_BYTES}"
        if not self.gated and (self.interleaved or self.requantize or self.weighted or self.limited):
            return "interleaved, requantize, weighted and limited belong to SwiGLU"
        if self.gated and (self.wide_out or (self.requantize and (self.interleaved or self.scattered))):
            return "SwiGLU's results are bf16, or codes in the order of rows"
        return None


def most_stages(config_bytes: int) -> int:
    """How many stages of so many bytes fit."""
    fixed = 8 * 4 + 16 + TABLE_BYTES
    return (SHARED_BYTES - fixed) // (config_bytes + 16)


def deepest(m: int, n: int, k: int, **flags: bool) -> BlackwellConfig:
    """The configuration with as many stages as shared memory holds, at most 8."""
    stage = BlackwellConfig(m, n, k, 2).stage_bytes
    return BlackwellConfig(m, n, k, min(8, most_stages(stage)), **flags)


def chosen(rows_per_expert: float, columns: int, k: int, **flags: bool) -> BlackwellConfig:
    """The configuration for so many rows to an expert on average. By counts alone: nothing here was timed.

    Pairs of CTAs where their 256 rows are there to be multiplied; wide tiles where rows are many, since they read A
    least often; narrow ones where rows are few, so that there are tiles for every multiprocessor.
    """
    m = 256 if rows_per_expert >= 256 else 128
    n = 256 if rows_per_expert > 64 else 128 if rows_per_expert > 4 else 64
    while n > 64 and columns <= n // 2:
        n //= 2
    line = 256
    while line > MMA_K and k <= line // 2:
        line //= 2
    return deepest(m, n, line, **flags)


def padded_scale_columns(k: int) -> int:
    """Block scales of a row of K values, padded to whole tiles."""
    return round_up(ceil_div(k, 16), 4)
