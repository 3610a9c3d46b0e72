"""Checkpoint rows to the portable backend's byte order, and back: see :mod:`dsv4.kernels.triton.grouped_gemm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.grouped_gemm import K_BLOCK, Matrix
from dsv4.nvfp4 import pack_nibbles

_CODES = tl.constexpr(64)  # bytes of codes in a K block
_SCALES = tl.constexpr(8)


@triton.jit
def _pack(codes, scales, experts, rows, K, K_padded, expert_bytes, codes_offset, scales_offset, ROWS: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    block = tl.program_id(1)
    j = tl.arange(0, _CODES)[None, :]
    in_rows = row < rows
    byte = block * _CODES + j // 2
    shift = (j % 2) * 4
    source = codes + expert * rows * (K // 2) + row * (K // 2)
    low = tl.load(source + byte, mask=in_rows & (byte < K // 2), other=0)
    high = tl.load(source + byte + _CODES // 2, mask=in_rows & (byte + _CODES // 2 < K // 2), other=0)
    packed = ((low.to(tl.int32) >> shift) & 0xF) | (((high.to(tl.int32) >> shift) & 0xF) << 4)
    out = experts + expert * expert_bytes + codes_offset + row * (K_padded // 2) + block * _CODES + j
    tl.store(out, packed.to(tl.uint8), mask=in_rows)
    g = block * _SCALES + tl.arange(0, _SCALES)[None, :]
    sf = tl.load(scales + expert * rows * (K // 16) + row * (K // 16) + g, mask=in_rows & (g < K // 16), other=0)
    tl.store(experts + expert * expert_bytes + scales_offset + row * (K_padded // 16) + g, sf, mask=in_rows)


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
        codes, scales, experts, matrix.out_features, matrix.in_features, matrix.padded_k, experts.stride(0),
        matrix.offset, matrix.scales_offset, ROWS=rows, num_warps=4,
    )  # fmt: skip


def unpack(experts: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The inverse, in plain torch: ``(codes uint8 [E, N, K/2], scales float8_e4m3fn [E, N, K/16])``."""
    n, k, padded = matrix.out_features, matrix.in_features, matrix.padded_k
    blocks = experts[:, matrix.offset : matrix.scales_offset].reshape(-1, n, padded // K_BLOCK, K_BLOCK // 2)
    codes = torch.cat((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)[..., :k]
    scales = experts[:, matrix.scales_offset : matrix.end].reshape(-1, n, padded // 16)[..., : k // 16]
    return pack_nibbles(codes).contiguous(), scales.contiguous().view(torch.float8_e4m3fn)
