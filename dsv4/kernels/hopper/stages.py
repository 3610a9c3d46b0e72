"""Rows to images, and images quantized in place, in Triton: the operands of :mod:`dsv4.kernels.hopper.grouped_gemm`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.numerics import block_scales, global_scale, largest_magnitude, quantize_values
from dsv4.kernels.triton.stages import ScaleSource


@triton.jit
def _gather_image(
    x, x_scale, row_slot, num_tiles, out, row_scale, K,
    HAS_SCALE: tl.constexpr, SLOTS_PER_ROW: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Copy rows, two values at a time: the 32 pairs of a 128-byte line are one warp's."""
    row = tl.program_id(0)
    if row >= tl.load(num_tiles) * P:
        return
    slot = tl.load(row_slot + row)
    pair = tl.arange(0, PAIRS)
    block, place = pair // 32, pair % 32
    chunk = (place // 4) ^ (row % 8)  # which chunk stands here, before the swizzle
    source = block * 32 + (place % 4) * 8 + chunk
    token = slot // SLOTS_PER_ROW
    inside = pair < K // 2
    # Padding is zeros: nothing of it is kept, and zeros take the least power to multiply.
    x_pairs = x.to(tl.pointer_type(tl.int32)) + token.to(tl.int64) * (K // 2)
    value = tl.load(x_pairs + source, mask=inside & (slot >= 0), other=0)
    at = ((row // P).to(tl.int64) * (K // 64) + block) * (P * 32) + (row % P) * 32 + place
    tl.store(out.to(tl.pointer_type(tl.int32)) + at, value, mask=inside)
    if HAS_SCALE:
        tl.store(row_scale + row, tl.load(x_scale + token, mask=slot >= 0, other=0.0))


@triton.jit
def _line_offset(row, K, P: tl.constexpr, BLOCKS: tl.constexpr):
    """Elements of a row as they stand: ``[BLOCKS, chunk, lane, 2]``, a scale group being one lane's of a block.

    The swizzle only trades chunks within a block, so that a maximum over a group needs no other order.
    """
    block = tl.arange(0, BLOCKS)[:, None, None, None]
    chunk = tl.arange(0, 8)[None, :, None, None]
    lane = tl.arange(0, 4)[None, None, :, None]
    last = tl.arange(0, 2)[None, None, None, :]
    line = ((row // P).to(tl.int64) * (K // 64) + block) * (P * 64) + (row % P) * 64
    return line + chunk * 8 + lane * 2 + last, block < K // 64


@triton.jit
def _group_amax(value):
    """``[BLOCKS, 4]``."""
    return largest_magnitude(largest_magnitude(value, 3), 1)


@triton.jit
def _finite_amax(amax):
    """Of all groups, 0 if one holds a NaN or Inf."""
    row_amax = largest_magnitude(largest_magnitude(amax, 1), 0)
    return tl.where(row_amax < float("inf"), row_amax, 0.0)


@triton.jit
def _quantize_image(
    image, scale, row_slot, tile_expert, row_scale, K, SOURCE: tl.constexpr, P: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0)
    if tl.load(row_slot + row) < 0:
        return
    at, inside = _line_offset(row, K, P, BLOCKS)
    value = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
    amax = _group_amax(value)
    if SOURCE == 1:
        gs = global_scale(_finite_amax(amax))
    elif SOURCE == 3:
        gs = global_scale(tl.load(scale))
    else:
        gs = tl.load(scale + tl.load(tile_expert + row // P))
    divisor, reciprocal, factor = block_scales(amax, gs)
    value = quantize_values(value, divisor[:, None, :, None], reciprocal[:, None, :, None], factor[:, None, :, None])
    tl.store(image + at, value.to(tl.bfloat16), mask=inside)
    tl.store(row_scale + row, gs)


@triton.jit
def _image_amax(image, row_slot, amax, K, P: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    if tl.load(row_slot + row) >= 0:
        at, inside = _line_offset(row, K, P, BLOCKS)
        value = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
        tl.atomic_max(amax, _finite_amax(_group_amax(value)))


def gather_image(
    x: Tensor,
    x_scale: Tensor | None,
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    row_tile: int,
    slots_per_row: int,
) -> None:
    """One row of ``image`` for each of the tile map; padding is zero.

    Args:
        x: bf16 ``[.., K]``, contiguous; slot s reads row ``s // slots_per_row``.
        x_scale: fp32, one for each row of x, or None.
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``: receives the row's ``x_scale``, if given.
        tiles: the tile map, R rows.
        row_tile: rows of a tile.
        slots_per_row: see ``x``.
    """
    k = x.shape[1]
    pairs = triton.next_power_of_2(k // 2)
    _gather_image[(tiles.row_slot.shape[0],)](
        x, x_scale if x_scale is not None else row_scale, tiles.row_slot, tiles.num_tiles, image, row_scale, k,
        HAS_SCALE=x_scale is not None, SLOTS_PER_ROW=slots_per_row, P=row_tile, PAIRS=pairs,
        num_warps=min(8, max(1, pairs // 256)),
    )  # fmt: skip


def quantize_image(
    image: Tensor,
    row_scale: Tensor,
    tiles: TileMap,
    row_tile: int,
    k: int,
    source: ScaleSource,
    scale: Tensor | None,
) -> None:
    """Quantize an image in place: ``e2m1 * sf``, and the global scale of each row beside it.

    Args:
        image: bf16, ``R * K`` values.
        row_scale: fp32 ``[R]``, written.
        tiles: the tile map, R rows.
        row_tile: rows of a tile.
        k: K, a multiple of 64.
        source: of the global scale: ROW, BATCH or EXPERT.
        scale: what ``source`` reads.
    """
    blocks = triton.next_power_of_2(k // 64)
    _quantize_image[(tiles.row_slot.shape[0],)](
        image, scale if scale is not None else row_scale, tiles.row_slot, tiles.tile_expert, row_scale, k,
        SOURCE=int(source), P=row_tile, BLOCKS=blocks, num_warps=max(1, min(8, blocks // 8)),
    )  # fmt: skip


def image_amax(image: Tensor, tiles: TileMap, row_tile: int, k: int, amax: Tensor) -> None:
    """Raise ``amax [1]`` to the largest magnitude of the image's rows; those with a NaN or Inf are left out."""
    blocks = triton.next_power_of_2(k // 64)
    _image_amax[(tiles.row_slot.shape[0],)](
        image, tiles.row_slot, amax, k, P=row_tile, BLOCKS=blocks, num_warps=max(1, min(8, blocks // 8))
    )
