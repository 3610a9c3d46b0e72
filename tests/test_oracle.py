"""The oracle itself, against values worked out by hand, exact fractions and torch's float8."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import (
    OracleWeights,
    dequantize,
    e2m1_decode,
    e4m3_decode,
    encode_scales,
    encode_values,
    global_scale,
    midpoint_distance,
    moe_layer,
    nearest_reference,
    pack,
    quantize,
    random_weights,
    relative_l2,
    round_to_bf16,
    row_amax,
    unpack,
)

ONE = 0x38  # the e4m3 byte of 1.0
BF16 = {"activation_format": "bf16", "activation_scale": "static"}
W4A4 = {"activation_format": "nvfp4"}


def test_e2m1_values():
    """All 16 codes, as the format lists them; code 8 is a negative zero."""
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1_decode(np.arange(16)).tolist() == magnitudes + [-m for m in magnitudes]
    assert np.signbit(e2m1_decode(np.array([8])))[0]


def test_e4m3_values_are_those_of_torch():
    """All 256 bytes decode as torch's float8_e4m3fn does, NaNs included."""
    every_byte = torch.arange(256, dtype=torch.uint8)
    want = every_byte.view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(e4m3_decode(every_byte), want)
    assert np.isnan(want).sum() == 2


def test_even_index_is_in_the_low_nibble():
    """Bytes hold the even K index low; packing is the inverse of unpacking."""
    assert unpack(np.array([[0x21, 0xF3]], np.uint8)).tolist() == [[1, 2, 3, 15]]
    every_byte = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pack(unpack(every_byte)), every_byte)


def test_dequantize_by_hand():
    """``e2m1 * sf * gs``: each block of 16 has its own sf, each row its own gs where there are several."""
    fp4 = np.full((2, 16), 0x72, np.uint8)  # 1, 6, 1, 6, ...
    sf = np.array([[ONE, ONE + 8], [0, 1]], np.uint8)  # 1, 2; 0, 2^-9
    want = [[0.5, 3.0] * 8 + [1.0, 6.0] * 8, [0.0] * 16 + [2 * 2.0**-9, 12 * 2.0**-9] * 8]
    np.testing.assert_array_equal(dequantize(fp4, sf, np.array([[0.5], [2.0]])), want)


def test_scale_rounding_is_that_of_torch():
    """Midpoints of neighbouring e4m3 values, their fp32 neighbours and random scales round as torch's cast does."""
    values = e4m3_decode(np.arange(0x7F)).astype(np.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    rng = np.random.default_rng(0)
    scales = np.concatenate(
        [
            values,
            midpoints,
            np.nextafter(midpoints, np.float32(0)),
            np.nextafter(midpoints, np.float32(448)),
            rng.uniform(0, 448, 500),
            2 ** rng.uniform(-14, 8.8, 500),
        ]
    ).astype(np.float32)
    want = torch.from_numpy(scales).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(encode_scales(scales), want)
    assert encode_scales(np.array([449, np.inf, np.nan], np.float32)).tolist() == [0x7E, 0x7E, 0x7F]


def _nearest_code(x: Fraction) -> int:
    """The nearest magnitude code in exact arithmetic, ties to the even code."""
    return min(range(8), key=lambda code: (abs(Fraction(float(e2m1_decode(np.array(code)))) - x), code & 1))


@given(st.lists(st.floats(0, 16, width=32), min_size=16, max_size=16), st.integers(1, 0x7E))
def test_values_round_as_fractions_do(magnitudes, sf):
    """Codes are the nearest values in exact arithmetic, for every block scale; saturation included."""
    x = np.array([magnitudes], np.float32)
    step = e4m3_decode(np.array([[sf]]))
    scaled = (x * step).astype(np.float32)
    quotient = scaled / step.astype(np.float32)
    want = [[_nearest_code(Fraction(float(q))) for q in quotient[0]]]
    assert encode_values(scaled, np.array([[sf]], np.uint8), 1.0).tolist() == want
    assert encode_values(-scaled, np.array([[sf]], np.uint8), 1.0).tolist() == [[code + 8 for code in want[0]]]


def test_ties_by_hand():
    """The specification's ties: .25->0 .75->1 1.25->1 1.75->2 2.5->2 3.5->4 5->4."""
    x = np.zeros((1, 16), np.float32)
    x[0, :7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    codes = encode_values(x, np.array([[ONE]], np.uint8), 1.0)
    assert e2m1_decode(codes)[0, :7].tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_quantize_by_hand():
    """A tensor with gs = 1/2 worked out by hand: largest block at 448, a smaller one, ties, signs, a zero block."""
    x = np.zeros((1, 48), np.float32)
    x[0, :3] = [1344, -112, 0]  # 2688 / 2: gs = 0.5, sf = 1344 / 6 / 0.5 = 448, one unit is 224
    x[0, 16:19] = [-3, 1.25, -0.0]  # sf = 3 / 6 / 0.5 = 1, one unit is 0.5
    fp4, sf, gs = quantize(x)
    codes = unpack(fp4)
    assert gs == 0.5
    assert sf.tolist() == [[0x7E, ONE, 0]]
    assert codes[0, :3].tolist() == [7, 8 + 1, 0]
    assert codes[0, 16:19].tolist() == [8 + 7, 4, 8]  # 1.25 / 0.5 = 2.5 -> 2, code 4
    assert not codes[0, 32:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_blocks(bad):
    """A block with a NaN or Inf: sf 0x7F, codes 0; its row does not count in the tensor's amax; per-row scale 1."""
    x = np.ones((2, 32), np.float32)
    x[1, 20], x[1, 3] = bad, 1000
    fp4, sf, gs = quantize(x)
    assert gs == np.float32(1) / np.float32(2688)
    assert sf.tolist() == [[0x7E, 0x7E], [0x7E, 0x7F]]  # the finite block of the bad row saturates
    assert not fp4[1, 8:].any()
    assert row_amax(x).tolist() == [1, 0]
    assert global_scale(row_amax(x)).tolist() == [gs, 1]


def test_small_global_scales():
    """2688 * 2^-100 still has its own gs; anything below, zero included, gets 1, and then sf and codes are 0."""
    least = np.float32(2688 * 2.0**-100)
    below = np.nextafter(least, np.float32(0))
    assert global_scale([least, below, 0]).tolist() == [2.0**-100, 1, 1]
    fp4, sf, gs = quantize(np.full((1, 16), -below))
    assert (gs, sf.any(), fp4.any()) == (1, False, False)


def test_saturation_and_scale_per_row():
    """A row's own gs is used; a gs that is too small saturates sf at 448 and codes at 6."""
    x = np.full((2, 16), -6.0, np.float32)
    fp4, sf, _ = quantize(x, np.array([1.0, 2.0**-10], np.float32))
    assert sf.tolist() == [[ONE], [0x7E]]
    assert (unpack(fp4) == 15).all()


def test_midpoint_distance_by_hand():
    """Relative to the nearest midpoint, in units of sf * gs; infinite where the scale is 0."""
    x = np.zeros((1, 32))
    x[0, :3] = [5.0, -5.05, 0.5]
    distance = midpoint_distance(x, np.array([[ONE, 0]], np.uint8), 1.0)
    np.testing.assert_allclose(distance[0, :3], [0, 0.01, 1 / 3], rtol=1e-12)  # float64 arithmetic on exact inputs
    assert np.isinf(distance[0, 16:]).all()


@given(st.floats(width=32, allow_nan=False))
@example(float(np.finfo(np.float32).max))
@example(-1e-40)
def test_bf16_rounding_is_that_of_torch(x):
    """Every fp32 number rounds to bf16 as torch's cast from fp32 does (there one rounding is all there is)."""
    want = torch.tensor(x, dtype=torch.float32).bfloat16().double()
    np.testing.assert_array_equal(round_to_bf16(np.array([x])), [want])


def test_bf16_rounding_is_done_once():
    """Just above a midpoint in float64, at it in fp32: rounding through fp32 would give 1."""
    assert round_to_bf16(np.array([1 + 2.0**-8 + 2.0**-40])) == 1 + 2.0**-7


def _tiny_weights(gate: float, up: float, down: float, l1_gs: list[float]) -> OracleWeights:
    """One expert with H = I = 16 whose gate, up and down are constant matrices: the value, times gs for gate and up."""

    def constant(value: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        code = oracle.E2M1.tolist().index(value)
        return torch.full((rows, 8), code * 17, dtype=torch.uint8), torch.full((rows, 1), ONE, dtype=torch.uint8)

    parts = [constant(gate, 16), constant(up, 16)]
    fp4, sf = (torch.cat(p).unsqueeze(0) for p in zip(*parts, strict=True))
    l2_fp4, l2_sf = (t.unsqueeze(0) for t in constant(down, 16))
    gs = torch.tensor([l1_gs])
    return OracleWeights(fp4, sf, gs if len(l1_gs) == 2 else gs[0], l2_fp4, l2_sf, torch.tensor([0.5]))


@pytest.mark.parametrize(("limit", "gate", "up"), [(None, 8.0, -24.0), (10.0, 8.0, -10.0), (2.0, 2.0, -2.0)])
def test_layer_by_hand(limit, gate, up):
    """Constant matrices: gate and up scales, the clamp before SiLU, one bf16 rounding, down scale, routing weight."""
    weights = _tiny_weights(2.0, -3.0, 1.5, [0.25, 0.5])  # gate 16 * 2 / 4, up 16 * -3 / 2
    inner = torch.tensor(gate / (1 + np.exp(-gate)) * up).bfloat16().item()
    out = moe_layer(np.ones((1, 16)), [[0.75]], [[0]], weights, swiglu_limit=limit, **BF16)
    np.testing.assert_allclose(out, np.full((1, 16), 0.75 * 16 * inner * 1.5 * 0.5), rtol=1e-15)


def test_layer_routing_weight_places():
    """The weight on the output, before the bf16 rounding of the intermediate, or on the input with a rounding there."""
    weights = _tiny_weights(0.5, 0.5, 1.0, [0.125])
    w = np.float32(1.001)

    def silu(gate: float) -> float:
        return gate / (1 + np.exp(-gate))

    def run(place: str) -> float:
        return moe_layer(np.ones((1, 16)), [[w]], [[0]], weights, route_weight=place, **BF16)[0, 0]

    assert run("output") == pytest.approx(8 * round_to_bf16(silu(1.0) * 1.0) * float(w), rel=1e-15)
    assert run("before_down") == pytest.approx(8 * round_to_bf16(silu(1.0) * 1.0 * float(w)), rel=1e-15)
    x = 1.0  # 1.001 rounds to 1 in bf16
    assert run("input") == pytest.approx(8 * round_to_bf16(silu(x) * x), rel=1e-15)


def _naive_layer(x, w, ids, weights, limit):
    """W4A16, slot by slot."""
    l1 = dequantize(weights.l1_fp4, weights.l1_sf, 1.0)
    l2 = dequantize(weights.l2_fp4, weights.l2_sf, weights.l2_gs[:, None, None])
    out = np.zeros(x.shape)
    for t in range(len(ids)):
        for j, e in enumerate(ids[t].tolist()):
            if not 0 <= e < len(l2):
                continue
            gate, up = np.split(l1[e] @ oracle.as_numpy(x)[t].astype(float), 2)
            gate, up = gate * float(weights.l1_gs[e, 0]), up * float(weights.l1_gs[e, 1])
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            out[t] += float(w[t, j]) * (l2[e] @ round_to_bf16(gate / (1 + np.exp(-gate)) * up))
    return out


def _case(tokens, hidden, k, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((tokens, hidden))).bfloat16()
    w = rng.random((tokens, k)).astype(np.float32)
    return x, torch.from_numpy(w), torch.from_numpy(rng.integers(-2, 6, (tokens, k)))


def test_layer_is_the_sum_over_slots():
    """Vectorised over experts, the layer equals a loop over slots: repeated, negative and foreign ids included."""
    weights = random_weights(4, 48, 32, seed=3, split_gate_up=True)
    x, w, ids = _case(23, 48, 3)
    assert any(len(set(row)) < 3 for row in ids.tolist())
    got = moe_layer(x, w, ids, weights, swiglu_limit=1.5, **BF16)
    np.testing.assert_allclose(got, _naive_layer(x, w, ids, weights, 1.5), rtol=1e-9, atol=1e-12)  # float64 sums


def test_layer_start_map_and_padding():
    """A shifted range, the same as a map, and padding rows: which slots count, and that nothing else does."""
    weights = random_weights(4, 48, 32, seed=4)
    x, w, ids = _case(9, 48, 3)
    want = moe_layer(x, w, ids, weights, **BF16)
    np.testing.assert_array_equal(moe_layer(x, w, ids + 7, weights, start=7, **BF16), want)
    mapped = torch.where((ids >= 0) & (ids < 4), 3 - ids, -1)
    np.testing.assert_array_equal(moe_layer(x, w, mapped, weights, expert_map=[3, 2, 1, 0], **BF16), want)
    x[5:], w[5:] = torch.nan, torch.inf
    padded = moe_layer(x, w, ids, weights, num_valid_tokens=torch.tensor([5]), **BF16)
    np.testing.assert_array_equal(padded[:5], want[:5])
    assert not padded[5:].any()


def test_layer_never_multiplies_zero_by_infinity():
    """A slot of another rank's expert contributes nothing even with an infinite weight; without slots a row is 0."""
    weights = random_weights(2, 32, 16, seed=5)
    x, ids = torch.ones(2, 32), torch.tensor([[0, 9], [9, -1]])
    finite = moe_layer(x, [[1.0, 0.0], [0.0, 0.0]], ids, weights, **BF16)
    infinite = moe_layer(x, [[1.0, np.inf], [np.inf, np.inf]], ids, weights, **BF16)
    np.testing.assert_array_equal(infinite, finite)
    assert not infinite[1].any()


@pytest.mark.parametrize("mode", ["static", "token", "tensor"])
def test_layer_of_representable_activations(mode):
    """Where quantizing GEMM 1's operand is exact, W4A4 is W4A16 but for the quantization of the intermediate.

    Hidden rows hold e2m1 values with a 6 in each block and amax 2688 * gs, so that every mode finds gs = 2^-6.
    """
    weights = random_weights(2, 32, 16, seed=6)
    rng = np.random.default_rng(6)
    hidden = oracle.E2M1[rng.integers(0, 16, (3, 32))]
    hidden[:, ::16] = 6.0
    hidden[:, :16] *= 7  # the largest magnitude is 42 = 2688 * 2^-6: sf = 448 here and 64 there
    fp4, sf, gs = quantize(hidden)
    np.testing.assert_array_equal(dequantize(fp4, sf, gs), hidden)
    slots = [[1.0], [1.0], [1.0]], [[0], [1], [0]]
    inner = {}

    def capture(rows):
        inner["rows"] = original(rows)
        return inner["rows"]

    original = oracle.round_to_bf16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "round_to_bf16", capture)
        moe_layer(hidden, *slots, weights, **BF16)
        exact = inner["rows"]
        scales = {"l1_input_scale": 2.0**-6, "l2_input_scale": [0.01, 0.02]}
        got = moe_layer(hidden, *slots, weights, activation_scale=mode, **scales, **W4A4)
    np.testing.assert_array_equal(inner["rows"], exact)
    l2_gs = {
        "static": np.array([0.01, 0.02, 0.01]),
        "token": global_scale(row_amax(exact)),
        "tensor": global_scale(row_amax(exact).max()),
    }[mode]
    fp4, sf, _ = quantize(exact, l2_gs)
    operand = dequantize(fp4, sf, l2_gs.astype(np.float32).reshape(-1, 1))
    down = dequantize(weights.l2_fp4, weights.l2_sf, weights.l2_gs[:, None, None])
    want = np.stack([down[e] @ row for e, row in zip([0, 1, 0], operand, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)  # float64 sums of 16 terms


def test_layer_scale_sources():
    """GEMM 1: "max" merges scales over the experts, "per_expert" keeps them; "tensor" sees served, finite rows only."""
    weights = random_weights(2, 32, 16, seed=7)
    x, w, ids = _case(6, 32, 1)
    ids = torch.tensor([[0], [1], [0], [1], [5], [0]])
    static = {"activation_scale": "static", "l2_input_scale": 0.01, **W4A4}

    def run(l1, **more):
        return moe_layer(x, w, ids, weights, l1_input_scale=l1, **static, **more)

    small, large = np.float32(0.0005), np.float32(0.0037)  # no power of two apart, which would decode to the same
    np.testing.assert_array_equal(run([small, large]), run(large))
    mixed = run([small, large], l1_scale_policy="per_expert")
    rows_of_0 = (ids == 0)[:, 0].numpy()
    np.testing.assert_array_equal(mixed[rows_of_0], run(small)[rows_of_0])
    np.testing.assert_array_equal(mixed[~rows_of_0], run(large)[~rows_of_0])
    assert (mixed != run(large))[rows_of_0].any()

    tensor = {"activation_scale": "tensor", **W4A4}
    want = moe_layer(x, w, ids, weights, **tensor)
    x[4] = 1e4  # not served
    np.testing.assert_array_equal(moe_layer(x, w, ids, weights, **tensor), want)
    x[5, 3] = torch.inf  # left out of the amax, and its output is NaN
    without = moe_layer(x[:4], w[:4], ids[:4], weights, **tensor)
    got = moe_layer(x, w, ids, weights, **tensor)
    np.testing.assert_array_equal(got[:4], without)
    assert np.isnan(got[5]).all()


def test_random_weights():
    """Every kind of block scale occurs, decoded values are moderate, the same seed gives the same weights."""
    weights = random_weights(8, 64, 32, seed=8, split_gate_up=True)
    sf = oracle.as_numpy(weights.l1_sf)
    assert (sf == 0).any()
    assert ((sf > 0) & (sf < 8)).any()
    assert (sf < oracle.NAN_SF).all()
    assert weights.l1_gs.shape == (8, 2)
    assert random_weights(8, 64, 32, seed=8).l1_gs.shape == (8,)
    again = random_weights(8, 64, 32, seed=8, split_gate_up=True)
    for tensor, same in zip(vars(weights).values(), vars(again).values(), strict=True):
        assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8))
    x, w, ids = _case(50, 64, 2)
    out = moe_layer(x, w, ids, weights, **BF16)
    assert 0.01 < np.abs(out).mean() < 100


def test_nearest_reference_explains_near_ties_only():
    """A row rounded the other way at a near-tie is matched; one that is not clearly so is compared unchanged."""
    weights = random_weights(4, 48, 256, seed=9)
    x, w, ids = _case(130, 48, 6, seed=9)
    settings = {"activation_scale": "token", **W4A4}
    plain = moe_layer(x, w, ids, weights, **settings)
    nudged = moe_layer(x, w, ids, weights, nudge=1e-5, **settings)
    moved = (plain != nudged).any(axis=1)
    assert moved.any()
    assert not moved.all()
    np.testing.assert_array_equal(nearest_reference(nudged, x, w, ids, weights, **settings), nudged)
    undecided = plain + 0.6 * (nudged - plain)
    np.testing.assert_array_equal(nearest_reference(undecided, x, w, ids, weights, **settings), plain)
    wrong = plain * 1.01
    near = nearest_reference(wrong, x, w, ids, weights, **settings)
    assert relative_l2(wrong, near) > 0.009


def test_relative_l2():
    """The ratio of norms; nothing compared with nothing is 0, something compared with zeros infinite, NaN is NaN."""
    assert relative_l2(torch.tensor([3.0, 4.5]), np.array([3.0, 4.0])) == 0.1
    assert relative_l2(np.zeros((0, 4)), np.zeros((0, 4))) == 0
    assert relative_l2([1.0], [0.0]) == np.inf
    assert np.isnan(relative_l2([np.nan], [1.0]))
