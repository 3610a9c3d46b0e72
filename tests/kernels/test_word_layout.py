"""The bit layout of packed words, on the CPU: the decoder's instructions, done in numpy, give back every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from dsv4.kernels.triton.packing import chunk_codes, chunk_scales
from dsv4.kernels.triton.weight_layout import code_words, word_codes

MASK = np.uint32(0x81C081C0)


def rotate_right(words: np.ndarray, by: int) -> np.ndarray:
    return (words >> np.uint32(by)) | (words << np.uint32(32 - by))


def decoded_lanes(words: np.ndarray) -> list[np.ndarray]:
    """What the four registers hold after the instructions of ``low_fields`` and ``high_fields``."""
    product = (words & np.uint32(0x001B001B)).astype(np.uint64) * 0x4108
    return [
        words & MASK,
        rotate_right(words, 3) & MASK,
        rotate_right(words, 6) & MASK,
        product.astype(np.uint32) & MASK,
    ]


def test_decoding_gives_the_codes_that_unpacking_gives():
    """For random words: register r holds codes 2r and 2r + 1 of eight, each as sign and magnitude of a bf16."""
    words = np.random.default_rng(0).integers(0, 2**32, 8000, dtype=np.uint32)
    codes = word_codes(torch.from_numpy(words.view(np.int32))).numpy()
    for register, lanes in enumerate(decoded_lanes(words)):
        for lane in (0, 1):
            field = (lanes >> np.uint32(16 * lane)) & np.uint32(0xFFFF)
            code = codes[:, 2 * register + lane].astype(np.uint32)
            assert np.array_equal(field, ((code & 8) << 12) | ((code & 7) << 6))


def test_every_bit_of_a_word_belongs_to_one_code():
    """The 32 words with one bit set unpack to 32 different single-bit codes: the layout is a bijection."""
    words = 1 << torch.arange(32, dtype=torch.int64)
    codes = word_codes(words.to(torch.int32))
    assert sorted(codes.sum(dim=1).tolist()) == sorted([1, 2, 4, 8] * 8)
    places = {(int(row.nonzero()[0]), int(row.max())) for row in codes}
    assert len(places) == 32


def test_words_of_codes_are_the_inverse():
    """Every word comes back from its codes."""
    words = torch.from_numpy(np.random.default_rng(1).integers(-(2**31), 2**31, 8000, dtype=np.int64)).to(torch.int32)
    assert torch.equal(code_words(word_codes(words)), words)


def test_a_field_reads_as_the_value():
    """Sign and magnitude in bits 15 and 8 to 6 are the bf16 number e2m1 * 2^-126, the subnormal 0.5 included."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(16, dtype=torch.int32)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)
    got = bits.to(torch.int16).view(torch.bfloat16).double() * 2.0**126
    assert got.tolist() == values + [-v for v in values]


def test_a_chunk_stands_in_fragment_order():
    """Lane 4g + c holds rows g and g + 8 of a strip, and of 16 values of K those at 2c, 2c + 1, 2c + 8, 2c + 9.

    That is the left operand of ``mma.m16n8k16`` and of ``wgmma`` in registers (PTX ISA, "Matrix fragments"). A word
    that holds eight different codes is put at every place in turn; where they come out is compared with that rule.
    """
    word = 0
    for position, bits in enumerate(([8, 7, 6, 15], [24, 23, 22, 31], [11, 10, 9, 18], [27, 26, 25, 2],
                                     [14, 13, 12, 21], [30, 29, 28, 5], [0, 4, 3, 1], [16, 20, 19, 17])):  # fmt: skip
        m2, m1, m0, sign = bits
        code = position + 1  # 1 to 8: 8 is a negative zero, told apart by its sign
        word |= (code >> 3 << sign) | ((code >> 2 & 1) << m2) | ((code >> 1 & 1) << m1) | ((code & 1) << m0)
    word = word - 2**32 if word >= 2**31 else word
    words = torch.zeros(1, 1024, 1024, dtype=torch.int32)
    words[0, torch.arange(1024), torch.arange(1024)] = word
    codes = chunk_codes(words)[0]  # [place, strip, rh, g, K]
    for place in range(1024):
        strip, piece, lane, w = place // 256, place // 128 % 2, place // 4 % 32, place % 4
        g, c = lane // 4, lane % 4
        want = torch.zeros(4, 2, 8, 128, dtype=torch.uint8)
        for half in (0, 1):
            for row in (0, 1):
                for odd in (0, 1):
                    k = 64 * half + 32 * piece + 16 * (w // 2) + 8 * (w % 2) + 2 * c + odd
                    want[strip, row, g, k] = 1 + 4 * half + 2 * row + odd
        assert torch.equal(codes[place], want), place


def test_scales_of_a_row_stand_together():
    """16 bytes of lane group g: eight scales of row g, eight of row g + 8, the middle two of four exchanged."""
    scales = chunk_scales(torch.arange(512).view(1, 1, 512))[0, 0]  # [strip, rh, g, 8]
    order = [0, 2, 1, 3]
    for strip in range(4):
        for row in (0, 1):
            for g in range(8):
                for column in range(8):
                    byte = 128 * strip + 16 * g + 8 * row + 4 * (column // 4) + order[column % 4]
                    assert scales[strip, row, g, column] == byte
