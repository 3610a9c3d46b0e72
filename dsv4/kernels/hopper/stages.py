"""Rows to images, and images quantized in place, in Triton: the operands of :mod:`dsv4.kernels.hopper.grouped_gemm`.

A row group's image is ``[K/64][rows][64]`` bf16 and begins at its first row times K; rows that no slot fills keep what
they hold, since a row of the product depends on its own row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.hopper.config import FEW_SLOTS, FEWEST_SLOTS
from dsv4.kernels.hopper.layout import BLOCK_BYTES
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import block_scales, global_scale, largest_magnitude, quantize_values
from dsv4.kernels.triton.routing import RoutingBuffers, RowGroups, id_arguments, local_expert_ids, tiles_of_group
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _places(row, start, rows, K, BLOCKS: tl.constexpr):
    """Pairs of values of a row, ``[chunk, BLOCKS, lane]``: where in the image of ``rows`` rows from ``start``.

    The 16-byte chunks of a 128-byte line are swizzled as wgmma reads them. They come first, since Triton gives
    neighbouring threads the first dimension of those that it does not find contiguous: so a warp's instruction writes
    whole lines.
    """
    chunk = tl.arange(0, 8)[:, None, None]
    block = tl.arange(0, BLOCKS)[None, :, None]
    lane = tl.arange(0, 4)[None, None, :]
    inside = row - start
    line = start.to(tl.int64) * (K // 2) + (block * rows + inside) * 32
    return line + (chunk ^ (inside % 8)) * 4 + lane


@triton.jit
def _split(pairs):
    """Two bf16 a word -> two fp32."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _join(low, high):
    """Two fp32 that bf16 holds -> a word."""
    return (low.to(tl.uint32, bitcast=True) >> 16) | (high.to(tl.uint32, bitcast=True) & 0xFFFF0000)


@triton.jit
def _group_amax(low, high):
    """Of scale groups, ``[1, BLOCKS, 4]``: a lane's sixteen values of a block."""
    both = tl.join(low, high)
    return largest_magnitude(largest_magnitude(both, 3), 0)[None, :, :]


@triton.jit
def _finite_amax(amax):
    """Of all groups, 0 if one holds a NaN or Inf."""
    row_amax = largest_magnitude(largest_magnitude(largest_magnitude(amax, 2), 1), 0)
    return tl.where(row_amax < float("inf"), row_amax, 0.0)


@triton.jit
def _row_scale(amax, scale, expert, SOURCE: tl.constexpr):
    """A row's global scale, from the maxima of its groups or from where ``SOURCE`` says."""
    if SOURCE == 1:
        gs = global_scale(_finite_amax(amax))
    elif SOURCE == 2:
        gs = tl.load(scale)
    elif SOURCE == 3:
        gs = global_scale(tl.load(scale))
    else:
        gs = tl.load(scale + expert)
    return gs


@triton.jit
def _quantized(low, high, amax, gs):
    """``e2m1 * sf`` of a row's pairs under a global scale."""
    divisor, reciprocal, factor = block_scales(amax, gs)
    low = quantize_values(low, divisor, reciprocal, factor).to(tl.bfloat16).to(tl.float32)
    high = quantize_values(high, divisor, reciprocal, factor).to(tl.bfloat16).to(tl.float32)
    return _join(low, high)


@triton.jit
def _load_token(x, token, K, BLOCKS: tl.constexpr):
    """A token's pairs, ``[chunk, BLOCKS, lane]``, and which of them there are.

    A lane's sixteen values of 64 stand together in a row, and are dealt to the chunks two by two.
    """
    chunk = tl.arange(0, 8)[:, None, None]
    block = tl.arange(0, BLOCKS)[None, :, None]
    lane = tl.arange(0, 4)[None, None, :]
    here = block * 64 < K
    source = token.to(tl.int64) * (K // 2) + block * 32 + lane * 8 + chunk
    pairs = tl.load(x.to(tl.pointer_type(tl.uint32)) + source, mask=here & (lane >= 0) & (chunk >= 0), other=0)
    return pairs, here


@triton.jit
def _put_row(
    pairs, here, weights, scale, token, row, start, rows, expert, image, row_scale, K,
    SOURCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A token's pairs at a row, weighted and quantized on the way."""
    if SOURCE != 0 or HAS_WEIGHT:
        low, high = _split(pairs)
        if HAS_WEIGHT:
            weight = tl.load(weights + token)
            low, high = (low * weight).to(tl.bfloat16).to(tl.float32), (high * weight).to(tl.bfloat16).to(tl.float32)
            pairs = _join(low, high)
    if SOURCE != 0:
        amax = _group_amax(low, high)
        gs = _row_scale(amax, scale, expert, SOURCE)
        pairs = _quantized(low, high, amax, gs)
        tl.store(row_scale + row, gs)
    tl.store(image.to(tl.pointer_type(tl.uint32)) + _places(row, start, rows, K, BLOCKS), pairs, mask=here)


@triton.jit
def _scatter_rows(
    x,  # bf16 [T, K]
    weights,  # f32 [T]
    scale,  # f32, by SOURCE
    slot_row, tile_start, tile_rows,
    local_ids,  # i32 [S]
    image,  # bf16
    row_scale,  # f32 [R]
    K,
    SOURCE: tl.constexpr, HAS_WEIGHT: tl.constexpr, TOP_K: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    pairs, here = _load_token(x, token, K, BLOCKS)
    if DEPENDENT:
        # The next launch may begin only now: it believes the tables of routing to be older than this launch.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = token * TOP_K + tl.program_id(1)
    row = tl.load(slot_row + slot)
    if row >= 0:
        start, rows = tl.load(tile_start + row // UNIT), tl.load(tile_rows + row // UNIT)
        expert = tl.load(local_ids + slot)
        _put_row(
            pairs, here, weights, scale, token, row, start, rows, expert, image, row_scale, K, SOURCE, HAS_WEIGHT,
            BLOCKS,
        )  # fmt: skip


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
    x, weights, scale, image, row_scale,  # see _scatter_rows
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
    pairs, here = _load_token(x, token, K, BLOCKS)
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
            _put_row(
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


@triton.jit
def _gather_rows(
    x, x_scale, row_slot, tile_start, tile_rows, num_tiles, image, row_scale, K,
    HAS_SCALE: tl.constexpr, SLOTS_PER_ROW: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Eight rows, whose lines of the same 64 of K are one kilobyte of an image."""
    tile = tl.program_id(0) // (UNIT // 8)
    if tile >= tl.load(num_tiles):
        return
    row = tl.program_id(0) * 8 + tl.arange(0, 8)
    slot = tl.load(row_slot + row)
    start, rows = tl.load(tile_start + tile), tl.load(tile_rows + tile)
    served = slot >= 0
    token = tl.where(served, slot, 0) // SLOTS_PER_ROW
    chunk = tl.arange(0, 8)[:, None, None, None]  # first: see _places
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, None, :, None]
    lane = tl.arange(0, 4)[None, None, None, :]
    inside = (row - start)[None, :, None, None]
    mask = served[None, :, None, None] & (block * 64 < K) & (chunk >= 0) & (lane >= 0)
    source = token.to(tl.int64)[None, :, None, None] * (K // 2) + block * 32 + lane * 8 + chunk
    pairs = tl.load(x.to(tl.pointer_type(tl.uint32)) + source, mask=mask, other=0)
    at = start.to(tl.int64) * (K // 2) + (block * rows + inside) * 32 + (chunk ^ (inside % 8)) * 4 + lane
    tl.store(image.to(tl.pointer_type(tl.uint32)) + at, pairs, mask=mask)
    if HAS_SCALE:
        first = tl.program_id(1) == 0
        tl.store(row_scale + row, tl.load(x_scale + token, mask=served, other=0.0), mask=served & first)


@triton.jit
def _load_row(image, row, tile_start, tile_rows, K, UNIT: tl.constexpr, BLOCKS: tl.constexpr):
    start, rows = tl.load(tile_start + row // UNIT), tl.load(tile_rows + row // UNIT)
    at = image.to(tl.pointer_type(tl.uint32)) + _places(row, start, rows, K, BLOCKS)
    here = (tl.arange(0, BLOCKS) * 64 < K)[None, :, None]
    low, high = _split(tl.load(at, mask=here, other=0))
    return at, here, low, high


@triton.jit
def _quantize_image(
    image, scale, row_slot, tile_expert, tile_start, tile_rows, row_scale, K,
    SOURCE: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        # Every program waits, also one that has nothing to do: this launch must not end before the product that writes
        # the image has. So whoever waits for this launch has waited for that product, and what the product waited for.
        # The next launch may begin once all programs are here: it reads weights, and tables of routing, which are older
        # than the product, before it waits for this launch.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    if tl.load(row_slot + row) < 0:
        return
    at, here, low, high = _load_row(image, row, tile_start, tile_rows, K, UNIT, BLOCKS)
    amax = _group_amax(low, high)
    gs = _row_scale(amax, scale, tl.load(tile_expert + row // UNIT), SOURCE)
    tl.store(at, _quantized(low, high, amax, gs), mask=here)
    tl.store(row_scale + row, gs)


@triton.jit
def _image_amax(
    image, row_slot, tile_start, tile_rows, amax, K,
    OF_BATCH: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(row_slot + row)
    if slot >= 0:
        _, _, low, high = _load_row(image, row, tile_start, tile_rows, K, UNIT, BLOCKS)
        row_amax = _finite_amax(_group_amax(low, high))
        if OF_BATCH:
            tl.atomic_max(amax, row_amax)
        else:
            tl.store(amax + slot, row_amax)


def _whole_rows(k: int) -> dict[str, int]:
    """How a program takes a whole row of K values."""
    blocks = triton.next_power_of_2(k // 64)
    return {"BLOCKS": blocks, "num_warps": max(1, min(8, blocks // 8))}


def scatter_rows(
    x: Tensor,
    image: Tensor,
    row_scale: Tensor,
    groups: RowGroups,
    local_ids: Tensor,
    unit: int,
    top_k: int,
    *,
    source: ScaleSource,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """Each token to the rows of its slots, quantized on the way where ``source`` says so.

    Args:
        x: bf16 ``[T, K]``, contiguous.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``: receives each row's global scale, if quantized.
        groups: where rows stand.
        local_ids: int32 ``[S]``, read for EXPERT.
        unit: rows of a row tile.
        top_k: slots of a token.
        source: of the global scale.
        scale: what ``source`` reads.
        weights: fp32 ``[T]``, multiplied in before anything else, or None.
        dependent: start before the launch before has ended (Hopper and later), which did not write ``x``.
    """
    tokens, k = x.shape
    # A program for each slot, so that what one waits for the others wait for at the same time.
    _scatter_rows[(tokens, top_k)](
        x, weights if weights is not None else row_scale, scale if scale is not None else row_scale,
        groups.slot_row, groups.tile_start, groups.tile_rows, local_ids, image, row_scale, k,
        SOURCE=int(source), HAS_WEIGHT=weights is not None, TOP_K=top_k, UNIT=unit, DEPENDENT=dependent,
        **_whole_rows(k), **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


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
    """Routing (:mod:`dsv4.kernels.triton.routing`), then :func:`scatter_rows`, in one launch.

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


def gather_rows(
    x: Tensor,
    x_scale: Tensor | None,
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    groups: RowGroups,
    unit: int,
    slots_per_row: int,
) -> None:
    """Each row of the tile map from its token.

    For many tokens it is faster than :func:`scatter_rows`, although tokens are read more than once: the rows of a group
    are written together, and rows written one by one cost memory its pages (525 us for 8192 tokens of V4-Flash).

    Args:
        x: bf16 ``[.., K]``, contiguous; slot s reads row ``s // slots_per_row``.
        x_scale: fp32, one for each row of x, or None.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``: receives each row's ``x_scale``, if given.
        tiles: the tile map, R rows.
        groups: where rows stand.
        unit: rows of a row tile.
        slots_per_row: see ``x``.
    """
    k = x.shape[1]
    blocks = min(16, triton.next_power_of_2(k // 64))
    _gather_rows[(tiles.row_slot.shape[0] // 8, triton.cdiv(k // 64, blocks))](
        x, x_scale if x_scale is not None else row_scale, tiles.row_slot, groups.tile_start, groups.tile_rows,
        tiles.num_tiles, image, row_scale, k, HAS_SCALE=x_scale is not None, SLOTS_PER_ROW=slots_per_row, UNIT=unit,
        BLOCKS=blocks, num_warps=max(1, min(8, blocks // 2)),
    )  # fmt: skip


def quantize_image(
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    groups: RowGroups,
    unit: int,
    k: int,
    source: ScaleSource,
    scale: Tensor | None,
    *,
    dependent: bool = False,
) -> None:
    """Quantize an image in place: ``e2m1 * sf``, and the global scale of each row beside it.

    Args:
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``, written.
        tiles: the tile map, R rows.
        groups: where rows stand.
        unit: rows of a row tile.
        k: K, a multiple of 64.
        source: of the global scale: ROW, BATCH or EXPERT.
        scale: what ``source`` reads.
        dependent: start before the launch before has ended (Hopper and later), which wrote the image; the tables of
            routing must be older than that launch.
    """
    _quantize_image[(tiles.row_slot.shape[0],)](
        image, scale if scale is not None else row_scale, tiles.row_slot, tiles.tile_expert, groups.tile_start,
        groups.tile_rows, row_scale, k, SOURCE=int(source), UNIT=unit, DEPENDENT=dependent, **_whole_rows(k),
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def image_amax(
    image: Tensor, tiles: TileMap, groups: RowGroups, unit: int, k: int, amax: Tensor, *, of_batch: bool
) -> None:
    """Largest magnitudes of an image's rows, 0 for those with a NaN or Inf: ``amax [1]`` is raised to that of all of
    them, or without ``of_batch`` ``amax [S]`` receives those of the slots that have a row."""
    _image_amax[(tiles.row_slot.shape[0],)](
        image, tiles.row_slot, groups.tile_start, groups.tile_rows, amax, k, OF_BATCH=of_batch, UNIT=unit,
        **_whole_rows(k),
    )  # fmt: skip
