"""Calls of few slots, in Triton: routed, and their tokens scattered to images, in one launch.

Every program compares slots with each other and so finds its own row, where otherwise counts and sums go from launch to
launch. Other programs of the same launch fetch the weights that the product behind it reads first to the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.hopper.config import FEW_SLOTS, FEWEST_SLOTS
from dsv4.kernels.hopper.layout import BLOCK_BYTES
from dsv4.kernels.hopper.stages import load_token, put_row
from dsv4.kernels.triton.routing import RoutingBuffers, id_arguments, local_expert_ids, tiles_of_group
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _of_slot(values, slot, mine):
    """One element of a vector."""
    return tl.sum(tl.where(slot == mine, values, 0), 0)


_PIECE = BLOCK_BYTES // 4
_PIECES, _FETCHED_TILES, _FETCHED_PIECES = 32, 768, 12288
"""Weights are fetched in pieces of 1152 bytes: up to so many of a 64-row tile, of so many tiles, and so many in all.

That is 14 MB, which memory delivers in the 3 us that routing and scattering take; the tiles are those of the programs
that GEMM 1 begins with."""


@triton.jit
def _first_weights(
    program, order, local, head, row_tiles, tiles, pieces, expert_bytes, run_bytes,
    PIECE: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of each lane, the byte from which on it fetches, and whether there is anything; a program takes ``TILES`` tiles.

    Tiles are numbered as GEMM 1 takes them: row group by row group, ``row_tiles`` in each; ``pieces`` from the
    beginning of each are fetched, of ``tiles`` in all. ``order`` is the number of a slot's row group, and ``head``
    whether the slot is the first there.
    """
    lane = tl.arange(0, TILES * PIECES)
    piece = lane % PIECES
    tile = program * TILES + lane // PIECES
    expert = tl.full((TILES * PIECES,), -1, tl.int32)
    for i in tl.static_range(TILES):
        group = (program * TILES + i) // row_tiles
        one = tl.sum(tl.where(head & (order == group), local + 1, 0), 0) - 1
        expert = tl.where(lane // PIECES == i, one, expert)
    at = expert.to(tl.int64) * expert_bytes + (tile % row_tiles).to(tl.int64) * run_bytes + piece * PIECE
    return at, (expert >= 0) & (piece < pieces) & (tile < tiles)


@triton.jit
def _fetch(address, mask, PIECE: tl.constexpr):
    """From memory to the L2 cache, without waiting."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            setp.ne.u32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $3;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r",
        [address, mask.to(tl.int32), tl.full(mask.shape, PIECE, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _stand(rank, tiles, first_tile, P: tl.constexpr, GROUP: tl.constexpr):
    """``(row, first row of its group, rows of the group)`` of a slot: the ``rank``-th of an expert with so many row
    tiles, the first of which is ``first_tile``."""
    size = tiles_of_group(tiles, GROUP)
    group = rank // P // size
    return first_tile * P + rank, (first_tile + group * size) * P, tl.minimum(size, tiles - group * size) * P


@triton.jit(
    do_not_specialize=[
        "S",
        "E",
        "START",
        "MAP_SIZE",
        "HAS_VALID",
        "num_rows",
        "num_row_tiles",
        "expert_bytes",
        "run_bytes",
        "row_tiles",
        "fetched_tiles",
        "pieces",
    ],
    do_not_specialize_on_alignment=["num_valid"],
)
def _route_and_scatter(
    ids,  # i32 or i64 [S]
    expert_map,  # i32 [MAP_SIZE]
    num_valid,  # i32 [1]
    local_ids, amax, row_slot, tile_expert, num_tiles,  # see RoutingBuffers, TileMap
    slot_row, tile_start, tile_rows, group_row, group_expert, num_groups, taken,  # see RowGroups
    x, weights, scale, image, row_scale,  # see stages._scatter_rows
    experts,  # u8, if FETCH
    S, E, START, MAP_SIZE, HAS_VALID, num_rows, num_row_tiles, expert_bytes, run_bytes, row_tiles, fetched_tiles,
    pieces, K,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr,
    SLOTS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    SOURCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCKS: tl.constexpr, FETCH: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program for each slot, one that writes the tables, and with ``FETCH`` more, which fetch weights while launches
    overlap. All compare slots with each other: of an expert's slots, every P-th begins a row tile, and every
    P * GROUP-th stands for a row group, so that sums over the slots of lower experts tell where an expert begins."""
    if FETCH:
        # The next launch waits for this one before it reads anything, and this one for the one before it.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mine = tl.program_id(0)
    token = tl.minimum(mine, S - 1) // TOP_K
    pairs, here = load_token(x, token, K, BLOCKS)
    slot = tl.arange(0, SLOTS)
    local = local_expert_ids(ids, expert_map, num_valid, slot, S, E, START, MAP_SIZE, HAS_VALID, TOP_K, HAS_MAP)
    served = local >= 0
    # Along the second dimension a slot, along the first those that it is compared with.
    same = (local[:, None] == local[None, :]) & served[None, :]
    rank = tl.sum((same & (slot[:, None] < slot[None, :])).to(tl.int32), 0)
    opens_tile = served & (rank % P == 0)
    opens_group = served & (rank % (P * GROUP) == 0)

    if mine < S:
        expert = _of_slot(local, slot, mine)
        if expert >= 0:
            tiles = (tl.sum((local == expert).to(tl.int32), 0) + P - 1) // P
            first_tile = tl.sum((opens_tile & (local < expert)).to(tl.int32), 0)
            row, start, rows = _stand(_of_slot(rank, slot, mine), tiles, first_tile, P, GROUP)
            put_row(
                pairs, here, weights, scale, token, row, start, rows, expert, image, row_scale, K, SOURCE, HAS_WEIGHT,
                BLOCKS,
            )  # fmt: skip
    else:
        # The same for all slots at once.
        count = tl.sum(same.to(tl.int32), 0)
        tiles = (count + P - 1) // P
        lower = local[:, None] < local[None, :]
        first_group = tl.sum((lower & opens_group[:, None]).to(tl.int32), 0)
        size = tiles_of_group(tiles, GROUP)
        group = first_group + rank // P // size
        head = served & (rank % (size * P) == 0)  # where a row group begins
        if mine == S:
            first_tile = tl.sum((lower & opens_tile[:, None]).to(tl.int32), 0)
            row, start, rows = _stand(rank, tiles, first_tile, P, GROUP)
            used_tiles, used_groups = tl.sum(opens_tile.to(tl.int32), 0), tl.sum(opens_group.to(tl.int32), 0)
            tl.store(local_ids + slot, local, mask=slot < S)
            tl.store(slot_row + slot, tl.where(served, row, -1), mask=slot < S)
            tl.store(row_slot + row, slot, mask=served)
            tile = first_tile + rank // P
            tl.store(tile_expert + tile, local, mask=opens_tile)
            tl.store(tile_start + tile, start, mask=opens_tile)
            tl.store(tile_rows + tile, rows, mask=opens_tile)
            tl.store(group_row + group, start, mask=head)
            tl.store(group_expert + group, local, mask=head)
            # Padding in each tile, by the slot that opens it (slots with rows write theirs), then what lies beyond.
            pad = tile[:, None] * P + tl.arange(0, P)[None, :]
            empty = opens_tile[:, None] & (rank[:, None] + tl.arange(0, P)[None, :] >= count[:, None])
            tl.store(row_slot + pad, tl.full((SLOTS, P), -1, tl.int32), mask=empty)
            for begin in range(used_tiles * P, num_rows, 128):
                unused = begin + tl.arange(0, 128)
                tl.store(row_slot + unused, tl.full((128,), -1, tl.int32), mask=unused < num_rows)
            for begin in range(used_tiles, num_row_tiles, 128):
                unused = begin + tl.arange(0, 128)
                tl.store(tile_expert + unused, tl.full((128,), -1, tl.int32), mask=unused < num_row_tiles)
            tl.store(num_tiles, used_tiles)
            tl.store(num_groups, used_groups)
            tl.store(group_row + used_groups, used_tiles * P)
            tl.store(taken + tl.arange(0, 2), tl.zeros((2,), tl.int32))
            tl.store(amax + tl.arange(0, 2), tl.zeros((2,), tl.float32))
        elif FETCH:
            at, fetched = _first_weights(
                mine - S - 1, group, local, head, row_tiles, fetched_tiles, pieces, expert_bytes, run_bytes, PIECE,
                PIECES, TILES,
            )  # fmt: skip
            _fetch(experts.to(tl.int64) + at, fetched, PIECE)


def route_and_scatter(
    topk_ids: Tensor,
    x: Tensor,
    buffers: RoutingBuffers,
    image: Tensor,
    row_scale: Tensor,
    num_experts: int,
    unit: int,
    *,
    source: ScaleSource,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    start: int = 0,
    expert_map: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
    experts: Tensor | None = None,
    row_tiles: int = 1,
) -> None:
    """Routing (:mod:`dsv4.kernels.triton.routing`) and :func:`dsv4.kernels.hopper.stages.scatter_rows` in one launch.

    Memory, which has little else to do meanwhile, fetches the weights that the product behind it reads first.

    Args:
        topk_ids: int32 or int64 ``[T, k]``, global; up to ``FEW_SLOTS`` in all.
        x: bf16 ``[T, K]``, contiguous.
        buffers: filled, row groups included; the histograms are not needed.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``: receives each row's global scale, if quantized.
        num_experts: E.
        unit: rows of a row tile.
        source: of the global scale, not BATCH: its maximum would have to be known.
        scale: what ``source`` reads.
        weights: fp32 ``[T]``, multiplied in before anything else, or None.
        start: first expert's global id.
        expert_map: int32, global to local ids, or None.
        num_valid_tokens: int32 ``[1]``, or None.
        experts: uint8 ``[E, bytes]``, beginning with the matrices of the product that is launched next. With them
            launches overlap (Hopper and later): this one starts before the one before it has ended, and the product
            may start before this one has. None for neither.
        row_tiles: 64s of rows of such a matrix.

    Raises:
        InputError: too many slots, a source that is not served, or no row groups.
    """
    k = x.shape[1]
    slots, groups, tiles = topk_ids.numel(), buffers.groups, buffers.tiles
    if slots > FEW_SLOTS or source is ScaleSource.BATCH or groups is None:
        raise InputError(
            f"route_and_scatter: found {slots} slots, source {source.name}, groups {groups}; expected at most "
            f"{FEW_SLOTS} slots, another source than BATCH, and row groups"
        )
    blocks = triton.next_power_of_2(k // 64)
    ids, sizes, flags = id_arguments(topk_ids, num_experts, start, expert_map, num_valid_tokens, buffers.local_ids)
    fetched = min(slots * row_tiles, _FETCHED_TILES) if experts is not None else 0
    run_bytes = k // 128 * BLOCK_BYTES
    pieces = min(_PIECES, run_bytes // _PIECE, _FETCHED_PIECES // max(fetched, 1))
    tiles_of_program = 4  # a lane for each piece
    _route_and_scatter[(slots + 1 + triton.cdiv(fetched, tiles_of_program),)](
        *ids, buffers.local_ids, buffers.amax, tiles.row_slot, tiles.tile_expert, tiles.num_tiles, *groups.tables, x,
        weights if weights is not None else row_scale, scale if scale is not None else row_scale, image, row_scale,
        experts if experts is not None else row_scale, *sizes, tiles.row_slot.shape[0], tiles.tile_expert.shape[0],
        experts.stride(0) if experts is not None else 0, run_bytes, row_tiles, fetched, pieces, k, **flags,
        SLOTS=FEWEST_SLOTS if slots <= FEWEST_SLOTS else FEW_SLOTS, P=unit, GROUP=groups.rows // unit,
        SOURCE=int(source), HAS_WEIGHT=weights is not None, BLOCKS=blocks, FETCH=experts is not None, PIECE=_PIECE,
        PIECES=_PIECES, TILES=tiles_of_program, num_warps=4, **({"launch_pdl": True} if experts is not None else {}),
    )  # fmt: skip
