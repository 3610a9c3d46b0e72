"""Rows in the order of their experts, unpadded, as NVFP4 operands with swizzled scales.

Block-scaled tensor cores want the codes of an expert's rows one after another, and their scales in tiles of 128 rows
that begin anew at each expert (:mod:`dsv4.ops.gemm_runner`). The routing kernel with tiles of one row gives that order;
:func:`expert_tables` adds the experts' ends and where each row's scales stand.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import encode_blocks, global_scale, largest_magnitude
from dsv4.kernels.triton.stages import ScaleSource

_TABLE_ROWS = tl.constexpr(1024)


@triton.jit(do_not_specialize=["E", "rows"])
def _expert_tables(row_expert, num_rows, ends, ones, scale_row, E, rows, EXPERTS: tl.constexpr, DEPTH: tl.constexpr):
    """Every program searches all ends among the sorted experts, and places its own rows."""
    served = tl.load(num_rows)
    expert = tl.arange(0, EXPERTS)
    low = tl.zeros((EXPERTS,), tl.int32)
    high = tl.zeros((EXPERTS,), tl.int32) + served
    for _ in range(DEPTH):
        middle = (low + high) // 2
        there = tl.load(row_expert + middle, mask=middle < served, other=E)
        before = (there <= expert) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, low, mask=expert < E)
        tl.store(ones + expert, tl.full((EXPERTS,), 1.0, tl.float32), mask=expert < E)
    # Behind the last expert all ends are equal, and its entries are never asked for.
    counts = low - tl.where(expert > 0, tl.gather(low, tl.where(expert > 0, expert - 1, 0), 0), 0)
    tiles = (counts + 127) // 128
    shift = (tl.cumsum(tiles, 0) - tiles) * 128 - (low - counts)
    row = tl.program_id(0) * _TABLE_ROWS + tl.arange(0, _TABLE_ROWS)
    mine = tl.load(row_expert + row, mask=row < served, other=0)
    tl.store(scale_row + row, row + tl.gather(shift, mine, 0), mask=row < served)


@triton.jit
def _scale_place(row, block, padded_blocks):
    """Swizzled 32x4x4."""
    tile = (row // 128).to(tl.int64) * (padded_blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@triton.jit
def _quantize_rows(
    x, weight, scale, row_slot, row_expert, num_rows, scale_row, codes, sf, row_gs, K, padded_blocks,
    SOURCE: tl.constexpr, ORDERED: tl.constexpr, GATHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, TOP_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    source = row
    if ORDERED:
        if row >= tl.load(num_rows):
            return
        if GATHER:
            source = tl.load(row_slot + row) // TOP_K
    block = tl.arange(0, BLOCKS)
    inside = block * 16 < K
    column = block[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    value = tl.load(x + source.to(tl.int64) * K + column, mask=inside[None, :, None], other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        value = (value * tl.load(weight + source)).to(tl.bfloat16).to(tl.float32)
    if SOURCE == 1:
        amax = tl.max(largest_magnitude(value, 2))
        finite = tl.sum((largest_magnitude(value, 2) < float("inf")).to(tl.int32)) == BLOCKS
        gs = global_scale(tl.where(finite, amax, 0.0))
    elif SOURCE == 2:
        gs = tl.load(scale)
    elif SOURCE == 3:
        gs = global_scale(tl.load(scale))
    else:
        gs = tl.load(scale + tl.load(row_expert + row))
    words, scales = encode_blocks(value, gs)
    word = tl.arange(0, 2)[None, None, :]
    out = codes.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64) * (K // 8)
    tl.store(out + block[None, :, None] * 2 + word, words, mask=inside[None, :, None])
    if ORDERED:
        place = _scale_place(tl.load(scale_row + row), block, padded_blocks)
        tl.store(sf + place[None, :], tl.where(inside[None, :], scales, 0), mask=(block < padded_blocks)[None, :])
    else:
        tl.store(sf + row.to(tl.int64) * (K // 16) + block[None, :], scales, mask=inside[None, :])
    tl.store(row_gs + row, gs)


@triton.jit
def _gather_rows(
    codes, sf, gs, row_slot, num_rows, scale_row, out, out_sf, out_gs, K, padded_blocks,
    TOP_K: tl.constexpr, WORDS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row >= tl.load(num_rows):
        return
    token = (tl.load(row_slot + row) // TOP_K).to(tl.int64)
    word = tl.arange(0, WORDS)
    source = codes.to(tl.pointer_type(tl.uint32)) + token * (K // 8)
    target = out.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64) * (K // 8)
    tl.store(target + word, tl.load(source + word, mask=word < K // 8), mask=word < K // 8)
    block = tl.arange(0, BLOCKS)
    scale = tl.load(sf + token * (K // 16) + block, mask=block < K // 16, other=0)
    place = _scale_place(tl.load(scale_row + row), block, padded_blocks)
    tl.store(out_sf + place, scale, mask=block < padded_blocks)
    tl.store(out_gs + row, tl.load(gs + token))


def expert_tables(rows: TileMap, ends: Tensor, ones: Tensor, scale_row: Tensor) -> None:
    """What follows from the order of rows.

    Args:
        rows: tables of the routing kernel for tiles of one row, S rows.
        ends: int32 ``[E]``: receives the experts' cumulative row ends.
        ones: fp32 ``[E]``: receives ones.
        scale_row: int32 ``[S]``: receives the row of the scale matrix, for each row that an expert has.
    """
    slots, experts = rows.row_slot.shape[0], ends.shape[0]
    _expert_tables[(triton.cdiv(slots, _TABLE_ROWS.value),)](
        rows.tile_expert, rows.num_tiles, ends, ones, scale_row, experts, slots,
        EXPERTS=triton.next_power_of_2(experts), DEPTH=slots.bit_length() + 1, num_warps=4,
    )  # fmt: skip


def quantize_rows(
    x: Tensor,
    codes: Tensor,
    sf: Tensor,
    row_gs: Tensor,
    source: ScaleSource,
    scale: Tensor | None,
    *,
    rows: TileMap | None = None,
    scale_row: Tensor | None = None,
    slots_per_token: int | None = None,
    weights: Tensor | None = None,
) -> None:
    """Quantize rows to NVFP4, each under its own global scale: the bytes of :func:`dsv4.nvfp4.quantize_blocks`.

    Args:
        x: bf16 ``[.., K]``, contiguous, K a multiple of 32.
        codes: uint8 ``[R, K/2]``, written.
        sf: uint8, written: linear ``[R, K/16]``, or swizzled where ``rows`` is given.
        row_gs: fp32 ``[R]``, written.
        source: of the global scale; not NONE. EXPERT needs ``rows``.
        scale: what ``source`` reads.
        rows: rows stand in this order, and those behind the last are skipped.
        scale_row: with ``rows``, of :func:`expert_tables`.
        slots_per_token: with ``rows``: x has tokens, and row r is of token ``row_slot[r] // slots_per_token``. None: x
            has rows.
        weights: fp32, by row of x: multiplied in first, and rounded to bf16.
    """
    k, any_table = x.shape[1], row_gs
    blocks = triton.next_power_of_2(-(-k // 64) * 4)
    _quantize_rows[(codes.shape[0],)](
        x, weights if weights is not None else row_gs, scale if scale is not None else row_gs,
        rows.row_slot if rows is not None else any_table, rows.tile_expert if rows is not None else any_table,
        rows.num_tiles if rows is not None else any_table, scale_row if scale_row is not None else any_table,
        codes, sf, row_gs, k, -(-k // 64) * 4,
        SOURCE=int(source), ORDERED=rows is not None, GATHER=slots_per_token is not None,
        HAS_WEIGHT=weights is not None, TOP_K=slots_per_token or 1, BLOCKS=blocks,
        num_warps=max(1, min(8, blocks // 32)),
    )  # fmt: skip


def gather_rows(
    codes: Tensor,
    sf: Tensor,
    gs: Tensor,
    rows: TileMap,
    scale_row: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    slots_per_token: int,
) -> None:
    """Tokens, quantized once, to the rows of their experts.

    Args:
        codes: uint8 ``[T, K/2]``.
        sf: uint8 ``[T, K/16]``.
        gs: fp32 ``[T]``.
        rows: the order; slot s is of token ``s // slots_per_token``.
        scale_row: of :func:`expert_tables`.
        out: ``(codes [R, K/2], swizzled scales, gs [R])``; rows behind the last are left as they are.
        slots_per_token: k.
    """
    k = 2 * codes.shape[1]
    words, padded = triton.next_power_of_2(k // 8), -(-k // 64) * 4
    _gather_rows[(out[0].shape[0],)](
        codes, sf, gs, rows.row_slot, rows.num_tiles, scale_row, *out, k, padded,
        TOP_K=slots_per_token, WORDS=words, BLOCKS=triton.next_power_of_2(padded),
        num_warps=max(1, min(8, words // 128)),
    )  # fmt: skip
