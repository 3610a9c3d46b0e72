"""The pack kernels on a CPU, by Triton's interpreter: bytes of the torch twin, and codes that unpacking gives back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsv4.kernels.hopper import packing as hopper
from dsv4.kernels.hopper.layout import matrix_bytes, pack_matrix
from dsv4.kernels.triton import packing as portable
from dsv4.kernels.triton.weight_layout import Matrix
from dsv4.nvfp4 import unpack_nibbles
from kernels.interpreter import run

EXPERTS, OFFSET, AFTER = 2, 256, 16


def test_packed_bytes():
    """Both orders of rows, an odd number of blocks, and (portable) sizes that are no multiples of anything."""
    run(__file__)


def random_matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (EXPERTS, n, k // 2), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(0, 0x7F, (EXPERTS, n, k // 16), dtype=torch.uint8, generator=generator)


def poisoned(size: int) -> torch.Tensor:
    return torch.full((EXPERTS, OFFSET + size + AFTER), 0xA5, dtype=torch.uint8)


def check_surroundings(experts: torch.Tensor) -> None:
    assert bool((experts[:, :OFFSET] == 0xA5).all())
    assert bool((experts[:, -AFTER:] == 0xA5).all())


def check_hopper() -> None:
    for n, k in ((128, 128), (256, 384)):
        for gated in (False, True):
            codes, scales = random_matrix(n, k)
            experts = poisoned(matrix_bytes(n, k))
            hopper.pack(codes, scales, experts, OFFSET, gated)
            for e in range(EXPERTS):
                want = pack_matrix(unpack_nibbles(codes[e]), scales[e], gated)
                assert torch.equal(experts[e, OFFSET:-AFTER], want)
            check_surroundings(experts)


def check_portable() -> None:
    for n, k in ((32, 16), (96, 80), (64, 384)):
        for interleaved in (False, True):
            codes, scales = random_matrix(n, k)
            matrix = Matrix(n, k, OFFSET, interleaved)
            experts = poisoned(matrix.end - OFFSET)
            portable.pack(codes, scales, matrix, experts)
            got_codes, got_scales = portable.unpack(experts, matrix)
            assert torch.equal(got_codes, codes)
            assert torch.equal(got_scales.view(torch.uint8), scales)
            check_surroundings(experts)


if __name__ == "__main__":
    check_hopper()
    check_portable()
