"""Checkpoint rows to the portable backend's byte order, and back: see :mod:`dsv4.kernels.triton.weight_layout`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.weight_layout import CHUNK_BYTES, CODE_BYTES, Matrix, word_codes
from dsv4.nvfp4 import pack_nibbles

_CHUNK_WORDS = tl.constexpr(CHUNK_BYTES // 4)
_CODE_WORDS = tl.constexpr(CODE_BYTES // 4)
_SCALES = tl.constexpr(CHUNK_BYTES - CODE_BYTES)


@triton.jit
def _lanes(codes, first: tl.constexpr, field: tl.constexpr, sign: tl.constexpr):
    """Codes ``first`` and ``first + 1`` of four (16 bits): magnitude at ``field`` in lanes 0 and 1, sign bits at
    ``sign`` and ``(sign + 16) % 32``."""
    c0 = (codes >> (4 * first)) & 0xF
    c1 = (codes >> (4 * first + 4)) & 0xF
    magnitudes = ((c0 & 7) << field) | ((c1 & 7) << (field + 16))
    return magnitudes | ((c0 >> 3) << sign) | ((c1 >> 3) << ((sign + 16) % 32))


@triton.jit
def _split_lanes(codes):
    """The last pair: magnitude bits 0 and 1 at 3 and 4, bit 2 at 0, sign at 1."""
    c0 = (codes >> 8) & 0xF
    c1 = (codes >> 12) & 0xF
    lane0 = ((c0 & 3) << 3) | ((c0 >> 2) & 1) | ((c0 >> 3) << 1)
    lane1 = ((c1 & 3) << 3) | ((c1 >> 2) & 1) | ((c1 >> 3) << 1)
    return lane0 | (lane1 << 16)


@triton.jit
def code_word(low, high):
    """Twice four codes (16 bits) to a word, by the table in the layout's docstring."""
    return _lanes(low, 0, 6, 15) | _lanes(low, 2, 9, 18) | _lanes(high, 0, 12, 21) | _split_lanes(high)


@triton.jit
def _source_row(strip, g, rh, rows, INTERLEAVED: tl.constexpr):
    """The checkpoint's row that stands at row ``g + 8 * rh`` of a strip."""
    return strip * 8 + g + rh * (rows // 2) if INTERLEAVED else strip * 16 + g + rh * 8


@triton.jit
def _pair(source, row, column, rows, bytes_per_row, strip_rows):
    """Bytes (two codes each) of rows ``row[0]`` and ``row[1]``, the second above the first."""
    low = tl.load(source + row[0] * bytes_per_row + column, mask=strip_rows & (column < bytes_per_row), other=0)
    high = tl.load(source + row[1] * bytes_per_row + column, mask=strip_rows & (column < bytes_per_row), other=0)
    return low.to(tl.uint32) | (high.to(tl.uint32) << 8)


@triton.jit
def _pack(codes, scales, experts, rows, K, k_blocks, expert_bytes, offset, INTERLEAVED: tl.constexpr):
    block, row_tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunk = experts + expert * expert_bytes + offset + (row_tile * k_blocks + block).to(tl.int64) * (4 * _CHUNK_WORDS)

    i = tl.arange(0, _CODE_WORDS)
    strip, piece, g, c, word = row_tile * 4 + i // 256, (i // 128) % 2, (i // 16) % 8, (i // 4) % 4, i % 4
    row = (_source_row(strip, g, 0, rows, INTERLEAVED), _source_row(strip, g, 1, rows, INTERLEAVED))
    column = block * 64 + piece * 16 + word * 4 + c
    source = codes + expert * rows * (K // 2)
    in_rows = strip * 16 < rows
    low = _pair(source, row, column, rows, K // 2, in_rows)
    high = _pair(source, row, column + 32, rows, K // 2, in_rows)
    tl.store(chunk.to(tl.pointer_type(tl.uint32)) + i, code_word(low, high))

    j = tl.arange(0, _SCALES)
    strip, g, rh, half, place = row_tile * 4 + j // 128, (j // 16) % 8, (j // 8) % 2, (j // 4) % 2, j % 4
    column = block * 8 + half * 4 + (place % 2) * 2 + place // 2
    mask = (strip * 16 < rows) & (column < K // 16)
    row_of_scale = _source_row(strip, g, rh, rows, INTERLEAVED)
    sf = tl.load(scales + (expert * rows + row_of_scale) * (K // 16) + column, mask=mask, other=0)
    tl.store(chunk + 4 * _CODE_WORDS + j, sf)


def pack(codes: Tensor, scales: Tensor, matrix: Matrix, experts: Tensor) -> None:
    """Write ``matrix`` of every expert.

    Args:
        codes: uint8 ``[E, N, K/2]``, contiguous, on the device.
        scales: uint8 ``[E, N, K/16]``, likewise.
        matrix: where to.
        experts: uint8 ``[E, bytes]``.
    """
    _pack[(matrix.k_blocks, matrix.row_tiles, codes.shape[0])](
        codes, scales, experts, matrix.out_features, matrix.in_features, matrix.k_blocks, experts.stride(0),
        matrix.offset, INTERLEAVED=matrix.interleaved, num_warps=4,
    )  # fmt: skip


def unpack(experts: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The inverse, in plain torch: ``(codes uint8 [E, N, K/2], scales float8_e4m3fn [E, N, K/16])``."""
    n, k = matrix.out_features, matrix.in_features
    codes = torch.empty(experts.shape[0], n, k // 2, dtype=torch.uint8, device=experts.device)
    scales = torch.empty(experts.shape[0], n, k // 16, dtype=torch.uint8, device=experts.device)
    for row, expert_codes, expert_scales in zip(experts, codes, scales, strict=True):  # codes take 8 times their bytes
        chunks = row[matrix.offset : matrix.end].view(matrix.row_tiles, matrix.k_blocks, CHUNK_BYTES)
        words = chunks[..., :CODE_BYTES].contiguous().view(torch.int32).view(matrix.row_tiles, matrix.k_blocks, -1)
        expert_codes.copy_(pack_nibbles(_rows(chunk_codes(words), matrix)[:, :k]))
        expert_scales.copy_(_rows(chunk_scales(chunks[..., CODE_BYTES:]), matrix)[:, : k // 16])
    return codes, scales.view(torch.float8_e4m3fn)


def _rows(values: Tensor, matrix: Matrix) -> Tensor:
    """``[tiles, blocks, strips, rh, g, columns]`` -> ``[N, blocks * columns]`` in the checkpoint's order of rows."""
    if matrix.interleaved:  # gate and up are the two halves of a strip
        rows = values.permute(3, 0, 2, 4, 1, 5).flatten(1, 3).flatten(2)
        return rows[:, : matrix.out_features // 2].flatten(0, 1)
    return values.permute(0, 2, 3, 4, 1, 5).flatten(0, 3).flatten(1)[: matrix.out_features]


def chunk_codes(words: Tensor) -> Tensor:
    """int32 words ``[tiles, blocks, 1024]`` of chunks -> codes ``[tiles, blocks, strip, rh, g, K]``, uint8."""
    tiles, blocks, _ = words.shape
    # tile, block, strip, piece, g, c, 16s, 8s | half, row, K parity
    codes = word_codes(words).view(tiles, blocks, 4, 2, 8, 4, 2, 2, 2, 2, 2)
    return codes.permute(0, 1, 2, 9, 4, 8, 3, 6, 7, 5, 10).reshape(tiles, blocks, 4, 2, 8, 128)


def chunk_scales(scales: Tensor) -> Tensor:
    """Scale bytes ``[tiles, blocks, 512]`` of chunks -> ``[tiles, blocks, strip, rh, g, 8]``."""
    tiles, blocks, _ = scales.shape
    parts = scales.reshape(tiles, blocks, 4, 8, 2, 2, 2, 2)  # strip, g, rh, half, and two bits of the place
    return parts.permute(0, 1, 2, 4, 3, 5, 7, 6).reshape(tiles, blocks, 4, 2, 8, 8)
