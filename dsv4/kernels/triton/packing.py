"""Checkpoint rows to the portable backend's byte order, and back: see :mod:`dsv4.kernels.triton.grouped_gemm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import K_BLOCK, Matrix
from dsv4.nvfp4 import pack_nibbles

_WORDS = tl.constexpr(16)  # in a K block
_SCALES = tl.constexpr(8)


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
def _pack(codes, scales, experts, rows, K, k_blocks, expert_bytes, codes_offset, scales_offset, ROWS: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    block = tl.program_id(1)
    in_rows = row < rows
    # Four codes are two bytes of the source, a word of two times four codes in the result.
    quad = block * 2 * _WORDS + tl.arange(0, _WORDS)[None, :]
    source = codes.to(tl.pointer_type(tl.uint16)) + expert * rows * (K // 4) + row * (K // 4) + quad
    low = tl.load(source, mask=in_rows & (quad < K // 4), other=0).to(tl.uint32)
    high = tl.load(source + _WORDS, mask=in_rows & (quad + _WORDS < K // 4), other=0).to(tl.uint32)
    word = _lanes(low, 0, 6, 15) | _lanes(low, 2, 9, 18) | _lanes(high, 0, 12, 21) | _split_lanes(high)
    out = (experts + expert * expert_bytes + codes_offset).to(tl.pointer_type(tl.uint32))
    tl.store(out + (row * k_blocks + block) * _WORDS + tl.arange(0, _WORDS)[None, :], word, mask=in_rows)
    g = block * _SCALES + tl.arange(0, _SCALES)[None, :]
    sf = tl.load(scales + expert * rows * (K // 16) + row * (K // 16) + g, mask=in_rows & (g < K // 16), other=0)
    out_sf = experts + expert * expert_bytes + scales_offset + row * k_blocks * _SCALES + g
    tl.store(out_sf, sf, mask=in_rows)


def pack(codes: Tensor, scales: Tensor, matrix: Matrix, experts: Tensor) -> None:
    """Write ``matrix`` of every expert.

    Args:
        codes: uint8 ``[E, N, K/2]``, contiguous, on the device.
        scales: uint8 ``[E, N, K/16]``, likewise.
        matrix: where to.
        experts: uint8 ``[E, bytes]``.
    """
    rows = 64
    grid = (triton.cdiv(matrix.out_features, rows), matrix.padded_k // K_BLOCK, codes.shape[0])
    _pack[grid](
        codes, scales, experts, matrix.out_features, matrix.in_features, matrix.padded_k // K_BLOCK, experts.stride(0),
        matrix.offset, matrix.scales_offset, ROWS=rows, num_warps=4,
    )  # fmt: skip


def unpack(experts: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The inverse, in plain torch: ``(codes uint8 [E, N, K/2], scales float8_e4m3fn [E, N, K/16])``."""
    n, k, blocks = matrix.out_features, matrix.in_features, matrix.padded_k // K_BLOCK
    codes = torch.empty(experts.shape[0], n, k // 2, dtype=torch.uint8, device=experts.device)
    for expert, row in zip(codes, experts, strict=True):  # one at a time: codes take eight times their bytes meanwhile
        words = row[matrix.offset : matrix.scales_offset].view(torch.int32).view(n, blocks, -1)
        expert.copy_(pack_nibbles(word_codes(words).flatten(1)[:, :k]))
    scales = experts[:, matrix.scales_offset : matrix.end].reshape(-1, n, matrix.padded_k // 16)[..., : k // 16]
    return codes, scales.contiguous().view(torch.float8_e4m3fn)


def word_codes(words: Tensor) -> Tensor:
    """int32 words ``[..., 16]`` of K blocks -> uint8 codes ``[..., 128]``, by the table in the GEMM's docstring."""

    def bit(position: int) -> Tensor:
        return (words >> (position % 32)) & 1

    def code(m2: int, m1: int, m0: int, sign: int) -> Tensor:
        return (bit(sign) << 3) | (bit(m2) << 2) | (bit(m1) << 1) | bit(m0)

    def pair(m2: int, m1: int, m0: int, sign: int) -> list[Tensor]:
        return [code(m2, m1, m0, sign), code(m2 + 16, m1 + 16, m0 + 16, sign + 16)]

    low = [*pair(8, 7, 6, 15), *pair(11, 10, 9, 18)]
    high = [*pair(14, 13, 12, 21), *pair(0, 4, 3, 1)]
    halves = [torch.stack(part, dim=-1).flatten(-2) for part in (low, high)]
    return torch.cat(halves, dim=-1).to(torch.uint8)
