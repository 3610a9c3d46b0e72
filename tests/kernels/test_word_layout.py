"""The bit layout of packed words, on the CPU: the decoder's instructions, done in numpy, give back every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from dsv4.kernels.triton.packing import word_codes

MASK = np.uint32(0x81C081C0)


def rotate_right(words: np.ndarray, by: int) -> np.ndarray:
    return (words >> np.uint32(by)) | (words << np.uint32(32 - by))


def decoded_lanes(words: np.ndarray) -> list[np.ndarray]:
    """What the four registers hold after the instructions of ``_low_fields`` and ``_high_fields``."""
    product = (words & np.uint32(0x001B001B)).astype(np.uint64) * 0x4108
    return [
        words & MASK,
        rotate_right(words, 3) & MASK,
        rotate_right(words, 6) & MASK,
        product.astype(np.uint32) & MASK,
    ]


def test_decoding_gives_the_codes_that_unpacking_gives():
    """For random words: register r holds codes 2r and 2r + 1 of eight, each as sign and magnitude of a bf16."""
    words = np.random.default_rng(0).integers(0, 2**32, (500, 16), dtype=np.uint32)
    codes = word_codes(torch.from_numpy(words.view(np.int32))).numpy().reshape(500, 2, 16, 4)  # half, word, code
    for register, lanes in enumerate(decoded_lanes(words)):
        half, first = divmod(2 * register, 4)
        for lane in (0, 1):
            field = (lanes >> np.uint32(16 * lane)) & np.uint32(0xFFFF)
            code = codes[:, half, :, first + lane].astype(np.uint32)
            assert np.array_equal(field, ((code & 8) << 12) | ((code & 7) << 6))


def test_every_bit_of_a_word_belongs_to_one_code():
    """The 32 words with one bit set unpack to 32 different single-bit codes: the layout is a bijection."""
    words = torch.zeros(32, 16, dtype=torch.int64)
    words[:, 0] = 1 << torch.arange(32)
    codes = word_codes(words.to(torch.int32))
    assert sorted(codes.sum(dim=1).tolist()) == sorted([1, 2, 4, 8] * 8)
    places = {(int(row.nonzero()[0]), int(row.max())) for row in codes}
    assert len(places) == 32


def test_a_field_reads_as_the_value():
    """Sign and magnitude in bits 15 and 8 to 6 are the bf16 number e2m1 * 2^-126, the subnormal 0.5 included."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(16, dtype=torch.int32)
    bits = ((codes & 8) << 12) | ((codes & 7) << 6)
    got = bits.to(torch.int16).view(torch.bfloat16).double() * 2.0**126
    assert got.tolist() == values + [-v for v in values]
