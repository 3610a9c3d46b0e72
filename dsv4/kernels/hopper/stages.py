"""Rows to images, and images quantized in place, in Triton: the operands of :mod:`dsv4.kernels.hopper.grouped_gemm`.

A row group's image is ``[K/64][rows][64]`` bf16 and begins at its first row times K; rows that no slot fills keep what
they hold, since a row of the product depends on its own row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import block_terms, global_scale, largest_magnitude, quantize_values
from dsv4.kernels.triton.routing import RowGroups
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _places(row, start, rows, K, BLOCKS: tl.constexpr):
    """Pairs of values of a row, ``[chunk, lane, BLOCKS]``: where in the image of ``rows`` rows from ``start``.

    The 16-byte chunks of a 128-byte line are swizzled as wgmma reads them. Triton gives a thread what it finds
    contiguous, and neighbouring threads the first dimension of the others: a warp's instruction writes whole lines of
    an image, chunk by chunk, and reads whole lines of a row, where a lane's chunks are contiguous.
    """
    chunk = tl.arange(0, 8)[:, None, None]
    lane = tl.arange(0, 4)[None, :, None]
    block = tl.arange(0, BLOCKS)[None, None, :]
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
def _group_amax(low, high, BLOCKS: tl.constexpr):
    """Of scale groups, ``[BLOCKS * 4]``, block by block: a lane's sixteen values of each. Dealt to the threads.

    A reduction leaves its result with every thread that took part, and what follows from it Triton computes in each of
    them: of a scale group in eight. A gather has a layout of its own, and Triton does not look for another one behind a
    reduction, be it of single elements. So this one stays, and what follows is computed once. (Nor would Triton 3.6
    reduce the flat maxima rightly where they are: it takes the threads that hold them for neighbours.)
    """
    NUMBER: tl.constexpr = BLOCKS * 4
    of_pairs = largest_magnitude(tl.join(low, high), 3)
    amax = tl.reshape(tl.trans(largest_magnitude(of_pairs, 0)), (NUMBER,))
    return tl.max(tl.reshape(tl.gather(amax, tl.arange(0, NUMBER), 0), (NUMBER, 1)), 1)


@triton.jit
def _of_groups(x, BLOCKS: tl.constexpr):
    """``[BLOCKS * 4]`` of scale groups -> ``[1, 4, BLOCKS]``, beside pairs."""
    return tl.trans(tl.reshape(x, (BLOCKS, 4)))[None, :, :]


@triton.jit
def _finite_amax(amax):
    """Of all groups, 0 if one holds a NaN or Inf."""
    row_amax = largest_magnitude(amax, 0)
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
def _quantized(low, high, amax, gs, BLOCKS: tl.constexpr):
    """``e2m1 * sf`` of a row's pairs under a global scale."""
    divisor, reciprocal, factor = block_terms(amax, gs)
    divisor, reciprocal = _of_groups(divisor, BLOCKS), _of_groups(reciprocal, BLOCKS)
    factor = _of_groups(factor, BLOCKS)
    return _join(quantize_values(low, divisor, reciprocal, factor), quantize_values(high, divisor, reciprocal, factor))


@triton.jit
def load_token(x, token, K, BLOCKS: tl.constexpr):
    """A token's pairs, ``[chunk, lane, BLOCKS]``, and which of them there are.

    A lane's sixteen values of 64 stand together in a row, and are dealt to the chunks two by two.
    """
    chunk = tl.arange(0, 8)[:, None, None]
    lane = tl.arange(0, 4)[None, :, None]
    block = tl.arange(0, BLOCKS)[None, None, :]
    here = block * 64 < K
    source = token.to(tl.int64) * (K // 2) + block * 32 + lane * 8 + chunk
    pairs = tl.load(x.to(tl.pointer_type(tl.uint32)) + source, mask=here & (lane >= 0) & (chunk >= 0), other=0)
    return pairs, here


@triton.jit
def put_row(
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
        amax = _group_amax(low, high, BLOCKS)
        gs = _row_scale(amax, scale, expert, SOURCE)
        pairs = _quantized(low, high, amax, gs, BLOCKS)
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
    pairs, here = load_token(x, token, K, BLOCKS)
    if DEPENDENT:
        # The next launch may begin only now: it believes the tables of routing to be older than this launch.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = token * TOP_K + tl.program_id(1)
    row = tl.load(slot_row + slot)
    if row >= 0:
        start, rows = tl.load(tile_start + row // UNIT), tl.load(tile_rows + row // UNIT)
        expert = tl.load(local_ids + slot)
        put_row(
            pairs, here, weights, scale, token, row, start, rows, expert, image, row_scale, K, SOURCE, HAS_WEIGHT,
            BLOCKS,
        )  # fmt: skip


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
    chunk = tl.arange(0, 8)[:, None, None, None]  # the dimensions' order: see _places
    lane = tl.arange(0, 4)[None, :, None, None]
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, None, None, :]
    inside = (row - start)[None, None, :, None]
    mask = served[None, None, :, None] & (block * 64 < K) & (chunk >= 0) & (lane >= 0)
    source = token.to(tl.int64)[None, None, :, None] * (K // 2) + block * 32 + lane * 8 + chunk
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
    here = (tl.arange(0, BLOCKS) * 64 < K)[None, None, :]
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
    amax = _group_amax(low, high, BLOCKS)
    gs = _row_scale(amax, scale, tl.load(tile_expert + row // UNIT), SOURCE)
    tl.store(at, _quantized(low, high, amax, gs, BLOCKS), mask=here)
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
        row_amax = _finite_amax(_group_amax(low, high, BLOCKS))
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


def gather_rows(
    x: Tensor,
    x_scale: Tensor | None,
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    groups: RowGroups,
    unit: int,
    slots_per_row: int,
    *,
    blocks: int = 8,
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
        blocks: 64s of K that a program takes of its rows, a power of two. Measured with 4, 8, 16 and 32 of them, us:
            V4-Flash, T = 512 8.3, 8.3, 8.4, 8.7; 4096 66, 68, 72, 79; 8192 129, 136, 150, 169. V4-Pro, T = 128 8.6,
            6.1, 6.2 (16; most programs have no rows there); 512 16.5, 15.8, 15.8, 17.6; 8192 225, 238, 261, 293.
    """
    k = x.shape[1]
    blocks = min(blocks, triton.next_power_of_2(k // 64))
    _gather_rows[(tiles.row_slot.shape[0] // 8, triton.cdiv(k // 64, blocks))](
        x, x_scale if x_scale is not None else row_scale, tiles.row_slot, groups.tile_start, groups.tile_rows,
        tiles.num_tiles, image, row_scale, k, HAS_SCALE=x_scale is not None, SLOTS_PER_ROW=slots_per_row, UNIT=unit,
        BLOCKS=blocks, num_warps=4,
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
