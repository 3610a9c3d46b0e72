"""Where a packed weight stands in memory, for the portable grouped GEMM.

A matrix ``[N, K]`` is cut into *chunks* of 64 outputs by 128 values of K. A chunk is one run of 4608 bytes: 4096 of
codes, 512 of block scales. Chunks of the same outputs follow one another along K, so that a program streams one
contiguous region. N and K are padded to whole chunks with zeros.

**Codes stand in fragment order.** Tensor cores want each thread of a warp to hold certain elements of the left operand:
for 16 rows by 16 columns, lane ``4g + c`` holds rows ``g`` and ``g + 8``, columns ``2c, 2c + 1, 2c + 8, 2c + 9``. A
chunk is stored as its threads will hold it, so that one 16-byte load gives a thread whole fragments and decoding leaves
every number in the register where it is multiplied: nothing moves between threads. In order, slowest first::

    strip   4   16 rows each
    piece   2   32 values of K each, in the chunk's low half (K 0..63) and high half (K 64..127)
    lane   32   4g + c
    word    4   2 * (16 values of K) + (8 values of K)

A word holds eight codes: ``(row g, row g + 8) x (K even, K odd)``, once of the low and once of the high half.

**Bits in a word.** Decoding wants two codes at a time in the 16-bit lanes of a register: sign in bit 15, magnitude in
bits 8 to 6, the rest zero. A plain nibble takes four instructions to get there. So the 32 bits of a word are placed
such that most of them stand right after one rotation. In the lane of code ``i`` (lane ``i % 2``)::

    low  0, 1    magnitude 8 7 6       sign 15                       mask
    low  2, 3    magnitude 11 10 9     sign 2, in the other lane     rotate by 3, mask
    high 0, 1    magnitude 14 13 12    sign 5, in the other lane     rotate by 6, mask
    high 2, 3    magnitude 0 4 3       sign 1                        mask, multiply by 2^3 + 2^8 + 2^14, mask

The multiplication moves the four remaining bits at once: no two of its partial products meet in a bit, so nothing
carries. That is two instructions for two codes, one of eight of them off the integer pipe.

**Scales** of a strip are 128 bytes: for each ``g`` the eight scales of row ``g``, then those of row ``g + 8``, again a
16-byte load. Among the four scales of a half, the middle two are exchanged: then one shift and one mask put two of them
into the two lanes of a register.

**Gate and up** are interleaved by 8 rows: row ``g`` of a strip is a gate's, row ``g + 8`` the up of the same feature,
so that a thread holds both and SwiGLU needs no exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.layouts import ceil_div

ROWS, K_BLOCK = 64, 128
"""Outputs, and values of K, of a chunk."""

CODE_BYTES, SCALE_BYTES = ROWS * K_BLOCK // 2, ROWS * K_BLOCK // 16
CHUNK_BYTES = CODE_BYTES + SCALE_BYTES

_WORD_BITS = (
    (6, 7, 8, 15),
    (22, 23, 24, 31),
    (9, 10, 11, 18),
    (25, 26, 27, 2),
    (12, 13, 14, 21),
    (28, 29, 30, 5),
    (3, 4, 0, 1),
    (19, 20, 16, 17),
)
"""Where bits 0 to 3 (the sign) of each of a word's eight codes stand: the table above."""


def word_codes(words: Tensor) -> Tensor:
    """int32 words ``[...]`` -> uint8 codes ``[..., 8]``."""

    def code(places: tuple[int, ...]) -> Tensor:
        bits = [((words >> place) & 1) << i for i, place in enumerate(places)]
        return bits[0] | bits[1] | bits[2] | bits[3]

    return torch.stack([code(places) for places in _WORD_BITS], dim=-1).to(torch.uint8)


def code_words(codes: Tensor) -> Tensor:
    """The inverse: uint8 codes ``[..., 8]`` -> int32 words ``[...]``."""
    words = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for code, places in zip(codes.to(torch.int32).unbind(-1), _WORD_BITS, strict=True):
        for i, place in enumerate(places):
            words |= ((code >> i) & 1) << place
    return words


@dataclass(frozen=True)
class Matrix:
    """One projection of an expert in the packed bytes.

    Attributes:
        out_features: N, gate and up together if they are interleaved; a multiple of 16.
        in_features: K, a multiple of 16.
        offset: first byte.
        interleaved: rows are gate and up by turns of 8.
    """

    out_features: int
    in_features: int
    offset: int
    interleaved: bool = False

    @property
    def row_tiles(self) -> int:
        """Chunks along N."""
        return ceil_div(self.out_features, ROWS)

    @property
    def k_blocks(self) -> int:
        """Chunks along K."""
        return ceil_div(self.in_features, K_BLOCK)

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.row_tiles * self.k_blocks * CHUNK_BYTES
