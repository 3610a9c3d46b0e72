"""NVFP4 in plain torch: every decision that the module documents, and byte equality with the oracle over wide ranges.

Codes and block scales are defined down to the last rounding, so nothing here is compared with a tolerance, except the
errors that 4-over-6 weighs against each other in fp32.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same_bytes, wide_values
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4.errors import InputError
from dsv4.nvfp4 import (
    E2M1_VALUES,
    GS_DIVISOR,
    GS_DIVISOR_4_OVER_6,
    GS_MIN,
    Nvfp4Tensor,
    decode_e2m1,
    encode_e2m1,
    finite_row_amax,
    global_scale,
    pack_nibbles,
    quantize_blocks,
    quantize_blocks_4_over_6,
    unpack_nibbles,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAN_SF = 0x7F

SEEDS = st.integers(0, 2**32 - 1)
# Exponents (base 2) of wide_values: from all of fp32, subnormals included, down to a single binade.
EXPONENTS = st.tuples(st.floats(-149, 127.9), st.floats(-149, 127.9)).map(sorted)


def blocks(*values: float, rows: int = 1) -> torch.Tensor:
    """One block of 16 a row: the given values, then zeros."""
    return torch.tensor([*values, *[0.0] * (16 - len(values))]).repeat(rows, 1)


def codes_of(fp4: torch.Tensor) -> list[list[int]]:
    return oracle.unpack(fp4).tolist()


def sf_bytes(sf: torch.Tensor) -> list[list[int]]:
    return sf.view(torch.uint8).tolist()


ONE = torch.tensor(1.0)


# e2m1 and nibbles.


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_decode_every_code(device, dtype):
    """All 16 codes have their exact value in every floating dtype; code 8 is a negative zero; the table agrees."""
    got = decode_e2m1(torch.arange(16, dtype=torch.uint8, device=device), dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.double().cpu().numpy(), oracle.E2M1)
    assert got.signbit().tolist() == [False] * 8 + [True] * 8
    assert np.array(E2M1_VALUES).tobytes() == oracle.E2M1.tobytes()


def test_encode_is_the_inverse_of_decode(device):
    """Every representable value has its own code, both zeros included."""
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)


def test_encode_ties_and_their_neighbours(device):
    """Ties go to the even code; the fp32 numbers on either side of one go to their own side; both signs."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)
    below, above = torch.nextafter(ties, ties - 1), torch.nextafter(ties, ties + 1)
    for x, want in ((ties, [0, 2, 2, 4, 4, 6, 6]), (below, [0, 1, 2, 3, 4, 5, 6]), (above, [1, 2, 3, 4, 5, 6, 7])):
        assert encode_e2m1(x).tolist() == want
        assert encode_e2m1(-x).tolist() == [code + 8 for code in want]


def test_encode_saturates_and_keeps_signs():
    """Beyond 6, Inf and NaN: magnitude 6. Whatever rounds to zero keeps its sign."""
    x = torch.tensor([6.1, 1e38, math.inf, math.nan, 0.0, 1e-45, 0.2])
    assert encode_e2m1(x).tolist() == [7, 7, 7, 7, 0, 0, 0]
    assert encode_e2m1(-x).tolist() == [15, 15, 15, 15, 8, 8, 8]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=16, max_size=16))
def test_encode_finds_the_nearest_value(values):
    """Any fp32 number gets the code that the oracle's search finds."""
    x = torch.tensor([values])
    sf_of_one = np.array([[0x38]], np.uint8)
    np.testing.assert_array_equal(encode_e2m1(x).numpy(), oracle.encode_values(x, sf_of_one, 1.0))


def test_nibbles(device):
    """The even index stands low; unpacking is the inverse of packing for all 256 bytes and in any shape."""
    assert pack_nibbles(torch.tensor([1, 2, 3, 15], dtype=torch.uint8, device=device)).tolist() == [0x21, 0xF3]
    every_byte = torch.arange(256, dtype=torch.uint8, device=device).view(2, 4, 32)
    codes = unpack_nibbles(every_byte)
    assert codes.shape == (2, 4, 64)
    np.testing.assert_array_equal(codes.cpu().numpy(), oracle.unpack(every_byte))
    assert torch.equal(pack_nibbles(codes), every_byte)


# The corner cases of the module's table, one test a row.


def test_ties_in_a_block(device):
    """Ties are decided on x / (sf * gs), to even: here sf = 1 and gs = 2."""
    x = 2 * blocks(6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5).to(device)
    fp4, sf = quantize_blocks(x, 2 * ONE.to(device))
    assert sf_bytes(sf) == [[0x38]]
    assert codes_of(fp4)[0][:8] == [7, 0, 2, 2, 4, 4, 6, 6]


def test_zeros_keep_their_sign(device):
    """Code 0 or 8 for a zero, and for a value too small for its block, after the sign of the input."""
    fp4, _ = quantize_blocks(blocks(6, 0.0, -0.0, 1e-30, -1e-30, 0.25, -0.25).to(device), ONE.to(device))
    assert codes_of(fp4)[0][:7] == [7, 0, 8, 0, 8, 0, 8]


def test_scale_that_rounds_to_zero(device):
    """Half of the least e4m3 step is a tie and rounds to 0: codes are 0, whatever the signs. Just above, sf lives."""
    half_step = 6 * 2.0**-10
    x = blocks(-half_step, half_step, -0.0, -half_step / 3).to(device)
    fp4, sf = quantize_blocks(x, ONE.to(device))
    assert sf_bytes(sf) == [[0]]
    assert not fp4.any()
    fp4, sf = quantize_blocks(x * (1 + 2.0**-20), ONE.to(device))
    assert sf_bytes(sf) == [[1]]
    assert codes_of(fp4)[0][:4] == [8 + 5, 5, 8, 8 + 2]  # 3 -> 3, 1 -> 1 in units of 2^-9


@pytest.mark.parametrize("byte", range(1, 8))
def test_subnormal_scales_are_used(device, byte):
    """sf = byte * 2^-9 is stored and divided by as it is."""
    x = blocks(6 * byte * 2.0**-9, -byte * 2.0**-9).to(device)
    fp4, sf = quantize_blocks(x, ONE.to(device))
    assert sf_bytes(sf) == [[byte]]
    assert codes_of(fp4)[0][:2] == [7, 8 + 2]


@pytest.mark.parametrize("value", [0.0, -0.0, np.nextafter(np.float32(2688 * GS_MIN), np.float32(0)), -1e-40])
def test_all_zero_and_tiny_tensors(device, value):
    """A tensor of zeros, or one whose gs would be below 2^-100: gs = 1, sf = 0, codes 0."""
    q = Nvfp4Tensor.quantize(torch.full((2, 32), float(value), device=device))
    assert q.gs.item() == 1
    assert not q.sf.view(torch.uint8).any()
    assert not q.codes.any()


def test_smallest_global_scale(device):
    """amax = 2688 * 2^-100 is not tiny yet: gs = 2^-100, sf = 448, and the tensor survives."""
    x = torch.full((1, 16), 2688 * GS_MIN, device=device)
    q = Nvfp4Tensor.quantize(x)
    assert q.gs.item() == GS_MIN
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_block(device, bad, dtype):
    """sf = 0x7F and codes 0 in the block that holds it; it decodes to NaN; no other block changes, in any row."""
    x = torch.linspace(-3, 3, 3 * 48, device=device).view(3, 48).to(dtype)
    want_fp4, want_sf = quantize_blocks(x, ONE.to(device))
    x[1, 20] = bad
    fp4, sf = quantize_blocks(x, ONE.to(device))
    assert sf.view(torch.uint8)[1, 1] == NAN_SF
    assert not fp4[1, 8:16].any()
    decoded = Nvfp4Tensor(fp4, sf, ONE.to(device)).dequantize()
    assert decoded[1, 16:32].isnan().all()
    others = torch.ones(3, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    assert torch.equal(sf.view(torch.uint8)[others], want_sf.view(torch.uint8)[others])
    assert torch.equal(fp4.view(3, 3, 8)[others], want_fp4.view(3, 3, 8)[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_row_is_left_out_of_the_amax(device, bad):
    """A bad row does not count, not even its finite values; if all rows are bad, gs = 1."""
    x = torch.ones(3, 32, device=device)
    x[1, 0], x[1, 31] = 1000.0, bad
    q = Nvfp4Tensor.quantize(x)
    assert q.gs.item() == np.float32(1) / np.float32(GS_DIVISOR)
    assert finite_row_amax(x).tolist() == [1, 0, 1]
    assert Nvfp4Tensor.quantize(x[1:2]).gs.item() == 1


def test_saturation_under_a_small_global_scale(device):
    """With gs a quarter of what the data needs, sf stops at 448 and the codes at 6, signs kept."""
    fp4, sf = quantize_blocks(2688 * 4 * blocks(1, -1, 0.05).to(device), ONE.to(device))
    assert sf_bytes(sf) == [[0x7E]]
    assert codes_of(fp4)[0][:3] == [7, 15, 2]  # 0.05 * 2688 * 4 / 448 = 1.2 -> 1


def test_no_double_rounding_through_bf16(device):
    """gs of bf16 data is the fp32 quotient, not a bf16 number."""
    x = torch.full((1, 16), 1.0, dtype=torch.bfloat16, device=device)
    gs = Nvfp4Tensor.quantize(x).gs
    assert gs.dtype == torch.float32
    assert gs.item() == np.float32(1) / np.float32(2688)
    assert gs.item() != gs.bfloat16().item()
    assert global_scale(x[0, 0]).item() == gs.item()


# Byte equality with the oracle.


@given(EXPONENTS, st.sampled_from(FLOATS), SEEDS)
def test_own_scale_gives_the_oracles_bytes(exponents, dtype, seed):
    """One gs for the tensor: gs, scales and codes are the oracle's, from subnormals up to the largest numbers."""
    x = wide_values((5, 64), *exponents, dtype, seed)  # in fp16 the large ones are Inf, the small ones 0
    q = Nvfp4Tensor.quantize(x)
    want = oracle.quantize(x)
    assert q.gs.item() == want[2]
    assert_same_bytes(q.codes, q.sf, want)


@given(EXPONENTS, st.sampled_from(FLOATS), SEEDS, st.lists(st.floats(-100, 124), min_size=1, max_size=8))
def test_given_scales_give_the_oracles_bytes(exponents, dtype, seed, log_gs):
    """One gs a row, fitting the data or not: blocks that saturate, vanish or land in subnormal scales included."""
    x = wide_values((len(log_gs), 48), *exponents, dtype, seed)
    gs = torch.exp2(torch.tensor(log_gs)).unsqueeze(1)
    assert_same_bytes(*quantize_blocks(x, gs), oracle.quantize(x, gs))


@given(st.floats(-120, 120), st.sampled_from(FLOATS), SEEDS)
def test_fitting_scales_give_the_oracles_bytes(exponent, dtype, seed):
    """Rows of three binades, each with its own gs from its own amax, the usual case: all codes are in use."""
    x = wide_values((64, 64), exponent, exponent + 3, dtype, seed)
    gs = global_scale(finite_row_amax(x))
    np.testing.assert_array_equal(gs.numpy(), oracle.global_scale(oracle.row_amax(x)))
    assert_same_bytes(*quantize_blocks(x, gs.unsqueeze(1)), oracle.quantize(x, gs))


ANY_FLOAT = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-38, 3e38, math.nan, -math.inf, 2688.0, 448.0, 6.0, -5.0]),
)


@given(st.lists(ANY_FLOAT, min_size=32, max_size=32), st.sampled_from(FLOATS))
def test_adversarial_values_give_the_oracles_bytes(values, dtype):
    """Hand-picked extremes next to arbitrary numbers, NaN and Inf too: bytes and gs are the oracle's."""
    x = torch.tensor(values).view(2, 16).to(dtype)
    q = Nvfp4Tensor.quantize(x)
    want = oracle.quantize(x)
    assert q.gs.item() == want[2]
    assert_same_bytes(q.codes, q.sf, want)


@given(st.integers(1, 0x7E), st.integers(0, 0x7E), st.integers(-90, 90), SEEDS)
def test_exact_and_halfway_quotients(sf, other_sf, exponent, seed):
    """Blocks of multiples of a quarter step, so that a third of the values are ties: bytes are the oracle's."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(-24, 25, (1, 32)) / 4.0
    quarters[0, ::16] = 6
    steps = np.repeat(oracle.e4m3_decode(np.array([sf, other_sf])), 16) * 2.0**exponent
    x = torch.from_numpy((quarters * steps).astype(np.float32))
    gs = torch.tensor(2.0**exponent)
    fp4, got_sf = quantize_blocks(x, gs)
    assert sf_bytes(got_sf) == [[sf, other_sf]]
    assert_same_bytes(fp4, got_sf, oracle.quantize(x, gs))


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_on_the_device(device, dtype):
    """The same on every device: 200 thousand values over 20 binades, with one gs and with one a row."""
    x = wide_values((200, 1024), -10, 10, dtype, seed=1)
    x[7, 100], x[8, 200] = math.nan, math.inf
    q = Nvfp4Tensor.quantize(x.to(device))
    want = oracle.quantize(x)
    assert q.gs.item() == want[2]
    assert_same_bytes(q.codes, q.sf, want)
    gs = global_scale(finite_row_amax(x.to(device)))
    assert_same_bytes(*quantize_blocks(x.to(device), gs.unsqueeze(1)), oracle.quantize(x, gs))


# Nvfp4Tensor.


@given(EXPONENTS, SEEDS)
def test_dequantize_is_exact_but_for_one_rounding(exponents, seed):
    """float64 is the exact product, float32 its nearest number (the product of code and scale is exact)."""
    q = Nvfp4Tensor.quantize(wide_values((3, 32), *exponents, torch.float32, seed))
    exact = oracle.dequantize(q.codes, q.sf, q.gs)
    np.testing.assert_array_equal(q.dequantize(torch.float64).numpy(), exact)
    np.testing.assert_array_equal(q.dequantize().numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_to_narrow_dtypes(dtype):
    """bf16 and fp16 are the fp32 result, rounded; without a global scale nothing is rounded at all."""
    q = Nvfp4Tensor.quantize(wide_values((4, 64), -8, 3, torch.float32, seed=2))
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))
    bare = dataclasses.replace(q, gs=ONE)
    assert torch.equal(bare.dequantize(dtype).double(), bare.dequantize(torch.float64))


def test_quantize_many_dimensions():
    """``[..., K]`` is quantized as its rows are, under one gs; ``shape`` is that of the decoded tensor."""
    x = wide_values((2, 3, 32), -4, 4, torch.float32, seed=3)
    q = Nvfp4Tensor.quantize(x)
    assert q.shape == x.shape == q.dequantize().shape
    assert (q.codes.shape, q.sf.shape, q.gs.shape) == ((2, 3, 16), (2, 3, 2), ())
    assert_same_bytes(q.codes.flatten(0, 1), q.sf.flatten(0, 1), oracle.quantize(x.flatten(0, 1)))


def test_quantize_nothing():
    """No rows: no codes, no scales, gs = 1."""
    q = Nvfp4Tensor.quantize(torch.empty(0, 32))
    assert (q.codes.shape, q.sf.shape, q.gs.item()) == ((0, 16), (0, 2), 1)


def test_strided_input():
    """A transposed view is quantized as its contiguous copy."""
    x = wide_values((32, 48), -3, 3, torch.bfloat16, seed=4).t()
    assert_same_bytes(*quantize_blocks(x, ONE), oracle.quantize(x.contiguous(), 1.0))


def test_the_input_is_left_alone():
    """Quantizing writes nothing into its input."""
    x = wide_values((4, 32), -3, 3, torch.float32, seed=5)
    before = x.clone()
    Nvfp4Tensor.quantize(x)
    Nvfp4Tensor.quantize(x, four_over_six=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [lambda x: quantize_blocks(x, ONE), lambda x: quantize_blocks_4_over_6(x, ONE)])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(2, 24), r"multiple of 16.*\(2, 24\)"),
        (torch.tensor(1.0), "multiple of 16"),
        (torch.zeros(2, 16, dtype=torch.int32), "floating-point.*int32"),
    ],
)
def test_bad_input(function, x, match):
    """A wrong shape or dtype is refused with what was found."""
    with pytest.raises(InputError, match=match):
        function(x)


@pytest.mark.parametrize(
    ("codes", "sf", "match"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.float8_e4m3fn), "uint8"),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1), "float8_e4m3fn"),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.float8_e4m3fn), "belong together"),
        (torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.float8_e4m3fn), "belong together"),
    ],
)
def test_parts_that_do_not_belong_together(codes, sf, match):
    """An Nvfp4Tensor of wrong dtypes, or of codes and scales of different shapes, is refused."""
    with pytest.raises(InputError, match=match):
        Nvfp4Tensor(codes, sf, ONE)


# 4-over-6.


@dataclasses.dataclass
class Candidate:
    """An encoding of all blocks: codes ``[M, B, 16]``, scale bytes ``[M, B]``, squared errors / gs^2 ``[M, B]``."""

    codes: np.ndarray
    sf: np.ndarray
    error: np.ndarray


def candidates(x: torch.Tensor, gs: torch.Tensor) -> list[Candidate]:
    """The oracle's two encodings: each block's maximum at 6, and at 4."""
    x32 = oracle.as_numpy(x).astype(np.float32)
    x_blocks = x32.reshape(len(x32), -1, 16)
    result = []
    for factor in (np.float32(1), np.float32(1.5)):
        sf = oracle.encode_scales(np.abs(x_blocks).max(axis=-1) / np.float32(6) / gs.numpy() * factor)
        codes = oracle.encode_values(x32, sf, gs).reshape(x_blocks.shape)
        decoded = oracle.e2m1_decode(codes) * oracle.e4m3_decode(sf)[..., None]
        error = (decoded - x_blocks.astype(np.float64) / gs.double().numpy()) ** 2
        result.append(Candidate(codes, sf, error.sum(axis=-1)))
    return result


@given(st.floats(-85, 120), st.floats(0, 6), st.sampled_from([torch.float32, torch.bfloat16]), SEEDS)
def test_4_over_6_keeps_the_better_of_two(exponent, binades, dtype, seed):
    """Every block is one of the exhaustive oracle's two encodings, and none is worse than the other one.

    The library weighs errors in fp32: x / gs and the difference from it are rounded (2^-24 relative to x / gs each),
    so a root of a sum of squares is off by 2^-23 of the block's norm at most, and by 16 roundings of its own.
    """
    x = wide_values((32, 64), exponent, exponent + binades, dtype, seed)
    q = Nvfp4Tensor.quantize(x, four_over_six=True)
    assert q.gs.item() == oracle.global_scale(oracle.row_amax(x).max(), 1536)
    codes, sf = oracle.unpack(q.codes).reshape(32, 4, 16), oracle.as_numpy(q.sf)
    six, four = candidates(x, q.gs)
    is_six, is_four = ((sf == c.sf) & (codes == c.codes).all(axis=-1) for c in (six, four))
    assert (is_six | is_four).all()
    error = np.where(is_six, six.error, four.error)
    norm = np.linalg.norm((oracle.as_numpy(x).astype(np.float64) / q.gs.item()).reshape(32, 4, 16), axis=-1)
    best = np.minimum(six.error, four.error)
    assert (np.sqrt(error) <= np.sqrt(best) * (1 + 16 * 2.0**-24) + 2.0**-23 * norm).all()


def test_4_over_6_uses_both(device):
    """On Gaussian data both choices occur, and the squared error falls below that of plain NVFP4 with its own gs.

    Under the same gs no block is worse. (Errors in float64; a block where both choices are equal is equal to the bit.)
    """
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 256))).float().to(device)

    def error(q: Nvfp4Tensor) -> torch.Tensor:
        return (q.dequantize(torch.float64) - x).square().unflatten(1, (-1, 16)).sum(dim=-1)

    adaptive, plain = Nvfp4Tensor.quantize(x, four_over_six=True), Nvfp4Tensor.quantize(x)
    same_gs = Nvfp4Tensor(*quantize_blocks(x, adaptive.gs), adaptive.gs)
    share = (adaptive.sf.view(torch.uint8) != same_gs.sf.view(torch.uint8)).float().mean().item()
    assert 0.2 < share < 0.8
    assert (error(adaptive) <= error(same_gs)).all()
    assert error(adaptive).sum() < 0.9 * error(plain).sum()


def test_4_over_6_by_hand(device):
    """12 and 9: 6 and 4.5 (rounded to 4) under sf = 2, but 4 and 3 under sf = 3. Either is exact for 12 alone: 6 stays.

    Zero and NaN blocks are those of plain quantizing; a scale per row is honoured.
    """
    x = torch.cat([blocks(12, 9), blocks(12, -12), blocks(), blocks(1, math.nan)], dim=1).repeat(2, 1).to(device)
    x[1] *= 4
    fp4, sf = quantize_blocks_4_over_6(x, torch.tensor([[1.0], [4.0]], device=device))
    assert (fp4.dtype, fp4.shape, sf.dtype, sf.shape) == (torch.uint8, (2, 32), torch.float8_e4m3fn, (2, 4))
    for row in range(2):
        np.testing.assert_array_equal(oracle.e4m3_decode(sf)[row], [3, 2, 0, np.nan])
        codes = codes_of(fp4)[row]
        assert (codes[:2], codes[16:18]) == ([6, 5], [7, 15])
        assert not any(codes[32:])


@pytest.mark.parametrize("exponent", [-95, -60, 60, 100, 116])
def test_4_over_6_does_not_depend_on_units(device, exponent):
    """Data times a power of two gets the same codes and scales, though squared errors would leave fp32's range."""
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((16, 64))).float().to(device) * 256
    want, got = (Nvfp4Tensor.quantize(y, four_over_six=True) for y in (x, x * 2.0**exponent))
    assert got.gs.item() == want.gs.item() * 2.0**exponent
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.sf.view(torch.uint8), want.sf.view(torch.uint8))


def test_divisors():
    """2688 = 6 * 448 fills e4m3; 1536 = 6 * 256 leaves room for 1.5 times the largest scale."""
    assert (GS_DIVISOR, GS_DIVISOR_4_OVER_6) == (2688, 1536)
    assert 1.5 * GS_DIVISOR_4_OVER_6 / 6 <= 448


# On the device, without the host.

FUNCTIONS = {
    "encode": encode_e2m1,
    "decode": lambda x: decode_e2m1(x.to(torch.uint8)),
    "pack": lambda x: pack_nibbles(x.to(torch.uint8)),
    "unpack": lambda x: unpack_nibbles(x.to(torch.uint8)),
    "amax": finite_row_amax,
    "global_scale": global_scale,
    "quantize_blocks": lambda x: quantize_blocks(x, global_scale(finite_row_amax(x)).unsqueeze(-1)),
    "quantize_blocks_4_over_6": lambda x: quantize_blocks_4_over_6(x, global_scale(finite_row_amax(x)).unsqueeze(-1)),
    "quantize": lambda x: vars(Nvfp4Tensor.quantize(x)).values(),
    "quantize_4_over_6": lambda x: vars(Nvfp4Tensor.quantize(x, four_over_six=True)).values(),
    "dequantize": lambda x: Nvfp4Tensor.quantize(x).dequantize(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_host_synchronisation(no_host_sync, device, name):
    """Nothing reads a value on the host or has a shape that depends on values."""
    x = torch.ones(4, 32, device=device)
    with no_host_sync():
        FUNCTIONS[name](x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_without_values(name):
    """Fake and meta tensors pass through, with the shapes and dtypes of the real results."""

    def signature(result):
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        return [(t.shape, t.dtype) for t in tensors]

    want = signature(FUNCTIONS[name](torch.ones(4, 32)))
    assert signature(FUNCTIONS[name](torch.ones(4, 32, device="meta"))) == want
    with FakeTensorMode():
        assert signature(FUNCTIONS[name](torch.ones(4, 32))) == want
