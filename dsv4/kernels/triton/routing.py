"""Routing on the device: the counting sort of :mod:`dsv4.ops.routing`, in one or two launches.

Slots are cut into chunks. The first launch gives every chunk its histogram, ``hist[chunk, expert]``, and drops slots of
other ranks and of padding. The second needs nothing but those histograms: rows of expert e begin after the padded rows
of lower experts, and the rows of chunk c begin there after those of earlier chunks; within a chunk, a slot's rank is
the number of earlier slots with its expert, counted by comparing. No atomics on memory: the order is that of the slots.

Up to one chunk of slots, a single program does both. Every launch writes the whole of every table that is read later:
padding rows and tiles get their -1 here, so that nothing has to be cleared first.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dsv4.config import capacity
from dsv4.kernels.triton.grouped_gemm import TileMap

SMALL_CHUNK, CHUNK, LARGE_CHUNK = 64, 128, 512
_MANY_SLOTS = 8192
_COLUMN = tl.constexpr(32)
_FILL = tl.constexpr(1024)


@triton.jit
def _local_ids(
    ids,
    expert_map,
    num_valid,
    slot,
    in_range,
    E,
    START,
    MAP_SIZE,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Local ids of some slots, -1 where dropped."""
    wide = tl.load(ids + slot, mask=in_range, other=-1).to(tl.int64)
    if HAS_MAP:
        known = (wide >= 0) & (wide < MAP_SIZE)
        local = tl.load(expert_map + wide, mask=known & in_range, other=-1)
    else:
        shifted = wide - START
        local = tl.where((shifted >= 0) & (shifted < E), shifted, -1).to(tl.int32)
    if HAS_VALID:
        local = tl.where(slot // TOP_K < tl.load(num_valid), local, -1)
    return tl.where(in_range, local, -1)


@triton.jit(do_not_specialize=["S", "E", "START", "MAP_SIZE"])
def _count(
    ids, expert_map, num_valid, local_ids, hist, amax, S, E, START, MAP_SIZE,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr, HAS_VALID: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    in_range = slot < S
    local = _local_ids(ids, expert_map, num_valid, slot, in_range, E, START, MAP_SIZE, TOP_K, HAS_MAP, HAS_VALID)
    tl.store(local_ids + slot, local, mask=in_range)
    counts = tl.histogram(tl.where(local >= 0, local, 0), BINS, mask=local >= 0)
    tl.store(hist + chunk * BINS + tl.arange(0, BINS), counts)
    if chunk == 0:
        tl.store(amax + tl.arange(0, 2), tl.zeros((2,), tl.float32))


@triton.jit(do_not_specialize=["S", "num_rows", "num_row_tiles", "CHUNKS"])
def _place(
    local_ids, hist, row_slot, tile_expert, num_tiles, S, num_rows, num_row_tiles, CHUNKS,
    BINS: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for first in range(0, CHUNKS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        part = tl.load(hist + c[:, None] * BINS + bins[None, :], mask=(c < CHUNKS)[:, None], other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((c < chunk)[:, None], part, 0), axis=0)
    _rows_of_chunk(
        local_ids, row_slot, tile_expert, num_tiles, S, num_rows, num_row_tiles, chunk, total, before,
        CHUNKS, BINS, CHUNK, P,
    )  # fmt: skip


@triton.jit
def _rows_of_chunk(
    local_ids, row_slot, tile_expert, num_tiles, S, num_rows, num_row_tiles, chunk, total, before, CHUNKS,
    BINS: tl.constexpr, CHUNK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write the rows of one chunk, and this program's share of the padding and of the tile map."""
    bins = tl.arange(0, BINS)
    tiles = (total + P - 1) // P
    tile_end = tl.cumsum(tiles, 0)
    tile_start = tile_end - tiles
    row_start = tile_start * P
    used_tiles = tl.sum(tiles, 0)

    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    local = tl.load(local_ids + slot, mask=slot < S, other=-1)
    rank = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, _COLUMN):
        other = chunk * CHUNK + first + tl.arange(0, _COLUMN)
        other_local = tl.load(local_ids + other, mask=other < S, other=-1)
        same = (other_local[None, :] == local[:, None]) & (other[None, :] < slot[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)
    offset = tl.gather(row_start + before, tl.where(local >= 0, local, 0), 0)
    tl.store(row_slot + offset + rank, slot, mask=local >= 0)

    # Padding at the end of each expert's last tile; programs take experts in turn.
    for first in range(0, P, 16):
        lane = first + tl.arange(0, 16)
        pad = row_start[:, None] + total[:, None] + lane[None, :]
        mask = (pad < (row_start + tiles * P)[:, None]) & (bins % CHUNKS == chunk)[:, None]
        tl.store(row_slot + pad, tl.full((BINS, 16), -1, tl.int32), mask=mask)
    # Rows and tiles beyond the last.
    for first in range(chunk * _FILL, num_rows, CHUNKS * _FILL):
        row = first + tl.arange(0, _FILL)
        mask = (row >= used_tiles * P) & (row < num_rows)
        tl.store(row_slot + row, tl.full((_FILL,), -1, tl.int32), mask=mask)
    for first in range(chunk * _COLUMN, num_row_tiles, CHUNKS * _COLUMN):
        tile = first + tl.arange(0, _COLUMN)
        expert = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        tl.store(tile_expert + tile, tl.where(tile < used_tiles, expert, -1), mask=tile < num_row_tiles)
    if chunk == 0:
        tl.store(num_tiles, used_tiles)


@triton.jit(do_not_specialize=["S", "E", "START", "MAP_SIZE", "num_rows", "num_row_tiles"])
def _route_one_chunk(
    ids, expert_map, num_valid, local_ids, amax, row_slot, tile_expert, num_tiles,
    S, E, START, MAP_SIZE, num_rows, num_row_tiles,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr, HAS_VALID: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, CHUNK)
    in_range = slot < S
    local = _local_ids(ids, expert_map, num_valid, slot, in_range, E, START, MAP_SIZE, TOP_K, HAS_MAP, HAS_VALID)
    tl.store(local_ids + slot, local, mask=in_range)
    tl.store(amax + tl.arange(0, 2), tl.zeros((2,), tl.float32))
    total = tl.histogram(tl.where(local >= 0, local, 0), BINS, mask=local >= 0)
    tl.debug_barrier()  # the ids stored above are read by other threads below
    _rows_of_chunk(
        local_ids, row_slot, tile_expert, num_tiles, S, num_rows, num_row_tiles, 0, total, total * 0,
        1, BINS, CHUNK, P,
    )  # fmt: skip


@dataclass(frozen=True)
class RoutingBuffers:
    """Tables of one call, int32; sizes are the capacity bound for T tokens and row tile P.

    Attributes:
        local_ids: ``[S]`` local expert of each slot, -1 where dropped.
        tiles: the schedule.
        hist: ``[chunks, bins]`` scratch.
        amax: fp32 ``[2]``, set to zero here for the stages that take a maximum over the batch.
    """

    local_ids: Tensor
    tiles: TileMap
    hist: Tensor
    amax: Tensor


def chunk_size(slots: int) -> int:
    """Slots of a chunk: ranking costs its square, reading the histograms the square of the number of chunks."""
    if slots <= SMALL_CHUNK:
        return SMALL_CHUNK
    return CHUNK if slots <= _MANY_SLOTS else LARGE_CHUNK


def histogram_size(slots: int, num_experts: int) -> int:
    """int32 elements of scratch that any call of up to ``slots`` slots needs."""
    chunks = max(triton.cdiv(min(slots, _MANY_SLOTS), CHUNK), triton.cdiv(slots, LARGE_CHUNK))
    return chunks * num_bins(num_experts)


def num_bins(num_experts: int) -> int:
    """Histogram bins: a power of two that holds every expert."""
    return max(32, triton.next_power_of_2(num_experts))


def route(
    topk_ids: Tensor,
    num_experts: int,
    row_tile: int,
    buffers: RoutingBuffers,
    *,
    start: int = 0,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
) -> None:
    """Fill ``buffers`` for ``topk_ids [T, k]`` (int32 or int64, global): see :mod:`dsv4.ops.routing`."""
    slots = topk_ids.numel()
    rows = capacity(slots, num_experts, row_tile)
    bins = num_bins(num_experts)
    chunk = chunk_size(slots)
    chunks = triton.cdiv(slots, chunk)
    tiles = buffers.tiles
    flags = {
        "TOP_K": topk_ids.shape[1],
        "HAS_MAP": expert_map is not None,
        "HAS_VALID": num_valid_tokens is not None,
        "BINS": bins,
    }
    unused = buffers.hist
    source = (
        topk_ids,
        expert_map if expert_map is not None else unused,
        num_valid_tokens if num_valid_tokens is not None else unused,
        buffers.local_ids,
    )
    sizes = (slots, num_experts, start, expert_map.shape[0] if expert_map is not None else 0)
    if chunks == 1:
        _route_one_chunk[(1,)](
            *source, buffers.amax, tiles.row_slot, tiles.tile_expert, tiles.num_tiles,
            *sizes, rows, rows // row_tile,
            **flags, CHUNK=chunk, P=row_tile, num_warps=8,
        )  # fmt: skip
        return
    _count[(chunks,)](*source, buffers.hist, buffers.amax, *sizes, **flags, CHUNK=chunk, num_warps=4)
    _place[(chunks,)](
        buffers.local_ids, buffers.hist, tiles.row_slot, tiles.tile_expert, tiles.num_tiles, slots, rows,
        rows // row_tile, chunks, BINS=bins, CHUNK=chunk, P=row_tile, BLOCK_C=8, num_warps=8,
    )  # fmt: skip
