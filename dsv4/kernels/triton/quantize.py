"""Quantize matrices to NVFP4 codes and block scales: the kernels behind :mod:`dsv4.ops.quantize`.

A matrix ``[M, K]`` is read as one list of M * K/16 blocks, so that any M and K fill a program's tile. A global scale
that comes from the data takes two launches: the first leaves one maximum a program, and every program of the second
takes the largest of them. So nothing is cleared beforehand, no atomics are needed and the host learns nothing.

Numbers of rows are not specialized on: they choose between two tile sizes, and compile nothing else anew.
"""

from __future__ import annotations

from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.triton.numerics import encode_blocks, global_scale

_BLOCK = tl.constexpr(16)
_AMAX_PROGRAMS = 512
"""Programs that look for the maximum: enough reads in flight, few enough partial maxima to be read by all."""
_AMAX_VALUES = 4096
"""Values that such a program looks at together."""
_ROW_TILE = tl.constexpr(128)
_PARTS = tl.constexpr(8)
_PART_ROWS = tl.constexpr(16)
_PART_BLOCKS = tl.constexpr(16)
_CHUNKS = 4


class GlobalScale(IntEnum):
    """Where a row's global scale comes from."""

    ONE = 0
    """One number."""
    ROW = 1
    """One number a row."""
    EXPERT = 2
    """One number an expert."""
    PARTIAL_AMAX = 3
    """The largest of partial maxima, divided by 2688."""


@triton.jit
def _column(value, INTERLEAVED: tl.constexpr):
    """Where the value stands in a row; groups of 4 values are followed by 4 to be ignored if ``INTERLEAVED``."""
    if INTERLEAVED:
        return value // 4 * 8 + value % 4
    return value


@triton.jit(do_not_specialize=["rows"])
def _amax(
    x,  # [rows, K], K contiguous
    partial,  # f32 [programs]
    rows,
    K,
    row_stride,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    best = tl.zeros((ROWS,), tl.int32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)[:, None]
        amax = tl.zeros((ROWS, VALUES), tl.int32)
        start = 0
        while start < K:
            value = start + tl.arange(0, VALUES)[None, :]
            place = x + row.to(tl.int64) * row_stride + _column(value, INTERLEAVED)
            loaded = tl.load(place, mask=(row < rows) & (value < K), other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(loaded).to(tl.int32, bitcast=True))  # magnitudes order as their bits do
            start += VALUES
        row_amax = tl.max(amax, axis=1)
        best = tl.maximum(best, tl.where(row_amax < 0x7F800000, row_amax, 0))  # rows with a NaN or Inf are left out
        first += tl.num_programs(0) * ROWS
    tl.store(partial + tl.program_id(0), tl.max(best, axis=0).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["rows", "partials"])
def _quantize(
    x,  # [rows, K], K contiguous
    gs,  # f32, by SOURCE
    fp4,  # u8 [rows, K/2]
    sf,  # u8 [rows, K/16]
    gs_out,  # f32 [1], written if SOURCE is PARTIAL_AMAX
    rows,
    blocks,  # K/16
    row_stride,
    partials,
    SOURCE: tl.constexpr,
    PARTIALS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    row = index // blocks
    inside = row < rows
    value = ((index - row * blocks) * _BLOCK)[:, :, None] + tl.arange(0, _BLOCK)[None, None, :]
    place = x + (row.to(tl.int64) * row_stride)[:, :, None] + _column(value, INTERLEAVED)
    loaded = tl.load(place, mask=inside[:, :, None], other=0.0).to(tl.float32)
    if SOURCE == 0:
        scale = tl.load(gs)
    elif SOURCE == 1:
        scale = tl.load(gs + row, mask=inside, other=1.0)
    else:
        i = tl.arange(0, PARTIALS)
        scale = global_scale(tl.max(tl.load(gs + i, mask=i < partials, other=0.0), axis=0))
        if tl.program_id(0) == 0:
            tl.store(gs_out, scale)
    words, scales = encode_blocks(loaded, scale)
    half = tl.arange(0, 2)[None, None, :]
    words_out = fp4.to(tl.pointer_type(tl.uint32)) + index.to(tl.int64)[:, :, None] * 2 + half
    tl.store(words_out, words, mask=inside[:, :, None])
    tl.store(sf + index, scales, mask=inside)


@triton.jit(do_not_specialize=["rows", "experts"])
def _quantize_swizzled(
    x,  # [rows, K], K contiguous
    gs,  # f32, by SOURCE
    ends,  # i32 or i64 [experts], cumulative
    fp4,  # u8 [rows, K/2]
    sf,  # u8, swizzled
    rows,
    blocks,  # K/16
    row_stride,
    experts,
    SOURCE: tl.constexpr,
    EXPERTS: tl.constexpr,  # 0: all rows are one matrix
    CHUNKS: tl.constexpr,
):
    # A program writes four lines of 16 bytes of some tiles: rows 4p .. 4p + 3, and those 32, 64 and 96 further on.
    tile = tl.program_id(0) // _PARTS
    part = tl.program_id(0) % _PARTS
    if EXPERTS == 0:
        first = tile * _ROW_TILE
        end = rows
        expert = 0
    else:
        e = tl.arange(0, EXPERTS)
        stop = tl.minimum(tl.load(ends + e, mask=e < experts, other=0).to(tl.int32), rows)
        start = tl.minimum(tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0).to(tl.int32), rows)
        tiles = (tl.maximum(stop - start, 0) + _ROW_TILE - 1) // _ROW_TILE
        tiles_end = tl.cumsum(tiles, axis=0)
        before = tile - (tiles_end - tiles)  # tiles of the expert that come before this one
        mine = (before >= 0) & (before < tiles)
        if tile >= tl.max(tiles_end, axis=0):
            return
        first = tl.sum(tl.where(mine, start + before * _ROW_TILE, 0), axis=0)
        end = tl.sum(tl.where(mine, stop, 0), axis=0)
        expert = tl.sum(tl.where(mine, e, 0), axis=0)

    line = tl.arange(0, _PART_ROWS)[:, None]
    row = first + part * 4 + line // 4 + line % 4 * 32
    padded_blocks = (blocks + 3) // 4 * 4
    sf_tile = sf + tile.to(tl.int64) * _ROW_TILE * padded_blocks + part * 64
    begin = tl.program_id(1) * CHUNKS * _PART_BLOCKS
    finish = tl.minimum(begin + CHUNKS * _PART_BLOCKS, padded_blocks)
    if first + part * 4 < end:
        if SOURCE == 0:
            scale = tl.load(gs)
        elif SOURCE == 1:
            scale = tl.load(gs + row, mask=row < end, other=1.0)
        else:
            scale = tl.load(gs + expert)
        while begin < finish:
            block = begin + tl.arange(0, _PART_BLOCKS)[None, :]
            inside = (row < end) & (block < blocks)
            value = block[:, :, None] * _BLOCK + tl.arange(0, _BLOCK)[None, None, :]
            place = x + (row.to(tl.int64) * row_stride)[:, :, None] + value
            loaded = tl.load(place, mask=inside[:, :, None], other=0.0).to(tl.float32)
            words, scales = encode_blocks(loaded, scale)
            words_out = fp4.to(tl.pointer_type(tl.uint32)) + (row.to(tl.int64) * blocks * 2)[:, :, None]
            words_out += block[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
            tl.store(words_out, words, mask=inside[:, :, None])
            sf_out = sf_tile + block // 4 * 512 + line * 4 + block % 4
            tl.store(sf_out, tl.where(inside, scales, 0), mask=block < padded_blocks)
            begin += _PART_BLOCKS
    else:  # padding alone
        while begin < finish:
            block = begin + tl.arange(0, _PART_BLOCKS)[None, :]
            sf_out = sf_tile + block // 4 * 512 + line * 4 + block % 4
            zero = tl.zeros((_PART_ROWS, _PART_BLOCKS), tl.uint8)
            tl.store(sf_out, zero, mask=block < padded_blocks)
            begin += _PART_BLOCKS


def _readable(x: Tensor) -> Tensor:
    """``x`` with K contiguous and in a dtype that the kernels load."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _check_size(rows: int, blocks: int) -> None:
    if rows * blocks >= 2**31 - 4096:
        raise InputError(
            f"quantize: at most 2^31 blocks of 16 values at once, found {rows} rows of {blocks}; split the rows"
        )


def _launch(x: Tensor, gs: Tensor, fp4: Tensor, sf: Tensor, gs_out: Tensor, source: GlobalScale, interleaved: bool):
    rows, blocks = sf.shape
    total = rows * blocks
    _check_size(rows, blocks)
    # One tile at least where the scale is the kernel's own to write. Small tiles while there are few.
    tile, warps = (128, 4) if total <= 2**16 else (512, 8)
    own = source == GlobalScale.PARTIAL_AMAX
    grid = max(triton.cdiv(total, tile), int(own))
    if grid:
        _quantize[(grid,)](
            x,
            gs,
            fp4,
            sf.view(torch.uint8),
            gs_out,
            rows if blocks else 0,
            max(blocks, 1),
            x.stride(0),
            gs.numel(),
            SOURCE=int(source),
            PARTIALS=_AMAX_PROGRAMS if own else 1,
            INTERLEAVED=interleaved,
            BLOCKS=tile,
            num_warps=warps,
        )


def quantize(x: Tensor, gs: Tensor, fp4: Tensor, sf: Tensor, interleaved: bool = False) -> None:
    """Quantize under a given global scale. Moves 2.5625 bytes a value for bf16 (2 in, 0.5 and 1/16 out), 4.5625 for
    fp32 or interleaved bf16.

    Args:
        x: floating point ``[M, K]``, or ``[M, 2K]`` in groups of 4 of which every other counts.
        gs: fp32, one number or ``[M, 1]``.
        fp4: uint8 ``[M, K/2]``, contiguous, written.
        sf: one-byte ``[M, K/16]``, contiguous, written.
        interleaved: x is ``[M, 2K]``.
    """
    source = GlobalScale.ROW if gs.dim() == 2 else GlobalScale.ONE
    _launch(_readable(x), gs.contiguous(), fp4, sf, gs, source, interleaved)


def amax_quantize(x: Tensor, fp4: Tensor, sf: Tensor, gs: Tensor, interleaved: bool = False) -> None:
    """:func:`quantize` under ``amax / 2688``, which is written to ``gs``, fp32 ``[1]``. Reads x once more than that:
    4.5625 bytes a value for bf16."""
    x = _readable(x)
    rows, k = sf.shape[0], sf.shape[1] * 16
    values = min(_AMAX_VALUES, triton.next_power_of_2(max(k, 16)))
    tile_rows = _AMAX_VALUES // values
    programs = max(1, min(_AMAX_PROGRAMS, triton.cdiv(rows, tile_rows)))
    partial = torch.empty(programs, dtype=torch.float32, device=x.device)
    _amax[(programs,)](
        x, partial, rows, k, x.stride(0), INTERLEAVED=interleaved, ROWS=tile_rows, VALUES=values, num_warps=8
    )
    _launch(x, partial, fp4, sf, gs, GlobalScale.PARTIAL_AMAX, interleaved)


def quantize_swizzled(x: Tensor, gs: Tensor, expert_offsets: Tensor | None, fp4: Tensor, sf: Tensor) -> None:
    """:func:`quantize` with block scales in the swizzled 32x4x4 layout, padding scales zero.

    Moves the bytes of :func:`quantize` and one for each padding scale.

    Args:
        x: floating point ``[M, K]``.
        gs: fp32, one number, ``[M, 1]``, or with ``expert_offsets`` ``[E]``.
        expert_offsets: int32 or int64 ``[E]``, cumulative row ends; each expert's scales begin a tile of 128 rows.
        fp4: uint8 ``[M, K/2]``, contiguous; rows past the last end are left as they are.
        sf: one-byte, whole tiles of ``128 * pad4(K/16)``; tiles past the last expert's are left as they are.

    Raises:
        InputError: fp4's address is not a multiple of 4, or x has more than 2^31 blocks.
    """
    if fp4.data_ptr() % 4:
        raise InputError(f"quantize: codes are stored in words of 4 bytes, found them at address {fp4.data_ptr():#x}")
    x = _readable(x)
    rows, blocks = x.shape[0], x.shape[1] // 16
    _check_size(rows, blocks)
    tiles = sf.numel() // max(128 * triton.cdiv(blocks, 4) * 4, 1)
    if not tiles:
        return
    source = (GlobalScale.ONE, GlobalScale.EXPERT, GlobalScale.ROW)[gs.dim()]
    experts = expert_offsets.numel() if expert_offsets is not None else 0
    grid = (tiles * _PARTS.value, triton.cdiv(blocks, _CHUNKS * _PART_BLOCKS.value))
    _quantize_swizzled[grid](
        x,
        gs.contiguous(),
        expert_offsets.contiguous() if expert_offsets is not None else gs,
        fp4,
        sf.view(torch.uint8),
        rows,
        blocks,
        x.stride(0),
        experts,
        SOURCE=int(source),
        EXPERTS=triton.next_power_of_2(experts) if experts else 0,
        CHUNKS=_CHUNKS,
        num_warps=4,
    )
