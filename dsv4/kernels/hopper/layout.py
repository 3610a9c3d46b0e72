"""Where every code and scale of a weight matrix stands: the layout of :mod:`dsv4.kernels.hopper.grouped_gemm`.

A thread of a warpgroup is ``32 w + 4 g + t`` (warp, row in a group of eight, column of four). Of a 64 x 64 tile it
multiplies rows ``16 w + g`` and ``16 w + g + 8``; of each row, in step k of four, slots ``j`` of four. wgmma puts those
slots at place ``16 k + 2 t + j % 2 + 8 (j // 2)`` of the tokens' K; this layout puts value ``16 t + 4 k + j`` of the
weights there, so that a thread's sixteen values of a row are one scale group.

The eight codes of a step, register by register and lane by lane, are a word: its bits stand as in
:mod:`dsv4.kernels.triton.weight_layout`. The four scales of a thread in 128 of K follow, half by half, upper row before
lower; each byte's halves have traded places, so that the same byte twice has the scale's seven bits where bf16 has the
last of its exponent and the first of its mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.triton.weight_layout import code_words, word_codes

BLOCK_ROWS, BLOCK_K = 64, 128
CODE_BYTES = BLOCK_ROWS * BLOCK_K // 2
BLOCK_BYTES = CODE_BYTES + BLOCK_ROWS * BLOCK_K // 16


def k_order() -> Tensor:
    """int64 ``[64]``: which value of K stands at each place."""
    place = torch.arange(64)
    k, c = place // 16, place % 16
    t, j = (c % 8) // 2, c % 2 + 2 * (c // 8)
    return 16 * t + 4 * k + j


def row_order(rows: int, gated: bool) -> Tensor:
    """int64 ``[rows]``: which row of the checkpoint stands at each place.

    Gated rows are ``[gate | up]``; warp w of tile m gets eight features and their ups, the eight of chunk
    ``2 w + m % 2`` of block ``m // 2`` of the result's image.
    """
    place = torch.arange(rows)
    if not gated:
        return place
    tile, warp, up, g = place // 64, place % 64 // 16, place % 16 // 8, place % 8
    chunk = 2 * warp + tile % 2
    return tile // 2 * 64 + k_order()[chunk * 8 + g] + up * (rows // 2)


def pack_matrix(codes: Tensor, scales: Tensor, gated: bool) -> Tensor:
    """The twin of the pack kernel, one expert at a time.

    Args:
        codes: uint8 ``[N, K]``, one code each; N a multiple of 64 and K of 128.
        scales: uint8 ``[N, K/16]``.
        gated: see :func:`row_order`.

    Returns:
        uint8 ``[N/64 * K/128 * BLOCK_BYTES]``.
    """
    n, k = codes.shape
    order = row_order(n, gated).to(codes.device)
    tile = codes[order].view(n // 64, 4, 2, 8, k // 128, 2, 4, 4, 2, 2)  # m, w, h, g, block, half, t, k, jh, jl
    # -> m, block, half, w, g, t, k, (jh, h, jl): four registers of two lanes
    word = code_words(tile.permute(0, 4, 5, 1, 3, 6, 7, 8, 2, 9).flatten(7))
    code_bytes = word.view(torch.uint8).view(n // 64, k // 128, CODE_BYTES)
    sf = scales[order].view(n // 64, 4, 2, 8, k // 128, 2, 4)  # m, w, h, g, block, half, t
    scale_bytes = swapped(sf.permute(0, 4, 1, 3, 6, 5, 2).reshape(n // 64, k // 128, -1))
    return torch.cat([code_bytes, scale_bytes], -1).flatten()


def unpack_matrix(packed: Tensor, n: int, k: int, gated: bool) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack_matrix`: ``(codes uint8 [n, k], scales uint8 [n, k/16])``."""
    blocks = packed.view(n // 64, k // 128, BLOCK_BYTES)
    code = word_codes(blocks[..., :CODE_BYTES].contiguous().view(torch.int32))
    # m, block, half, w, g, t, k, jh, h, jl -> m, w, h, g, block, half, t, k, jh, jl
    code = code.view(n // 64, k // 128, 2, 4, 8, 4, 4, 2, 2, 2).permute(0, 3, 8, 4, 1, 2, 5, 6, 7, 9)
    sf = swapped(blocks[..., CODE_BYTES:]).reshape(n // 64, k // 128, 4, 8, 4, 2, 2).permute(0, 2, 6, 3, 1, 5, 4)
    order = row_order(n, gated).to(packed.device)
    codes, scales = packed.new_empty(n, k), packed.new_empty(n, k // 16)
    codes[order], scales[order] = code.reshape(n, k), sf.reshape(n, k // 16)
    return codes, scales


def swapped(scales: Tensor) -> Tensor:
    """uint8, upper and lower half of each byte in each other's place; its own inverse."""
    return scales << 4 | scales >> 4


def to_image(rows: Tensor, tile: int) -> Tensor:
    """bf16 ``[R, K]`` -> the image ``[R/tile, K/64, tile, 64]`` that the GEMM multiplies."""
    k = rows.shape[1]
    chunks = rows.view(-1, tile, k // 64, 64)[..., k_order().to(rows.device)].view(-1, tile, k // 64, 8, 8)
    return _swizzled(chunks.permute(0, 2, 1, 3, 4)).reshape(-1, k // 64, tile, 64)


def from_image(image: Tensor) -> Tensor:
    """The inverse of :func:`to_image`."""
    tiles, blocks, tile, _ = image.shape
    chunks = _swizzled(image.view(tiles, blocks, tile, 8, 8)).permute(0, 2, 1, 3, 4).reshape(-1, blocks, 64)
    rows = torch.empty_like(chunks)
    rows[..., k_order().to(image.device)] = chunks
    return rows.reshape(-1, blocks * 64)


def _swizzled(chunks: Tensor) -> Tensor:
    """``[.., rows, 8, 8]``: chunk c of row r trades places with chunk ``c ^ (r % 8)``."""
    rows = torch.arange(chunks.shape[-3], device=chunks.device)
    source = torch.arange(8, device=chunks.device)[None, :] ^ (rows % 8)[:, None]
    return torch.gather(chunks, -2, source[..., None].expand(chunks.shape))


def matrix_bytes(rows: int, k: int) -> int:
    """Of a packed matrix."""
    return rows // BLOCK_ROWS * (k // BLOCK_K) * BLOCK_BYTES


# What two warpgroups tell each other about scale groups, 1024 bytes for each 16 tokens: 32 bytes for each of the lanes,
# which in eight warps have a pair each of the same two groups, one of each eight tokens. Places are swizzled so that
# lanes that access shared memory together use different banks. Lanes of the next 16 tokens count on from 32.


def maxima_place(warp, lane):
    """Where a warp of eight puts the largest magnitudes of a lane's two pairs, a word."""
    return lane * 32 + (warp ^ (lane // 4 % 8)) * 4


def terms_place(half, lane):
    """Where what quantizes a lane's scale group of either eight tokens is, four words: in the place of the maxima."""
    first = lane // 4 % 2 * 16
    return lane * 32 + (first if half == 0 else 16 - first)
