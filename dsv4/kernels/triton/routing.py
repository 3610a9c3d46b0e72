"""Routing on the device: the counting sort of :mod:`dsv4.ops.routing`, in one launch or two.

Slots are cut into chunks, one for each program. What a program must know of the others is two histograms: of all slots
(rows of expert e begin after the padded rows of lower experts) and of the slots before its chunk (its rows begin there
after those of earlier chunks). Up to ``ONE_LAUNCH_SLOTS`` every program counts them itself, reading all the ids: they
are few, and a second launch costs more. Beyond, a first launch writes each chunk's histogram. Within a chunk a slot's
rank is the number of earlier slots with its expert, counted by comparing. No atomics on global memory: the order is
that of the slots.

Every call writes the whole of every table that is read later: padding rows and tiles get their -1 here, so that nothing
has to be cleared first.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dsv4.config import capacity
from dsv4.kernels.triton.grouped_gemm import TileMap

ONE_LAUNCH_SLOTS = 1024
_MANY_SLOTS = 16384
_SMALL_CHUNK, _CHUNK, _LARGE_CHUNK = 16, 128, 256
_SMALL_BLOCK, _BLOCK = 128, 512
"""Slots that a program counts at a time in one launch: each number is a kernel to compile."""

_HISTOGRAM_TILE = 4096
_FILL = tl.constexpr(1024)


@triton.jit
def local_expert_ids(
    ids, expert_map, num_valid, slot, S, E, START, MAP_SIZE, HAS_VALID,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr,
):  # fmt: skip
    """Local ids of some slots, -1 where dropped or beyond the last; ``HAS_VALID`` is 1 or 0."""
    in_range = slot < S
    wide = tl.load(ids + slot, mask=in_range, other=-1).to(tl.int64)
    if HAS_MAP:
        known = (wide >= 0) & (wide < MAP_SIZE)
        local = tl.load(expert_map + wide, mask=known & in_range, other=-1)
    else:
        shifted = wide - START
        local = tl.where((shifted >= 0) & (shifted < E), shifted, -1).to(tl.int32)
    # Not a constant: with it, every kernel that routes would be compiled twice.
    valid = tl.load(num_valid, mask=HAS_VALID != 0, other=0x7FFFFFFF)
    local = tl.where(slot // TOP_K < valid, local, -1)
    return tl.where(in_range, local, -1)


@triton.jit
def _histogram(local, keep, BINS: tl.constexpr):
    return tl.histogram(tl.where(keep, local, 0), BINS, mask=keep)


@triton.jit
def tiles_of_group(tiles, GROUP):
    """Of an expert with so many tiles: as few groups of up to ``GROUP`` as hold them, of one size but the last."""
    groups = (tiles + GROUP - 1) // GROUP
    return tl.maximum((tiles + groups - 1) // tl.maximum(groups, 1), 1)


# ``num_valid`` is one number, often out of a larger buffer: no kernel of its own for each alignment.
@triton.jit(
    do_not_specialize=["S", "E", "START", "MAP_SIZE", "HAS_VALID"], do_not_specialize_on_alignment=["num_valid"]
)
def _count(
    ids, expert_map, num_valid, hist, S, E, START, MAP_SIZE, HAS_VALID,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr,
    BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    local = local_expert_ids(ids, expert_map, num_valid, slot, S, E, START, MAP_SIZE, HAS_VALID, TOP_K, HAS_MAP)
    tl.store(hist + chunk * BINS + tl.arange(0, BINS), _histogram(local, local >= 0, BINS))


@triton.jit(
    do_not_specialize=["S", "E", "START", "MAP_SIZE", "HAS_VALID", "num_rows", "num_row_tiles", "chunks", "GROUP"],
    do_not_specialize_on_alignment=["num_valid"],
)
def _place(
    ids,  # i32 or i64 [S]
    expert_map,  # i32 [MAP_SIZE]
    num_valid,  # i32 [1]
    hist,  # i32 [chunks, BINS]
    local_ids,  # i32 [S]
    amax,  # f32 [2]
    row_slot,  # i32 [num_rows]
    tile_expert,  # i32 [num_row_tiles]
    num_tiles,  # i32 [1]
    slot_row,  # i32 [S]; this and the next six if HAS_GROUPS
    tile_start,  # i32 [num_row_tiles]
    tile_rows,  # i32 [num_row_tiles]
    group_row,  # i32 [groups + 1]
    group_expert,  # i32 [groups]
    num_groups,  # i32 [1]
    taken,  # i32 [2]
    S,
    E,
    START,
    MAP_SIZE,
    HAS_VALID,
    num_rows,
    num_row_tiles,
    chunks,
    GROUP,  # most tiles of a row group
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_HIST: tl.constexpr,  # else count here
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,  # slots, or with HAS_HIST chunks, counted at a time
    OWN: tl.constexpr,  # experts whose padding a program writes at a time
    P: tl.constexpr,
    PAD_LANES: tl.constexpr,  # rows of padding written at a time
    TILE_LANES: tl.constexpr,
):
    chunk = tl.program_id(0)
    begin = chunk * CHUNK
    bins = tl.arange(0, BINS)
    if HAS_HIST:
        sums = tl.zeros((BLOCK, BINS), tl.int32)
        earlier = tl.zeros((BLOCK, BINS), tl.int32)
        for first in tl.range(0, chunks, BLOCK, loop_unroll_factor=4):
            c = first + tl.arange(0, BLOCK)[:, None]
            counts = tl.load(hist + c * BINS + bins[None, :], mask=c < chunks, other=0)
            sums += counts
            earlier += tl.where(c < chunk, counts, 0)
        total = tl.sum(sums, axis=0)
        before = tl.sum(earlier, axis=0)
    else:
        total = tl.zeros((BINS,), tl.int32)
        before = tl.zeros((BINS,), tl.int32)
        for first in range(0, S, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            local = local_expert_ids(ids, expert_map, num_valid, slot, S, E, START, MAP_SIZE, HAS_VALID, TOP_K, HAS_MAP)
            counts = _histogram(local, local >= 0, BINS)
            total += counts
            if first + BLOCK <= begin:
                before += counts
            elif first < begin:
                before += _histogram(local, (local >= 0) & (slot < begin), BINS)

    tiles = (total + P - 1) // P
    tile_end = tl.cumsum(tiles, 0)
    row_start = (tile_end - tiles) * P
    used_tiles = tl.sum(tiles, 0)

    in_chunk = tl.arange(0, CHUNK)
    mine = begin + in_chunk
    own_local = local_expert_ids(ids, expert_map, num_valid, mine, S, E, START, MAP_SIZE, HAS_VALID, TOP_K, HAS_MAP)
    served = own_local >= 0
    # Earlier slots along axis 0, so that a thread sums its own and no shuffles are needed.
    same = (own_local[:, None] == own_local[None, :]) & (in_chunk[:, None] < in_chunk[None, :])
    rank = tl.sum(same.to(tl.int32), axis=0)
    row = tl.gather(row_start + before, tl.where(served, own_local, 0), 0) + rank
    tl.store(local_ids + mine, own_local, mask=mine < S)
    tl.store(row_slot + row, mine, mask=served)
    tl.store(tile_expert + row // P, own_local, mask=served & (row % P == 0))  # each tile has one first row
    if HAS_GROUPS:
        tl.store(slot_row + mine, tl.where(served, row, -1), mask=mine < S)
        groups = (tiles + GROUP - 1) // GROUP
        group_end = tl.cumsum(groups, 0)
        if chunk == 0:
            used_groups = tl.sum(groups, 0)
            tl.store(num_groups, used_groups)
            tl.store(group_row + used_groups, used_tiles * P)
            tl.store(taken + tl.arange(0, 2), tl.zeros((2,), tl.int32))

    # Of a program's share of the experts: padding at the end of the last tile, and groups.
    share = (BINS + chunks - 1) // chunks
    for first_own in range(0, share, OWN):
        lane = first_own + tl.arange(0, OWN)
        own = chunk * share + lane
        real_expert = (lane < share) & (own < BINS)
        expert = tl.where(real_expert, own, 0)
        pad_start = tl.gather(row_start + total, expert, 0)
        pad_end = tl.where(real_expert, tl.gather(tile_end * P, expert, 0), 0)
        for first in range(0, P, PAD_LANES):
            pad = pad_start[:, None] + first + tl.arange(0, PAD_LANES)[None, :]
            tl.store(row_slot + pad, tl.full((OWN, PAD_LANES), -1, tl.int32), mask=pad < pad_end[:, None])
        if HAS_GROUPS:
            first_tile = tl.gather(tile_end - tiles, expert, 0)[:, None]
            first_group = tl.gather(group_end - groups, expert, 0)[:, None]
            count = tl.where(real_expert, tl.gather(tiles, expert, 0), 0)
            size = tiles_of_group(count, GROUP)
            most = tl.max(count, 0)
            count, size, owner = count[:, None], size[:, None], expert[:, None]
            for first in range(0, most, TILE_LANES):
                tile = first + tl.arange(0, TILE_LANES)[None, :]
                real = tile < count
                group = tile // size
                start = (first_tile + group * size) * P
                tl.store(tile_start + first_tile + tile, start, mask=real)
                tl.store(tile_rows + first_tile + tile, tl.minimum(size, count - group * size) * P, mask=real)
                head = real & (tile % size == 0)
                tl.store(group_row + first_group + group, start, mask=head)
                tl.store(group_expert + first_group + group, owner + tl.zeros_like(tile), mask=head)
    # Rows and tiles beyond the last.
    for first in range(used_tiles * P + chunk * _FILL, num_rows, chunks * _FILL):
        unused = first + tl.arange(0, _FILL)
        tl.store(row_slot + unused, tl.full((_FILL,), -1, tl.int32), mask=unused < num_rows)
    for first in range(used_tiles + chunk * _FILL, num_row_tiles, chunks * _FILL):
        unused = first + tl.arange(0, _FILL)
        tl.store(tile_expert + unused, tl.full((_FILL,), -1, tl.int32), mask=unused < num_row_tiles)
    if chunk == 0:
        tl.store(num_tiles, used_tiles)
        tl.store(amax + tl.arange(0, 2), tl.zeros((2,), tl.float32))


@dataclass(frozen=True)
class RowGroups:
    """The tiles of an expert put together, up to a number of rows: what a GEMM multiplies at a time.

    Attributes:
        rows: the most rows of a group, a multiple of the row tile.
        slot_row: int32 ``[S]``, row of each slot, -1 where dropped.
        tile_start: int32 ``[R / P]``, first row of each row tile's group, valid up to ``num_tiles``.
        tile_rows: int32 ``[R / P]``, number of rows of that group.
        group_row: int32 ``[groups + 1]``, first row of each group and, after the last, the number of rows.
        group_expert: int32 ``[groups]``.
        num_groups: int32 ``[1]``.
        taken: int32 ``[2]``, for each of the two products how often a program has asked for another output tile than
            its first: set to zero here, counted by the products where they have more tiles than programs.
    """

    rows: int
    slot_row: Tensor
    tile_start: Tensor
    tile_rows: Tensor
    group_row: Tensor
    group_expert: Tensor
    num_groups: Tensor
    taken: Tensor

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """As kernels take them."""
        return (
            self.slot_row, self.tile_start, self.tile_rows, self.group_row, self.group_expert, self.num_groups,
            self.taken,
        )  # fmt: skip


@dataclass(frozen=True)
class RoutingBuffers:
    """Tables of one call, int32; sizes are the capacity bound for T tokens and row tile P.

    Attributes:
        local_ids: ``[S]`` local expert of each slot, -1 where dropped.
        tiles: the schedule.
        hist: ``[chunks, bins]`` scratch.
        amax: fp32 ``[2]``, set to zero here for the stages that take a maximum over the batch.
        groups: filled if given.
    """

    local_ids: Tensor
    tiles: TileMap
    hist: Tensor
    amax: Tensor
    groups: RowGroups | None = None


@dataclass(frozen=True)
class RoutingConfig:
    """How a call is cut up.

    Attributes:
        chunk: slots of a program.
        block: slots, or chunks where ``count_first``, that it counts at a time; a power of two.
        count_first: a launch of its own writes the histograms.
        num_warps: of the launch that places.
    """

    chunk: int
    block: int
    count_first: bool
    num_warps: int = 4

    @classmethod
    def of(cls, slots: int, bins: int) -> RoutingConfig:
        """For a call of so many slots and histogram bins.

        Measured on an H200, 256 experts, top-6, microseconds in kernels, as ``RoutingConfig`` and warps, when each
        power of two of slots and of experts a program had a kernel of its own:
          T = 1, 16, 64, one launch: chunks of 16 slots 2.0, 2.0, 2.5; of 32 2.3, 2.1, 2.6; of 64 3.1, 3.1, 3.5. With
          two warps 3.0, 2.8, 4.0; with eight 2.3, 2.5, 2.8.
          T = 256: one launch, 32 slots 4.4; two launches, 128 slots 4.0, with eight warps 8.0.
          T = 1024, 2048: two launches, 128 slots 4.9, 5.9; 256 slots 7.2, 7.5; one launch 8.7, 18.
          T = 8192: 256 slots 11.8, with eight warps 13.4, with sixteen 239; 512 slots 18.7.
        """
        if slots <= ONE_LAUNCH_SLOTS:
            return cls(_SMALL_CHUNK, _SMALL_BLOCK if slots <= _SMALL_BLOCK else _BLOCK, False)
        return cls(_CHUNK if slots <= _MANY_SLOTS else _LARGE_CHUNK, max(1, _HISTOGRAM_TILE // bins), True)

    @property
    def own(self) -> int:
        """Experts whose padding and groups a program writes at a time: with few programs each has many."""
        return 16 if self.count_first else 64


def histogram_size(slots: int, num_experts: int) -> int:
    """int32 elements of scratch that any call of up to ``slots`` slots needs."""
    chunks = max(triton.cdiv(min(slots, _MANY_SLOTS), _CHUNK), triton.cdiv(slots, _LARGE_CHUNK))
    return chunks * num_bins(num_experts) if slots > ONE_LAUNCH_SLOTS else 0


def num_bins(num_experts: int) -> int:
    """Histogram bins: a power of two that holds every expert."""
    return max(32, triton.next_power_of_2(num_experts))


def id_arguments(
    topk_ids: Tensor,
    num_experts: int,
    start: int,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    unused: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, int]]:
    """Tensors, sizes and constants from which a kernel makes :func:`local_expert_ids`; ``unused`` stands for none."""
    tensors = (
        topk_ids,
        expert_map if expert_map is not None else unused,
        num_valid_tokens if num_valid_tokens is not None else unused,
    )
    map_size = expert_map.shape[0] if expert_map is not None else 0
    sizes = (topk_ids.numel(), num_experts, start, map_size, int(num_valid_tokens is not None))
    flags = {"TOP_K": topk_ids.shape[1], "HAS_MAP": expert_map is not None}
    return tensors, sizes, flags


def route(
    topk_ids: Tensor,
    num_experts: int,
    row_tile: int,
    buffers: RoutingBuffers,
    *,
    start: int = 0,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    config: RoutingConfig | None = None,
) -> None:
    """Fill ``buffers`` for ``topk_ids [T, k]`` (int32 or int64, global): see :mod:`dsv4.ops.routing`.

    ``config`` replaces the one that fits the number of slots; its scratch must fit ``buffers.hist``.
    """
    slots = topk_ids.numel()
    rows = capacity(slots, num_experts, row_tile)
    bins = num_bins(num_experts)
    config = config or RoutingConfig.of(slots, bins)
    chunks = triton.cdiv(slots, config.chunk)
    unused = buffers.local_ids
    ids, sizes, flags = id_arguments(topk_ids, num_experts, start, expert_map, num_valid_tokens, unused)
    hist = buffers.hist if config.count_first else unused
    if config.count_first:
        _count[(chunks,)](*ids, hist, *sizes, **flags, BINS=bins, CHUNK=config.chunk, num_warps=4)
    tiles, groups = buffers.tiles, buffers.groups
    grouped = groups.tables if groups is not None else (unused,) * 7
    _place[(chunks,)](
        *ids, hist, buffers.local_ids, buffers.amax, tiles.row_slot, tiles.tile_expert, tiles.num_tiles,
        *grouped, *sizes, rows, rows // row_tile, chunks, groups.rows // row_tile if groups is not None else 1,
        **flags, HAS_GROUPS=groups is not None, BINS=bins, CHUNK=config.chunk, HAS_HIST=config.count_first,
        BLOCK=config.block, OWN=config.own, P=row_tile,
        PAD_LANES=min(row_tile, 16),
        # A program that writes for all experts has many of them and few slots: an expert's tiles are one or two.
        TILE_LANES=16 if config.count_first else 2, num_warps=config.num_warps,
    )  # fmt: skip
