"""Rows to images, and images quantized in place, in Triton: the operands of :mod:`dsv4.kernels.hopper.grouped_gemm`.

A row group's image is ``[K/64][rows][64]`` bf16 and begins at its first row times K; rows that no slot fills keep what
they hold, since a row of the product depends on its own row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import block_scales, global_scale, largest_magnitude, quantize_values
from dsv4.kernels.triton.routing import RowGroups
from dsv4.kernels.triton.stages import ScaleSource

_FEW_TOKENS = 64


@triton.jit
def _places(row, start, rows, K, BLOCKS: tl.constexpr):
    """Pairs of values of a row, ``[BLOCKS, chunk, lane]``: where in the image of ``rows`` rows from ``start``.

    The 16-byte chunks of a 128-byte line are swizzled as wgmma reads them.
    """
    block = tl.arange(0, BLOCKS)[:, None, None]
    chunk = tl.arange(0, 8)[None, :, None]
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
    """Of scale groups, ``[BLOCKS, 1, 4]``: a lane's sixteen values of a block."""
    both = tl.join(low, high)
    return largest_magnitude(largest_magnitude(both, 3), 1)[:, None, :]


@triton.jit
def _finite_amax(amax):
    """Of all groups, 0 if one holds a NaN or Inf."""
    row_amax = largest_magnitude(largest_magnitude(largest_magnitude(amax, 2), 1), 0)
    return tl.where(row_amax < float("inf"), row_amax, 0.0)


@triton.jit
def _quantized(low, high, amax, gs):
    """``e2m1 * sf`` of a row's pairs under a global scale."""
    divisor, reciprocal, factor = block_scales(amax, gs)
    low = quantize_values(low, divisor, reciprocal, factor).to(tl.bfloat16).to(tl.float32)
    high = quantize_values(high, divisor, reciprocal, factor).to(tl.bfloat16).to(tl.float32)
    return _join(low, high)


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
    SLOTS: tl.constexpr,  # of a token, for one program
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    block = tl.arange(0, BLOCKS)[:, None, None]
    chunk = tl.arange(0, 8)[None, :, None]
    lane = tl.arange(0, 4)[None, None, :]
    here = block * 64 < K
    # A lane's sixteen values of 64 stand together in a row, and are dealt to the chunks two by two.
    source = token.to(tl.int64) * (K // 2) + block * 32 + lane * 8 + chunk
    pairs = tl.load(x.to(tl.pointer_type(tl.uint32)) + source, mask=here & (lane >= 0) & (chunk >= 0), other=0)
    if DEPENDENT:
        # The next launch may begin only now: it believes the tables of routing to be older than this launch.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if SOURCE != 0 or HAS_WEIGHT:
        low, high = _split(pairs)
        if HAS_WEIGHT:
            weight = tl.load(weights + token)
            low, high = (low * weight).to(tl.bfloat16).to(tl.float32), (high * weight).to(tl.bfloat16).to(tl.float32)
            pairs = _join(low, high)
    if SOURCE != 0:
        amax = _group_amax(low, high)
        if SOURCE == 1:
            gs = global_scale(_finite_amax(amax))
        elif SOURCE == 2:
            gs = tl.load(scale)
        elif SOURCE == 3:
            gs = global_scale(tl.load(scale))
        if SOURCE != 4:
            pairs = _quantized(low, high, amax, gs)
    # First all loads of a kind, then their uses: a program waits once for each kind, not once for each slot.
    first = token * TOP_K + tl.program_id(1) * SLOTS
    rows: tl.tuple = ()
    for j in tl.static_range(SLOTS):
        rows += (tl.load(slot_row + first + j),)
    starts: tl.tuple = ()
    widths: tl.tuple = ()
    for j in tl.static_range(SLOTS):
        tile = tl.maximum(rows[j], 0) // UNIT
        starts += (tl.load(tile_start + tile),)
        widths += (tl.load(tile_rows + tile),)
    out = image.to(tl.pointer_type(tl.uint32))
    for j in tl.static_range(SLOTS):
        row = rows[j]
        served = row >= 0
        if SOURCE == 4:
            gs = tl.load(scale + tl.load(local_ids + first + j), mask=served, other=1.0)
            pairs = _quantized(low, high, amax, gs)
        tl.store(out + _places(row, starts[j], widths[j], K, BLOCKS), pairs, mask=here & served)
        if SOURCE != 0:
            tl.store(row_scale + row, gs, mask=served)


@triton.jit
def _load_row(image, row, tile_start, tile_rows, K, UNIT: tl.constexpr, BLOCKS: tl.constexpr):
    start, rows = tl.load(tile_start + row // UNIT), tl.load(tile_rows + row // UNIT)
    at = image.to(tl.pointer_type(tl.uint32)) + _places(row, start, rows, K, BLOCKS)
    here = (tl.arange(0, BLOCKS) * 64 < K)[:, None, None]
    low, high = _split(tl.load(at, mask=here, other=0))
    return at, here, low, high


@triton.jit
def _quantize_image(
    image, scale, row_slot, tile_expert, tile_start, tile_rows, row_scale, K,
    SOURCE: tl.constexpr, UNIT: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(row_slot + row) < 0:
        return
    at, here, low, high = _load_row(image, row, tile_start, tile_rows, K, UNIT, BLOCKS)
    amax = _group_amax(low, high)
    if SOURCE == 1:
        gs = global_scale(_finite_amax(amax))
    elif SOURCE == 3:
        gs = global_scale(tl.load(scale))
    else:
        gs = tl.load(scale + tl.load(tile_expert + row // UNIT))
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
    """Each token to the rows of its slots, quantized once on the way where ``source`` says so.

    Args:
        x: bf16 ``[T, K]``, contiguous.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``: receives each row's global scale, if quantized.
        groups: where rows stand.
        local_ids: int32 ``[S]``, read for EXPERT.
        unit: rows of a row tile.
        top_k: slots of a token.
        source: of the global scale; EXPERT quantizes a token once for each of its slots.
        scale: what ``source`` reads.
        weights: fp32 ``[T]``, multiplied in before anything else, or None.
        dependent: start before the launch before has ended (Hopper and later), which did not write ``x``.
    """
    tokens, k = x.shape
    blocks = triton.next_power_of_2(k // 64)
    # Few tokens: a program for each slot, so that what one waits for the others wait for at the same time.
    slots = 1 if tokens <= _FEW_TOKENS else top_k
    _scatter_rows[(tokens, top_k // slots)](
        x, weights if weights is not None else row_scale, scale if scale is not None else row_scale,
        groups.slot_row, groups.tile_start, groups.tile_rows, local_ids, image, row_scale, k,
        SOURCE=int(source), HAS_WEIGHT=weights is not None, TOP_K=top_k, UNIT=unit, BLOCKS=blocks,
        SLOTS=slots, DEPENDENT=dependent, num_warps=max(1, min(8, blocks // 8)),
        **({"launch_pdl": True} if dependent else {}),
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
    """
    blocks = triton.next_power_of_2(k // 64)
    _quantize_image[(tiles.row_slot.shape[0],)](
        image, scale if scale is not None else row_scale, tiles.row_slot, tiles.tile_expert, groups.tile_start,
        groups.tile_rows, row_scale, k, SOURCE=int(source), UNIT=unit, BLOCKS=blocks,
        num_warps=max(1, min(8, blocks // 8)),
    )  # fmt: skip


def image_amax(
    image: Tensor, tiles: TileMap, groups: RowGroups, unit: int, k: int, amax: Tensor, *, of_batch: bool
) -> None:
    """Largest magnitudes of an image's rows, 0 for those with a NaN or Inf: ``amax [1]`` is raised to that of all of
    them, or without ``of_batch`` ``amax [S]`` receives those of the slots that have a row."""
    blocks = triton.next_power_of_2(k // 64)
    _image_amax[(tiles.row_slot.shape[0],)](
        image, tiles.row_slot, groups.tile_start, groups.tile_rows, amax, k, OF_BATCH=of_batch, UNIT=unit,
        BLOCKS=blocks, num_warps=max(1, min(8, blocks // 8)),
    )  # fmt: skip
