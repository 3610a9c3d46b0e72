"""The public quantizing functions: shapes, dtypes, kinds of global scale, errors, and byte equality with the oracle."""

from __future__ import annotations

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
from dsv4.ops.layouts import interleave_l1_weights, swizzle_32_4_4
from dsv4.ops.quantize import (
    deinterleave_amax_quantize_nvfp4_fused,
    deinterleave_quantize_nvfp4_cuda,
    quantize_activation_nvfp4,
    quantize_nvfp4_gpu,
    quantize_nvfp4_gpu_fused,
    quantize_nvfp4_swizzled,
    quantize_to_nvfp4,
    quantize_weight_to_nvfp4,
    token_global_scales,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 32), (1, 16), (3, 48), (130, 64)]
OWN_SCALE = {quantize_to_nvfp4: (), quantize_nvfp4_gpu_fused: (1,)}
GIVEN_SCALE = [quantize_activation_nvfp4, quantize_nvfp4_gpu]


def assert_operand(fp4: torch.Tensor, sf: torch.Tensor, rows: int, k: int) -> None:
    """The shapes and dtypes of a quantized operand ``[rows, k]``."""
    assert (fp4.dtype, sf.dtype) == (torch.uint8, torch.float8_e4m3fn)
    assert (fp4.shape, sf.shape) == ((rows, k // 2), (rows, k // 16))


# Global scale from the data.


@pytest.mark.parametrize("function", OWN_SCALE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_own_scale(device, function, shape, dtype):
    """gs = amax / 2688 on the device, 0-d or [1] as documented; bytes are the oracle's; also without rows."""
    x = wide_values(shape, -9, 4, dtype, seed=1)
    fp4, sf, gs = function(x.to(device))
    want = oracle.quantize(x)
    assert_operand(fp4, sf, *shape)
    assert (gs.shape, gs.dtype, gs.device) == (OWN_SCALE[function], torch.float32, fp4.device)
    assert gs.item() == want[2]
    assert_same_bytes(fp4, sf, want)


@given(
    st.floats(-149, 127.9),
    st.floats(0, 40),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
)
def test_own_scale_over_all_ranges(exponent, binades, dtype, seed, bad):
    """Any range of magnitudes, with a NaN or Inf or without: gs and bytes are the oracle's."""
    x = wide_values((4, 64), exponent, min(exponent + binades, 127.9), dtype, seed)
    if bad is not None:
        x[seed % 4, seed % 64] = bad
    fp4, sf, gs = quantize_to_nvfp4(x)
    want = oracle.quantize(x)
    assert gs.item() == want[2]
    assert_same_bytes(fp4, sf, want)


# Given global scale.


@pytest.mark.parametrize("function", GIVEN_SCALE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["number", "0-d", "[1]", "[M]", "[M, 1]"])
def test_given_scale(device, function, shape, kind):
    """Every form of gs: a number, 0-d, [1], one a row; too small (saturation) and too large ones among them."""
    x = wide_values(shape, -6, 6, torch.bfloat16, seed=2)
    per_row = torch.exp2(torch.linspace(-16, -3, max(shape[0], 1)))[: shape[0]]
    gs = {
        "number": 0.0123,
        "0-d": torch.tensor(0.0123),
        "[1]": torch.tensor([0.0123]),
        "[M]": per_row,
        "[M, 1]": per_row.unsqueeze(1),
    }[kind]
    fp4, sf = function(x.to(device), gs.to(device) if isinstance(gs, torch.Tensor) else gs)
    assert_operand(fp4, sf, *shape)
    assert_same_bytes(fp4, sf, oracle.quantize(x, gs))


@given(
    st.floats(-149, 120),
    st.sampled_from(FLOATS),
    st.lists(st.floats(-100, 124), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_given_scales_over_all_ranges(exponent, dtype, log_gs, seed):
    """Any gs a row with data of any magnitude: bytes are the oracle's, and codes saturate where gs is too small."""
    x = wide_values((len(log_gs), 32), exponent, exponent + 6, dtype, seed)
    gs = torch.exp2(torch.tensor(log_gs))
    assert_same_bytes(*quantize_activation_nvfp4(x, gs), oracle.quantize(x, gs))


def test_ties(device):
    """Midpoints go to the even code, their neighbours in fp32 to the nearer one; zeros and what rounds to zero keep
    their signs."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    below, above = (midpoints.nextafter(torch.tensor(to)) for to in (0.0, 9.0))
    rows = torch.stack([torch.cat([torch.tensor([6.0, 0.0]), part, -part]) for part in (midpoints, below, above)])
    even, lower, upper = [0, 2, 2, 4, 4, 6, 6], [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]
    want = [[7, 0, *codes, *(c + 8 for c in codes)] for codes in (even, lower, upper)]
    exact = dict.fromkeys((1.0, 2.0**-60, 2.0**-95, 2.0**60), 3) | dict.fromkeys((3.0, 11 * 2.0**-70, 83 * 2.0**40), 1)
    for scale, count in exact.items():  # the neighbours of a midpoint times 3 are not all fp32 numbers
        fp4, sf = quantize_activation_nvfp4((rows[:count] * scale).to(device), scale)
        assert sf.float().eq(1).all()
        assert oracle.unpack(fp4).tolist() == want[:count]


def test_given_scale_is_rounded_to_fp32(device):
    """A float64 gs just below 1 is 1: 2.5 is then a tie, and goes to 2."""
    x = torch.zeros(2, 16, device=device)
    x[:, :2] = torch.tensor([6.0, 2.5])
    gs = torch.full((2,), 1 - 2.0**-30, dtype=torch.float64, device=device)
    fp4, _ = quantize_activation_nvfp4(x, gs)
    assert oracle.unpack(fp4)[:, :2].tolist() == [[7, 4], [7, 4]]


def test_saturation(device):
    """Values beyond 2688 * gs become 6 * 448 * gs with their sign."""
    x = torch.full((1, 16), 5000.0, device=device)
    x[0, 1] = -1e30
    fp4, sf = quantize_activation_nvfp4(x, 1.0)
    decoded = oracle.dequantize(fp4, sf, 1.0)
    assert decoded[0, :2].tolist() == [2688, -2688]


def test_token_scales_make_rows_independent(device):
    """One gs a token, from its own amax: each row gets the bytes that it gets alone; a bad row gets gs = 1."""
    x = wide_values((9, 64), -20, 3, torch.bfloat16, seed=3).to(device)
    x[4], x[5, 7] = 0, math.nan
    gs = token_global_scales(x)
    assert (gs.shape, gs.dtype) == ((9,), torch.float32)
    assert gs[4:6].tolist() == [1, 1]
    fp4, sf = quantize_activation_nvfp4(x, gs)
    assert_same_bytes(fp4, sf, oracle.quantize(x, oracle.global_scale(oracle.row_amax(x))))
    for row in range(9):
        if row != 5:  # alone, a NaN row is a tensor without an amax: the same gs = 1 and the same bytes
            alone_fp4, alone_sf, alone_gs = quantize_to_nvfp4(x[row : row + 1])
            assert alone_gs.item() == gs[row].item()
            assert torch.equal(alone_fp4[0], fp4[row])
            assert torch.equal(alone_sf.view(torch.uint8)[0], sf.view(torch.uint8)[row])


@pytest.mark.parametrize("log_gs", [-149, -140, -127, -120, -100, 100, 126])
def test_given_scales_at_the_ends_of_fp32(device, log_gs):
    """Also where ``sf * gs`` is subnormal or nothing, and where ``x / gs`` is infinite: the oracle's bytes."""
    ranges = ((low, min(low + 8, 127.5)) for low in (log_gs, -149, 0, 119))
    x = torch.cat([wide_values((3, 64), *bounds, torch.float32, seed) for seed, bounds in enumerate(ranges)])
    gs = torch.tensor(2.0**log_gs) * 1.25
    with np.errstate(all="ignore"):
        want = oracle.quantize(x, gs)
    assert_same_bytes(*quantize_activation_nvfp4(x.to(device), gs.to(device)), want)


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "columns of wider rows": lambda x: torch.nn.functional.pad(x, (3, 5), value=math.nan)[:, 3:-5],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "one row many times": lambda x: x[:1].expand(7, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_views(device, view, dtype):
    """Values are found by strides, whatever they are, and float64 is rounded to fp32 first."""
    x = VIEWS[view](wide_values((7, 80), -6, 6, dtype, seed=6).to(device))
    want = oracle.quantize(x.float())
    assert_same_bytes(*quantize_to_nvfp4(x)[:2], want)
    assert_same_bytes(*quantize_activation_nvfp4(x, torch.tensor(want[2], device=device)), want)


# Interleaved results of the fused GEMM.


def interleaved(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x [M, 2I] with poison in the up groups, results [M, I])``."""
    results = wide_values(shape, -5, 5, dtype, seed=4)
    poison = torch.full_like(results, math.nan)
    return interleave_l1_weights(torch.cat([results, poison], dim=1)).to(device), results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_deinterleave_quantize(device, shape, dtype, per_row):
    """Only the gate groups are read: the bytes are those of the results alone, for one gs and for one a row."""
    x, results = interleaved(shape, dtype, device)
    gs = torch.linspace(0.001, 0.1, max(shape[0], 1))[: shape[0]] if per_row else torch.tensor(0.01)
    fp4, sf = deinterleave_quantize_nvfp4_cuda(x, shape[1], gs.to(device))
    assert_operand(fp4, sf, *shape)
    assert_same_bytes(fp4, sf, oracle.quantize(results, gs))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deinterleave_amax_quantize(device, shape, dtype):
    """The same with a gs [1] from the results, not from what stands between them."""
    x, results = interleaved(shape, dtype, device)
    fp4, sf, gs = deinterleave_amax_quantize_nvfp4_fused(x, shape[1])
    want = oracle.quantize(results)
    assert_operand(fp4, sf, *shape)
    assert (gs.shape, gs.dtype) == ((1,), torch.float32)
    assert gs.item() == want[2]
    assert_same_bytes(fp4, sf, want)


# Weights.


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight(device, dtype, four_over_six):
    """``[K, N]`` is quantized in blocks along K: the transpose of quantizing ``[N, K]``, contiguous, gs 0-d."""
    w = wide_values((64, 5), -8, 0, dtype, seed=5)
    fp4, sf, gs = quantize_weight_to_nvfp4(w.to(device), four_over_six=four_over_six)
    assert (fp4.dtype, fp4.shape, fp4.is_contiguous()) == (torch.uint8, (32, 5), True)
    assert (sf.dtype, sf.shape, sf.is_contiguous()) == (torch.float8_e4m3fn, (4, 5), True)
    assert gs.shape == ()
    assert gs.item() == oracle.global_scale(oracle.row_amax(w).max(), 1536 if four_over_six else 2688)
    if four_over_six:
        decoded = oracle.dequantize(fp4.t(), sf.t(), gs).T
        plain = oracle.dequantize(*oracle.quantize(w.t(), gs.cpu())).T
        w64 = w.double().numpy()
        assert np.linalg.norm(decoded - w64) < np.linalg.norm(plain - w64)
    else:
        assert_same_bytes(fp4.t(), sf.t(), oracle.quantize(w.t()))


# Errors.


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: quantize_to_nvfp4(torch.zeros(2, 24)), r"multiple of 16.*\(2, 24\)"),
        (lambda: quantize_to_nvfp4(torch.zeros(2, 2, 16)), r"quantize_to_nvfp4: .*matrix.*\(2, 2, 16\)"),
        (lambda: quantize_nvfp4_gpu_fused(torch.zeros(16)), r"matrix.*\(16,\)"),
        (lambda: quantize_to_nvfp4(torch.zeros(2, 16, dtype=torch.uint8)), "floating-point.*uint8"),
        (lambda: quantize_activation_nvfp4(torch.zeros(4, 16), torch.ones(3)), r"gs: .*one a row \(4\).*\(3,\)"),
        (lambda: quantize_nvfp4_gpu(torch.zeros(4), torch.ones(())), r"matrix.*\(4,\)"),
        (lambda: deinterleave_quantize_nvfp4_cuda(torch.zeros(4, 32), 32, 1.0), r"\[M, 64\].*\(4, 32\)"),
        (lambda: deinterleave_amax_quantize_nvfp4_fused(torch.zeros(4), 32), r"\[M, 64\].*\(4,\)"),
        (lambda: quantize_weight_to_nvfp4(torch.zeros(24, 3)), "multiple of 16"),
        (lambda: quantize_weight_to_nvfp4(torch.zeros(16)), "quantize_weight_to_nvfp4: .*matrix"),
    ],
)
def test_bad_arguments(call, match):
    """Wrong shapes and dtypes are refused with what was found and expected."""
    with pytest.raises(InputError, match=match):
        call()


# On the device, without the host.

CALLS = {
    "quantize_to_nvfp4": quantize_to_nvfp4,
    "quantize_activation_nvfp4": lambda x: quantize_activation_nvfp4(x, x.new_ones(())),
    "quantize_activation_nvfp4-rows": lambda x: quantize_activation_nvfp4(x, token_global_scales(x)),
    "quantize_activation_nvfp4-number": lambda x: quantize_activation_nvfp4(x, 0.5),
    "quantize_nvfp4_gpu": lambda x: quantize_nvfp4_gpu(x, x.new_ones(1)),
    "quantize_nvfp4_gpu_fused": quantize_nvfp4_gpu_fused,
    "deinterleave_quantize": lambda x: deinterleave_quantize_nvfp4_cuda(x, x.shape[1] // 2, x.new_ones(())),
    "deinterleave_amax": lambda x: deinterleave_amax_quantize_nvfp4_fused(x, x.shape[1] // 2),
    "quantize_weight_to_nvfp4": quantize_weight_to_nvfp4,
    "quantize_nvfp4_swizzled": lambda x: quantize_nvfp4_swizzled(x, x.new_ones(())),
    "quantize_nvfp4_swizzled-experts": lambda x: quantize_nvfp4_swizzled(
        x, x.new_ones(5), torch.arange(5, device=x.device)
    ),
    "quantize_weight_to_nvfp4-4/6": lambda w: quantize_weight_to_nvfp4(w, four_over_six=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(no_host_sync, device, name):
    """No value is read by the host, no shape depends on values, and no number is copied from the host."""

    class NoCopyEither(no_host_sync):
        FORBIDDEN = (*no_host_sync.FORBIDDEN, "lift_fresh")  # how a tensor is made of Python numbers

    x = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
    with NoCopyEither():
        CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_values(name):
    """Fake and meta tensors pass through, with the shapes and dtypes of the real results."""

    def signature(tensors):
        return [(t.shape, t.dtype) for t in tensors]

    want = signature(CALLS[name](torch.ones(32, 32)))
    assert signature(CALLS[name](torch.ones(32, 32, device="meta"))) == want
    with FakeTensorMode():
        assert signature(CALLS[name](torch.ones(32, 32))) == want


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("quantize_weight")])
def test_kernels_have_fakes(name):
    """The operators that a GPU's tensors take have fakes: shapes and dtypes of the real results."""
    want = [(t.shape, t.dtype) for t in CALLS[name](torch.ones(32, 32))]
    with FakeTensorMode():
        got = CALLS[name](torch.ones(32, 32, device="cuda"))
    assert [(t.shape, t.dtype) for t in got] == want
    assert {t.device.type for t in got} == {"cuda"}


def test_torch_compile_traces_through(device):
    """One graph without a break, and the same bytes."""

    def pipeline(x):
        fp4, sf, gs = quantize_nvfp4_gpu_fused(x)
        return fp4, swizzle_32_4_4(sf), gs, *quantize_nvfp4_swizzled(x, gs)

    x = wide_values((40, 64), -5, 5, torch.bfloat16, seed=7).to(device)
    got = torch.compile(pipeline, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, pipeline(x), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
