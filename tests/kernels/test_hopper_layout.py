"""The Hopper layout on a CPU: bijections, and the decoding that the kernel's instructions do, in integers."""

from __future__ import annotations

import importlib
from itertools import product
from types import ModuleType

import pytest
import torch

from dsv4.kernels.hopper.layout import (
    BLOCK_BYTES,
    CODE_BYTES,
    from_image,
    k_order,
    matrix_bytes,
    maxima_place,
    pack_matrix,
    row_order,
    terms_place,
    to_image,
    unpack_matrix,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def random_matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (n, k // 16), dtype=torch.uint8)
    return codes, scales


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384)])
def test_packing_is_a_bijection(n: int, k: int, gated: bool) -> None:
    """Unpacking gives every code and scale back, and the packed bytes are no more than the codes and scales need."""
    codes, scales = random_matrix(n, k)
    packed = pack_matrix(codes, scales, gated)
    assert packed.numel() == matrix_bytes(n, k) == n * k // 2 + n * k // 16
    back_codes, back_scales = unpack_matrix(packed, n, k, gated)
    assert torch.equal(back_codes, codes)
    assert torch.equal(back_scales, scales)


def test_orders_are_permutations() -> None:
    """No value of K and no row is lost or doubled."""
    assert k_order().sort().values.tolist() == list(range(64))
    for gated in (False, True):
        assert row_order(256, gated).sort().values.tolist() == list(range(256))


def test_images_are_bijections() -> None:
    """Rows come back from their image, for a tile of any multiple of eight rows."""
    for tile in (8, 24):
        rows = torch.randn(3 * tile, 128).bfloat16()
        assert torch.equal(from_image(to_image(rows, tile)), rows)


def test_a_thread_multiplies_what_wgmma_pairs() -> None:
    """The product of decoded fragments, placed by wgmma's own operand layout, with the image's tokens is the product
    of the matrix with the tokens: the definition of the layout, from PTX's figures and not from the packing code."""
    n, k, tokens = 128, 256, 8
    codes, scales = random_matrix(n, k)
    scales = scales % 0x48
    packed = pack_matrix(codes, scales, gated=False).view(n // 64, k // 128, BLOCK_BYTES)
    x = torch.randint(-8, 8, (tokens, k)).double()
    image = to_image(x.bfloat16(), tokens)[0].double()  # [k/64, tokens, 64]
    result = torch.zeros(n, tokens, dtype=torch.float64)
    masks = 0x81C081C0
    for m in range(n // 64):
        for block in range(k // 128):
            words = packed[m, block, :CODE_BYTES].view(torch.int32).view(2, 128, 4).long() & 0xFFFFFFFF
            byte = packed[m, block, CODE_BYTES:].view(128, 2, 2).int()
            bits = (byte << 8 | byte) & 0x07F0  # exponent and mantissa, where a bf16 has the low bits of its exponent
            sf = (bits >> 4).to(torch.uint8).view(torch.float8_e4m3fn).double()
            for half in range(2):
                a = torch.zeros(64, 64, dtype=torch.float64)
                for thread in range(128):
                    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
                    for step in range(4):
                        w = int(words[half, thread, step])
                        registers = (
                            w & masks,
                            (w >> 3 | w << 29) & masks,
                            (w >> 6 | w << 26) & masks,
                            ((w & 0x1B001B) * 0x4108) & masks,
                        )
                        for r, register in enumerate(registers):
                            for lane in range(2):
                                bits = register >> (16 * lane) & 0xFFFF
                                code = bits >> 6 & 7 | bits >> 12 & 8
                                # PTX, "Register Fragments" of wgmma .m64nNk16, matrix A.
                                row, column = 16 * warp + g + 8 * (r % 2), 16 * step + 2 * t + lane + 8 * (r // 2)
                                a[row, column] = E2M1[code] * sf[thread, half, r % 2]
                line = image[2 * block + half].view(tokens, 8, 8)
                chunks = torch.stack([line[i, [c ^ (i % 8) for c in range(8)]] for i in range(tokens)])
                result[64 * m : 64 * m + 64] += a @ chunks.reshape(tokens, 64).T
    decoded = E2M1[codes.long()] * scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
    assert torch.equal(result, decoded @ x.T)


def test_warps_meet_over_scale_groups() -> None:
    """The rows of two tiles, warp by warp, are all pairs of all scale groups of 64 of the result; the warps that have a
    pair of a group, in one lane of each, write their maxima where that lane's terms are read, nobody else does, and
    what lanes access together lies in different banks."""
    made = row_order(128, gated=True).view(2, 4, 2, 8)[:, :, 0]  # tile, warp, a chunk's features
    groups = [set(range(16 * lane, 16 * lane + 16)) for lane in range(4)]
    for lane in range(4):
        # After the transposition a lane has the two of its number of each chunk.
        pairs = [made[tile, warp, 2 * lane : 2 * lane + 2].tolist() for tile in range(2) for warp in range(4)]
        assert len(pairs) == 8
        assert sorted(value for pair in pairs for value in pair) == sorted(groups[lane])
    units = range(3)
    lanes = [(unit, lane) for unit in units for lane in range(32)]
    own = {(unit, lane): [32 * (32 * unit + lane) + byte for byte in range(32)] for unit, lane in lanes}
    for unit, lane in lanes:
        maxima = [unit * 1024 + maxima_place(warp, lane) + byte for warp in range(8) for byte in range(4)]
        assert sorted(maxima) == own[unit, lane]
        for number, base in ((lane, unit * 1024), (32 * unit + lane, 0)):  # of a unit, and counted through
            terms = [base + terms_place(half, number) + byte for half in range(2) for byte in range(16)]
            assert sorted(terms) == own[unit, lane]
    for warp in range(8):
        assert len({maxima_place(warp, lane) // 4 % 32 for lane in range(32)}) == 32
    for half, eight in product(range(2), range(0, 32, 8)):  # sixteen bytes each: eight lanes at a time
        assert len({terms_place(half, lane) // 16 % 8 for lane in range(eight, eight + 8)}) == 8


@pytest.fixture
def cute() -> ModuleType:
    """Host functions of CuTe: they run on this machine's memory."""
    pytest.importorskip("cutlass")
    return importlib.import_module("kernels.cute_layouts")


@pytest.mark.parametrize(("tile", "blocks"), [(8, 1), (24, 2), (128, 4)])
def test_images_are_swizzled_as_cute_reads_them(cute: ModuleType, tile: int, blocks: int) -> None:
    """Rows written through the K_SW128 layout, with which the kernel describes its tokens to wgmma, give the image."""
    rows = torch.randn(tile, 64 * blocks).bfloat16()
    permuted = rows.view(tile, blocks, 64)[..., k_order()].reshape(tile, -1).contiguous()
    memory = torch.full((rows.numel() + 512,), torch.nan, dtype=torch.bfloat16)
    image = memory[-memory.data_ptr() % 1024 // 2 :][: rows.numel()]  # the swizzle is one of addresses
    cute.write_image(permuted, image, tile, blocks)
    assert torch.equal(image, to_image(rows, tile).flatten())


def test_fragments_are_cutes(cute: ModuleType) -> None:
    """Each thread's eight values of the 64 x 16 operand stand where CuTe's own layout of wgmma's A operand has them."""
    got = cute.operand_places().view(128, 8)
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for register in range(4):
            for lane in range(2):
                row, column = 16 * warp + g + 8 * (register % 2), 2 * t + lane + 8 * (register // 2)
                assert got[thread, 2 * register + lane] == row + 64 * column
