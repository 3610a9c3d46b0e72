"""Rows to images and back into themselves, in Triton: the operands of :mod:`dsv4.kernels.hopper.grouped_gemm`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import global_scale, largest_magnitude, quantize_block
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _finite_amax(x):
    """``max |x|`` of ``[1, blocks, 16]``, 0 if it holds a NaN or Inf: ``[1]``."""
    amax = largest_magnitude(largest_magnitude(x, 2), 1)
    return tl.where(amax < float("inf"), amax, 0.0)


@triton.jit
def _gather_image(x, row_slot, num_tiles, out, K, SLOTS_PER_ROW: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr):
    """Copy rows, two values at a time: 32 pairs of a 128-byte line are one warp's."""
    row = tl.program_id(0)
    if row >= tl.load(num_tiles) * P:
        return
    slot = tl.load(row_slot + row)
    pair = tl.arange(0, PAIRS)
    block, place = pair // 32, pair % 32
    chunk = (place // 4) ^ (row % 8)  # which chunk stands here, before the swizzle
    source = block * 32 + (place % 4) * 8 + chunk
    x_pairs = x.to(tl.pointer_type(tl.int32)) + (slot // SLOTS_PER_ROW).to(tl.int64) * (K // 2) + source
    inside = pair < K // 2
    # Padding is zeros: nothing of it is kept, and zeros take the least power to multiply.
    value = tl.load(x_pairs, mask=inside & (slot >= 0), other=0)
    at = ((row // P).to(tl.int64) * (K // 64) + block) * (P * 32) + (row % P) * 32 + place
    tl.store(out.to(tl.pointer_type(tl.int32)) + at, value, mask=inside)


@triton.jit
def _image_offset(row, column, K, P: tl.constexpr):
    """Element of the image where value ``column`` of a row stands."""
    f = column % 64
    chunk = 2 * (f % 16 // 4) + f % 4 // 2
    at = ((row // P).to(tl.int64) * (K // 64) + column // 64) * (P * 64) + (row % P) * 64
    return at + (chunk ^ (row % 8)) * 8 + 2 * (f // 16) + f % 2


@triton.jit
def _quantize_image(
    x, weights, scale, row_slot, tile_expert, num_tiles, out, row_scale, K,
    SOURCE: tl.constexpr, FROM_IMAGE: tl.constexpr, HAS_WEIGHT: tl.constexpr, SLOTS_PER_ROW: tl.constexpr,
    P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row >= tl.load(num_tiles) * P:
        return
    slot = tl.load(row_slot + row)
    column = tl.arange(0, BLOCKS)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    at = _image_offset(row, column, K, P)
    mask = (column < K) & (slot >= 0)
    if FROM_IMAGE:
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(x + (slot // SLOTS_PER_ROW).to(tl.int64) * K + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        value = (value * tl.load(weights + slot, mask=slot >= 0, other=0.0)).to(tl.bfloat16).to(tl.float32)
    if SOURCE != 0:
        if SOURCE == 1:
            gs = tl.max(global_scale(_finite_amax(value)), axis=0)
        elif SOURCE == 2:
            gs = tl.load(scale)
        elif SOURCE == 3:
            gs = global_scale(tl.load(scale))
        else:
            gs = tl.load(scale + tl.load(tile_expert + row // P))
        value = quantize_block(value, gs)
        tl.store(row_scale + row, gs)
    tl.debug_barrier()  # ``out`` may be ``x``
    tl.store(out + at, value.to(tl.bfloat16), mask=column < K)


@triton.jit
def _image_amax(image, row_slot, amax, K, P: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    if tl.load(row_slot + row) >= 0:
        column = tl.arange(0, BLOCKS)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        value = tl.load(image + _image_offset(row, column, K, P), mask=column < K, other=0.0).to(tl.float32)
        tl.atomic_max(amax, tl.max(_finite_amax(value), axis=0))


def stage_image(
    x: Tensor,
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    row_tile: int,
    k: int,
    *,
    source: ScaleSource,
    scale: Tensor | None = None,
    slots_per_row: int = 1,
    weights: Tensor | None = None,
) -> None:
    """Stage rows as an image, one for each row of the tile map; padding is zero.

    Args:
        x: bf16 ``[.., K]``, slot s reads row ``s // slots_per_row``; or ``image`` itself, which is quantized in place.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``, written unless ``source`` is NONE.
        tiles: the tile map, R rows.
        row_tile: rows of a tile.
        k: K, a multiple of 64.
        source: of the global scale.
        scale: what ``source`` reads.
        slots_per_row: see ``x``.
        weights: fp32, by slot, multiplied in and rounded to bf16 first.
    """
    rows = tiles.row_slot.shape[0]
    in_place = x.data_ptr() == image.data_ptr()
    if source is ScaleSource.NONE and weights is None and not in_place:
        pairs = triton.next_power_of_2(k // 2)
        _gather_image[(rows,)](
            x, tiles.row_slot, tiles.num_tiles, image, k, SLOTS_PER_ROW=slots_per_row, P=row_tile, PAIRS=pairs,
            num_warps=min(8, max(1, pairs // 256)),
        )  # fmt: skip
        return
    blocks = triton.next_power_of_2(k // 16)
    _quantize_image[(rows,)](
        x, weights if weights is not None else row_scale, scale if scale is not None else row_scale, tiles.row_slot,
        tiles.tile_expert, tiles.num_tiles, image, row_scale, k,
        SOURCE=int(source), FROM_IMAGE=in_place, HAS_WEIGHT=weights is not None, SLOTS_PER_ROW=slots_per_row,
        P=row_tile, BLOCKS=blocks, num_warps=max(1, min(16, blocks // 16)),
    )  # fmt: skip


def image_amax(image: Tensor, tiles: TileMap, row_tile: int, k: int, amax: Tensor) -> None:
    """Raise ``amax [1]`` to the largest magnitude of the image's rows; those with a NaN or Inf are left out."""
    blocks = triton.next_power_of_2(k // 16)
    _image_amax[(tiles.row_slot.shape[0],)](
        image, tiles.row_slot, amax, k, P=row_tile, BLOCKS=blocks, num_warps=max(1, min(16, blocks // 16))
    )
