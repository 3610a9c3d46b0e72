"""Calls of few slots, in Triton: routed, and their tokens scattered to images, in one launch.

Every program compares slots with each other and so finds its own row, where otherwise counts and sums go from launch to
launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.hopper.config import COMPARED_SLOTS, FEW_SLOTS
from dsv4.kernels.hopper.stages import load_token, put_row
from dsv4.kernels.triton.routing import RoutingBuffers, id_arguments, local_expert_ids, tiles_of_group
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _of_slot(values, slot, mine):
    """One element of a vector."""
    return tl.sum(tl.where(slot == mine, values, 0), 0)


@triton.jit
def _stand(rank, tiles, first_tile, P: tl.constexpr, GROUP: tl.constexpr):
    """``(row, first row of its group, rows of the group)`` of a slot: the ``rank``-th of an expert with so many row
    tiles, the first of which is ``first_tile``."""
    size = tiles_of_group(tiles, GROUP)
    group = rank // P // size
    return first_tile * P + rank, (first_tile + group * size) * P, tl.minimum(size, tiles - group * size) * P


@triton.jit(
    do_not_specialize=["S", "E", "START", "MAP_SIZE", "HAS_VALID", "num_rows", "num_row_tiles"],
    do_not_specialize_on_alignment=["num_valid"],
)
def _route_and_scatter(
    ids,  # i32 or i64 [S]
    expert_map,  # i32 [MAP_SIZE]
    num_valid,  # i32 [1]
    local_ids, amax, row_slot, tile_expert, num_tiles,  # see RoutingBuffers, TileMap
    slot_row, tile_start, tile_rows, group_row, group_expert, num_groups, taken,  # see RowGroups
    x, weights, scale, image, row_scale,  # see stages._scatter_rows
    S, E, START, MAP_SIZE, HAS_VALID, num_rows, num_row_tiles, K,
    TOP_K: tl.constexpr, HAS_MAP: tl.constexpr,
    SLOTS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    SOURCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program for each slot, and one that writes the tables. All compare slots with each other: of an expert's slots,
    every P-th begins a row tile, and every P * GROUP-th stands for a row group, so that sums over the slots of lower
    experts tell where an expert begins."""
    if DEPENDENT:
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
        first_tile = tl.sum((lower & opens_tile[:, None]).to(tl.int32), 0)
        first_group = tl.sum((lower & opens_group[:, None]).to(tl.int32), 0)
        row, start, rows = _stand(rank, tiles, first_tile, P, GROUP)
        size = tiles_of_group(tiles, GROUP)
        group = first_group + rank // P // size
        head = served & (rank % (size * P) == 0)  # where a row group begins
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
    dependent: bool = False,
) -> None:
    """Routing (:mod:`dsv4.kernels.triton.routing`) and :func:`dsv4.kernels.hopper.stages.scatter_rows` in one launch.

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
        dependent: launches overlap (Hopper and later): this one starts before the one before it has ended, and the
            next may start before this one has.

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
    compared = next(number for number in COMPARED_SLOTS if slots <= number)
    # Of many slots two warps are faster (T = 8, V4-Flash 159.5 for 162.3 us, V4-Pro 401.7 for 403.5), unless a row that
    # is quantized is too long for their registers.
    fits = source is ScaleSource.NONE or blocks <= 64
    _route_and_scatter[(slots + 1,)](
        *ids, buffers.local_ids, buffers.amax, tiles.row_slot, tiles.tile_expert, tiles.num_tiles, *groups.tables, x,
        weights if weights is not None else row_scale, scale if scale is not None else row_scale, image, row_scale,
        *sizes, tiles.row_slot.shape[0], tiles.tile_expert.shape[0], k, **flags,
        SLOTS=compared, P=unit, GROUP=groups.rows // unit, SOURCE=int(source), HAS_WEIGHT=weights is not None,
        BLOCKS=blocks, DEPENDENT=dependent, num_warps=2 if compared == FEW_SLOTS and fits else 4,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
