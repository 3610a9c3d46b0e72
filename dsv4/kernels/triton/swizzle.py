"""The 32x4x4 scale swizzle: the kernel behind :func:`dsv4.ops.layouts.swizzle_32_4_4`, which has the layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_TILE = tl.constexpr(128)
_COL_TILE = tl.constexpr(4)
_TILE = tl.constexpr(512)
_TILES = 8
"""Tiles side by side in a program: rows are read in pieces of 32 bytes, a memory sector."""


@triton.jit(do_not_specialize=["rows", "tiles_across"])
def _swizzle(sf, out, rows, cols, tiles_across, TILES: tl.constexpr):
    # In the order of the result, so that stores are whole lines; what a sector holds besides is read by others here.
    place = tl.arange(0, TILES * _TILE)
    tile = tl.program_id(1) * TILES + place // _TILE
    line = place % _TILE // 16
    row = tl.program_id(0) * _ROW_TILE + line + place % 16 // _COL_TILE * 32
    col = tile * _COL_TILE + place % _COL_TILE
    scales = tl.load(sf + row.to(tl.int64) * cols + col, mask=(row < rows) & (col < cols), other=0)
    base = (tl.program_id(0).to(tl.int64) * tiles_across + tl.program_id(1) * TILES) * _TILE
    tl.store(out + base + place, scales, mask=tile < tiles_across)


def swizzle(sf: Tensor, out: Tensor) -> None:
    """Write every byte of ``out``, padding included. Moves two bytes a scale.

    Args:
        sf: one-byte ``[rows, cols]``.
        out: one-byte ``pad128(rows) * pad4(cols)``, contiguous.
    """
    rows, cols = sf.shape
    if not out.numel():
        return
    tiles_across = triton.cdiv(cols, _COL_TILE.value)
    grid = (triton.cdiv(rows, _ROW_TILE.value), triton.cdiv(tiles_across, _TILES))
    source = sf.contiguous().view(torch.uint8)
    _swizzle[grid](source, out.view(torch.uint8), rows, cols, tiles_across, TILES=_TILES, num_warps=4)
