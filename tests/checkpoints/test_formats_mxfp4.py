"""MXFP4 to NVFP4: bit for bit where that is possible, the right count where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4.checkpoints import RecodeReport, open_checkpoint
from dsv4.checkpoints.mxfp4_cast import cast_mxfp4
from dsv4.errors import CheckpointError

from . import make
from . import mxfp4_oracle as oracle

BASE = "model.layers.0.ffn.experts.1"
ROWS, COLUMNS = 2, 64

# What the codes of 16 values are drawn from: everything; zeros of both signs; values that leave room to shift codes.
ALPHABETS = ([*range(16)], [0, 8], [0, 1, 9], [0, 6, 14], [2, 4, 6], [1, 7], [0, 8, 8, 3, 5], [7, 15], [4, 12, 0])


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """fp32 values as integers, so that signed zeros and infinities compare by their bits."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32).view(np.int32)


@st.composite
def matrices(draw) -> tuple[np.ndarray, np.ndarray]:
    """(codes [2, 64], e8m0 bytes [2, 2]): narrow, borderline, wide and extreme exponents; each half its alphabet."""
    spread = draw(st.sampled_from([0, 3, 8, 17, 18, 19, 20, 21, 24, 40, 254]))
    low = draw(st.integers(0, 254 - spread))
    exponents = draw(st.lists(st.integers(low, low + spread), min_size=4, max_size=4))
    if draw(st.booleans()):
        exponents[0], exponents[3] = low, low + spread
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    chosen = draw(st.lists(st.sampled_from(ALPHABETS), min_size=8, max_size=8))
    codes = np.stack([rng.choice(alphabet, 16) for alphabet in chosen]).reshape(ROWS, COLUMNS)
    return codes, np.array(exponents, dtype=np.uint8).reshape(ROWS, 2)


def cast(*pairs: tuple[np.ndarray, np.ndarray]):
    return cast_mxfp4(*((oracle.pack(codes), torch.from_numpy(scale)) for codes, scale in pairs))


def exponent_of(gs: torch.Tensor) -> int:
    mantissa, exponent = np.frexp(float(gs))
    assert mantissa == 0.5, "the global scale is a power of two"
    return int(exponent) - 1


@settings(max_examples=300)
@given(matrices())
@example((np.full((ROWS, COLUMNS), 8), np.zeros((ROWS, 2), dtype=np.uint8)))
@example((np.full((ROWS, COLUMNS), 7), np.array([[0, 17], [17, 3]], dtype=np.uint8)))
@example((np.full((ROWS, COLUMNS), 7), np.array([[254, 237], [254, 254]], dtype=np.uint8)))
@example((np.full((ROWS, COLUMNS), 6), np.array([[100, 120], [118, 119]], dtype=np.uint8)))
def test_cast(matrix):
    """Lossless exactly when any global scale allows it (tried by brute force over every e4m3 block scale), and then bit
    for bit in fp32; the report counts what the brute force counts; what is lost is lost at the small end only."""
    codes, scale = matrix
    values = oracle.decode(codes, scale)
    (result,), report = cast(matrix)
    m = exponent_of(result.gs)
    decoded = result.dequantize(torch.float64).numpy()
    assert (report.blocks, report.exact, report.shifted, report.requantized) == oracle.expected_report(values, scale, m)
    possible = oracle.lossless_scales(values) if (values != 0).any() else [0]
    assert (report.requantized == 0) == bool(possible)
    if possible:
        assert m in possible
        assert np.array_equal(bits(result.dequantize()), bits(values))
        return
    exact = oracle.representable(oracle.halves(values), m)
    assert np.array_equal(oracle.halves(decoded)[exact], oracle.halves(values)[exact])
    # Lost values are rounded to the grid of the smallest block scale, 2^-9: half of its finest step.
    assert np.abs(decoded - values).max() <= 2.0 ** (m - 11)
    assert (np.signbit(decoded) == np.signbit(values)).all()
    # A smaller global scale would lose less there, but could not hold the largest values.
    assert (
        m == -126
        or not oracle.representable(oracle.halves(values), m - 1)[np.abs(oracle.halves(values)).max(-1).argmax()]
    )


@settings(max_examples=100)
@given(st.integers(0, 254 - 17), st.lists(st.integers(0, 17), min_size=4, max_size=4), st.integers(0, 2**32))
def test_spans_up_to_17_keep_every_byte(low, offsets, seed):
    """Exponents that span at most 17: the codes are the source's bytes, both halves of 32 have the scale 2^(k-m) and
    zero blocks the scale 0."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (ROWS, COLUMNS))
    codes[0, 32:] &= 8  # a block of signed zeros
    scale = np.array([low + offset for offset in offsets], dtype=np.uint8).reshape(ROWS, 2)
    (result,), report = cast((codes, scale))
    assert torch.equal(result.codes, oracle.pack(codes))
    expected = np.exp2(scale.astype(np.float64) - 127 - exponent_of(result.gs)).repeat(2, axis=1)
    expected[0, 2:] = 0
    assert np.array_equal(result.sf.double().numpy(), expected)
    assert report == RecodeReport(4, 4, 0, 0)
    assert np.array_equal(bits(result.dequantize()), bits(oracle.decode(codes, scale)))


@settings(max_examples=100)
@given(matrices(), matrices())
def test_gate_and_up_share_a_scale_where_nothing_is_lost_by_it(gate, up):
    """One global scale for both exactly if one exists that is lossless for both; else each has its own, as if alone."""
    results, report = cast(gate, up)
    joint = oracle.lossless_scales(np.concatenate((oracle.decode(*gate), oracle.decode(*up))))
    singles = [cast(each) for each in (gate, up)]
    nonzero = [(oracle.decode(*each) != 0).any() for each in (gate, up)]
    if joint:
        assert results[0].gs == results[1].gs
        assert exponent_of(results[0].gs) in joint
        assert report.requantized == 0
    elif all(nonzero):
        for result, ((alone,), _) in zip(results, singles, strict=True):
            assert result.gs == alone.gs
            assert torch.equal(result.codes, alone.codes)
            assert torch.equal(result.sf.float(), alone.sf.float())
        assert report == singles[0][1] + singles[1][1]
    for result, each in zip(results, (gate, up), strict=True):
        values = oracle.decode(*each)
        kept = oracle.representable(oracle.halves(values), exponent_of(result.gs))
        decoded = oracle.halves(result.dequantize(torch.float64).numpy())
        assert np.array_equal(decoded[kept], oracle.halves(values)[kept])


def test_every_pair_of_values_at_every_distance():
    """A block of one magnitude and one of another, at distances around the limit: lossless exactly where brute force
    finds a way, for each room that a magnitude has to move up or down."""
    for large in range(1, 8):
        for small in range(1, 8):
            for distance in range(15, 26):
                codes = np.concatenate((np.full((1, 32), large), np.full((1, 32), small + 8)), axis=1)
                scale = np.array([[100 + distance, 100]], dtype=np.uint8)
                values = oracle.decode(codes, scale)
                (result,), report = cast((codes, scale))
                lossless = bool(oracle.lossless_scales(values))
                assert (report.requantized == 0) == lossless, (large, small, distance)
                assert np.array_equal(result.dequantize(torch.float64).numpy(), values) == lossless


def test_one_block_of_each_kind():
    """A worked example: largest exponent 20, hence gs = 2^12 and block scales from 2^3 to 2^20. Fours under 2^1 become
    ones under 2^3; 0.5 under 2^0 has no code under 2^3."""
    codes = np.full((1, 128), 7)
    codes[0, 32:64] = 6
    codes[0, 64:96] = 1
    codes[0, 96:] = 8
    scale = np.array([[20, 1, 0, 0]], dtype=np.uint8) + 127
    (result,), report = cast((codes, scale))
    assert report == RecodeReport(4, 2, 1, 1)
    assert float(result.gs) == 2.0**12
    assert result.sf.float().tolist() == [[256.0, 256.0, 2.0**-9, 2.0**-9, 2.0**-9, 2.0**-9, 0.0, 0.0]]
    assert result.codes[0, 16:32].tolist() == [0x22] * 16


# Through files.


def expert(seed: int, exponents: tuple[int, int] = (110, 127)) -> dict[str, dict[str, torch.Tensor]]:
    """projection -> suffix -> tensor, as the release stores them."""
    rng = np.random.default_rng(seed)
    result = {}
    for projection, rows, columns in (("gate", 32, 64), ("up", 32, 64), ("down", 64, 32)):
        scale = rng.integers(exponents[0], exponents[1] + 1, (rows, columns // 32), dtype=np.uint8)
        result[projection] = {
            "weight": oracle.pack(rng.integers(0, 16, (rows, columns))).view(torch.int8),
            "scale": torch.from_numpy(scale).view(torch.float8_e8m0fnu),
        }
    return result


def checkpoint(folder, *experts: dict[str, dict[str, torch.Tensor]]):
    tensors: dict[str, torch.Tensor] = {}
    for number, parts in enumerate(experts):
        tensors |= make.names(parts, 0, number)
    return make.write(folder, tensors)


def values_of(part: dict[str, torch.Tensor]) -> np.ndarray:
    packed = part["weight"].view(torch.uint8).numpy()
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return oracle.decode(codes, part["scale"].view(torch.uint8).numpy())


@pytest.mark.parametrize("dtypes", [(torch.int8, torch.float8_e8m0fnu), (torch.uint8, torch.uint8)])
def test_reading(tmp_path, dtypes):
    """A file with either pair of dtypes loads to the values of the file, bit for bit, and says that nothing changed."""
    experts = [expert(0), expert(1)]
    for parts in experts:
        for part in parts.values():
            part["weight"], part["scale"] = part["weight"].view(dtypes[0]), part["scale"].view(dtypes[1])
    with open_checkpoint(checkpoint(tmp_path, *experts)) as opened:
        assert opened.format.name == "mxfp4"
        assert str(opened.shape) == "hidden 64, intermediate 32"
        read = [opened.read_expert(0, number) for number in range(2)]
        layer = opened.load_layer(0, on_missing_input_scale="weight-only")
    assert (layer.activation_format, layer.l1_input_scale) == ("bf16", None)
    assert layer.recoded == RecodeReport(384, 384, 0, 0)
    assert len(layer.notes) == 1  # about input scales: nothing was rounded
    for weights, parts in zip(read, experts, strict=True):
        assert weights.gate.gs == weights.up.gs
        assert weights.recoded == RecodeReport(192, 192, 0, 0)
        for projection, part in parts.items():
            assert np.array_equal(bits(weights.projection(projection).dequantize()), bits(values_of(part)))


@pytest.mark.parametrize("exponents", [(110, 127), (90, 127)])
def test_device_does_not_matter(tmp_path, device, exponents):
    """Where the cast is computed changes no byte, with blocks kept, moved and rounded."""
    with open_checkpoint(checkpoint(tmp_path, expert(5, exponents))) as opened:
        there, here = opened.read_expert(0, 0, device), opened.read_expert(0, 0)
    assert there.recoded == here.recoded
    assert (here.recoded.requantized > 0) == (exponents[0] < 110)
    for projection, part in expert(5, exponents).items():
        ours, again = there.projection(projection), here.projection(projection)
        assert ours.codes.device == device
        assert torch.equal(ours.codes.cpu(), again.codes)
        assert torch.equal(ours.sf.cpu().view(torch.uint8), again.sf.view(torch.uint8))
        assert ours.gs.cpu() == again.gs
        assert ours.shape == values_of(part).shape


def test_rounded_blocks_are_reported(tmp_path):
    """Blocks that had to be rounded are counted over experts and projections, in a note of the layer too."""
    experts = [expert(0), expert(1, (60, 127))]
    with open_checkpoint(checkpoint(tmp_path, *experts)) as opened:
        layer = opened.load_layer(0, on_missing_input_scale="dynamic")
        report = opened.read_expert(0, 1).recoded
    assert report.requantized > 0
    assert layer.recoded == report + RecodeReport(192, 192, 0, 0)
    assert any(f"{report.requantized} of 384 MXFP4 blocks" in note for note in layer.notes)


def test_values_of_modelopt(tmp_path):
    """Normal weights in MXFP4 as ModelOpt quantizes them load to the values that ModelOpt decodes, bit for bit."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    g = torch.Generator().manual_seed(0)
    parts, expected = {}, {}
    for projection, rows, columns in (("gate", 32, 64), ("up", 32, 64), ("down", 64, 32)):
        dense = torch.randn(rows, columns, generator=g) * 0.02
        quantized, scale = qtensor.MXFP4QTensor.quantize(dense, 32)
        expected[projection] = quantized.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})
        parts[projection] = {
            "weight": quantized._quantized_data.view(torch.int8),
            "scale": scale.reshape(rows, columns // 32).view(torch.float8_e8m0fnu),
        }
    with open_checkpoint(checkpoint(tmp_path, parts)) as opened:
        weights = opened.read_expert(0, 0)
    for projection, dense in expected.items():
        assert torch.equal(weights.projection(projection).dequantize(), dense)


def test_values_of_transformers(tmp_path):
    """Transformers' own reader of the release decodes the file to the same fp32 values (which settles nibble order)."""
    reader = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(reader, "Fp8Dequantize"):
        pytest.skip("this version of Transformers does not decode FP4 experts")
    parts = expert(3)
    with open_checkpoint(checkpoint(tmp_path, parts)) as opened:
        weights = opened.read_expert(0, 0)
    for projection, part in parts.items():
        decoded = reader.Fp8Dequantize(None)._dequantize_one(part["weight"], part["scale"], torch.float32)
        assert torch.equal(weights.projection(projection).dequantize(), decoded)


# Refusals.


def refused(tmp_path, suffix: str, tensor: torch.Tensor | None, projection: str = "gate") -> str:
    """The message for a checkpoint whose expert 1 has one other tensor."""
    parts = expert(1)
    del parts[projection][suffix]
    if tensor is not None:
        parts[projection][suffix] = tensor
    with open_checkpoint(checkpoint(tmp_path, expert(0), parts)) as opened, pytest.raises(CheckpointError) as error:
        opened.load_layer(0, on_missing_input_scale="ignore")
    assert "model.safetensors" in str(error.value)
    return str(error.value)


def test_nan_scales_are_refused(tmp_path):
    """An e8m0 NaN is named with its position."""
    scale = expert(1)["gate"]["scale"].clone()
    scale.view(torch.uint8)[7, 1] = 255
    message = refused(tmp_path, "scale", scale)
    assert all(part in message for part in (f"{BASE}.w1.scale", "NaN", "255", "[7, 1]"))


@pytest.mark.parametrize("suffix", ["weight", "scale"])
@pytest.mark.parametrize(("projection", "theirs"), [("gate", "w1"), ("up", "w3"), ("down", "w2")])
def test_missing_tensors_are_refused(tmp_path, suffix, projection, theirs):
    """A tensor that is not there is named in full."""
    message = refused(tmp_path, suffix, None, projection)
    assert f"{BASE}.{theirs}.{suffix}" in message
    assert "missing" in message


WRONG = {
    "weight-dtype": ("weight", torch.zeros(32, 32, dtype=torch.int16), "I16"),
    "weight-dims": ("weight", torch.zeros(32 * 32, dtype=torch.int8), "[out, in/2]"),
    "weight-columns": ("weight", torch.zeros(32, 24, dtype=torch.int8), "multiple of 32"),
    "scale-dtype": ("scale", torch.ones(32, 2), "F8_E8M0"),
    "scale-shape": ("scale", torch.zeros(32, 4, dtype=torch.uint8), "[32, 2]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_and_dtypes_are_refused(tmp_path, case):
    """Dtype and shape of each tensor are checked, and the tensor at fault is named with what was found."""
    suffix, tensor, expected = WRONG[case]
    message = refused(tmp_path, suffix, tensor)
    assert f"{BASE}.w1.{suffix}" in message
    assert expected in message


def test_other_tensors_are_refused(tmp_path):
    """A tensor that MXFP4 does not have is not dropped."""
    parts = expert(0)
    parts["gate"]["bias"] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=r"w1\.bias.*not part of this format"):
        open_checkpoint(checkpoint(tmp_path, parts))


def test_fp8_experts_are_refused(tmp_path):
    """Experts in FP8 blocks, which have a ``scale`` too, are not taken for MXFP4."""
    parts = expert(0)
    for part in parts.values():
        part["weight"] = torch.zeros(part["weight"].shape).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"w1\.weight.*expected one of the dtypes.*found F8_E4M3"):
        open_checkpoint(checkpoint(tmp_path, parts))
