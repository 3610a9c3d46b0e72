"""Checkpoint rows to the layout of :mod:`dsv4.kernels.hopper.layout`, on the GPU, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.hopper.layout import BLOCK_BYTES, BLOCK_K, BLOCK_ROWS, CODE_BYTES
from dsv4.kernels.triton.packing import code_word

_BLOCK_BYTES, _CODE_BYTES = tl.constexpr(BLOCK_BYTES), tl.constexpr(CODE_BYTES)


@triton.jit
def _row(tile, warp, half, g, N, GATED: tl.constexpr):
    """Row of the checkpoint: see :func:`dsv4.kernels.hopper.layout.row_order`."""
    if GATED:
        place = (2 * warp + tile % 2) * 8 + g
        j = place % 2 + 2 * (place % 16 // 8)
        feature = 16 * (place % 8 // 2) + 4 * (place // 16) + j
        return tile // 2 * 64 + feature + half * (N // 2)
    else:
        return tile * 64 + warp * 16 + half * 8 + g


@triton.jit
def _pack(codes, scales, experts, N, K, expert_bytes, offset, GATED: tl.constexpr):
    block, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    word = tl.arange(0, 1024)
    half, thread, k = word // 512, word % 512 // 4, word % 4
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    column = (block * 128 + half * 64 + t * 16 + k * 4) // 4  # in pairs of bytes
    base = codes.to(tl.pointer_type(tl.uint16)) + expert * N * (K // 4) + column
    upper = tl.load(base + _row(tile, warp, 0, g, N, GATED) * (K // 4)).to(tl.uint32)
    lower = tl.load(base + _row(tile, warp, 1, g, N, GATED) * (K // 4)).to(tl.uint32)
    # Registers of a fragment: (upper, lower row) x (first, second pair of columns).
    packed = code_word((upper & 0xFF) | ((lower & 0xFF) << 8), (upper >> 8) | (lower & 0xFF00))
    out = experts + expert * expert_bytes + offset + (tile * (K // 128) + block).to(tl.int64) * _BLOCK_BYTES
    tl.store(out.to(tl.pointer_type(tl.uint32)) + word, packed)
    i = tl.arange(0, 512)
    thread, half, h = i // 4, i % 4 // 2, i % 2
    row = tl.where(
        h == 0,
        _row(tile, thread // 32, 0, thread % 32 // 4, N, GATED),
        _row(tile, thread // 32, 1, thread % 32 // 4, N, GATED),
    )
    group = block * 8 + half * 4 + thread % 4
    scale = tl.load(scales + expert * N * (K // 16) + row * (K // 16) + group)
    tl.store(out + _CODE_BYTES + i, (scale << 4) | (scale >> 4))


def pack(codes: Tensor, scales: Tensor, experts: Tensor, offset: int, gated: bool) -> None:
    """Write one matrix of every expert.

    Args:
        codes: uint8 ``[E, N, K/2]``, contiguous, on the device; N a multiple of 64 and K of 128.
        scales: uint8 ``[E, N, K/16]``, likewise.
        experts: uint8 ``[E, bytes]``.
        offset: first byte of the matrix.
        gated: rows are ``[gate | up]``.
    """
    e, n, half_k = codes.shape
    _pack[(2 * half_k // BLOCK_K, n // BLOCK_ROWS, e)](
        codes, scales, experts, n, 2 * half_k, experts.stride(0), offset, GATED=gated, num_warps=4
    )
