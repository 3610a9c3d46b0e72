"""NVFP4 as other libraries compute it: the same bytes where they agree, and each difference by design spelled out.

Each test is skipped where its library is not installed. All of them run on the CPU.

**The rule for near-ties.** The libraries do the same sums in other orders (they multiply by reciprocals, say). Up to
four fp32 roundings, 2^-24 each, separate a quotient from its exact value, so a byte may differ only where the exact
quotient lies that near to a rounding boundary, and then by one step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from oracle import as_numpy, dequantize, e2m1_decode, e4m3_decode, midpoint_distance, quantize, unpack
from torch import Tensor

from dsv4.nvfp4 import Nvfp4Tensor
from dsv4.ops.layouts import Swizzle32x4x4, pad_and_swizzle_single
from dsv4.ops.quantize import quantize_to_nvfp4

NEAR_TIE = 4 * 2.0**-24

Quantized = tuple[
    Tensor, Tensor, Tensor
]  # packed codes [M, K/2], e4m3 scales [M, K/16], gs (a multiplier, one element)


def library(name: str) -> ModuleType:
    """A module of a library: skips the test if the library is missing, fails if it is there and does not import."""
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def modelopt(x: Tensor) -> Quantized:
    tensor = library("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    quantized, sf, gs = tensor.quantize(x.clone(), 16)
    return quantized._quantized_data, sf, gs


def torchao(x: Tensor) -> Quantized:
    nvfp4 = library("torchao.prototype.mx_formats.nvfp4_tensor")
    gs = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
    sf, fp4 = nvfp4.nvfp4_quantize(x, 16, gs)
    return fp4, sf, gs


def compressed_tensors(x: Tensor) -> Quantized:
    """The nvfp4-pack-quantized format, whose global scale is a divisor: its reciprocal is returned."""
    quantization = library("compressed_tensors.quantization")
    helpers = library("compressed_tensors.quantization.utils")
    compressor = library("compressed_tensors.compressors.nvfp4").NVFP4PackedCompressor
    scheme = quantization.preset_name_to_scheme("NVFP4", ["Linear"])
    divisor = helpers.generate_gparam(x.amin().reshape(1), x.amax().reshape(1))
    blocks = x.unflatten(-1, (-1, 16))
    sf, _ = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=divisor)
    state = {"weight": x, "weight_scale": sf, "weight_global_scale": divisor}
    packed = compressor.compress(state, scheme)
    return packed["weight_packed"], packed["weight_scale"], 1 / packed["weight_global_scale"]


def fouroversix(x: Tensor, rule: str, divisor: float) -> Quantized:
    reference = library("fouroversix.quantize.pytorch.reference")
    scale_rule = library("fouroversix.utils").ScaleRule(rule)
    fp4, sf, amax = reference.quantize_to_fp4(x, scale_rule=scale_rule, use_blackwell_scale_layout=False)
    return fp4, sf.view(x.shape[0], -1), amax.float() / divisor


def ours(x: Tensor, *, four_over_six: bool = False) -> Quantized:
    q = Nvfp4Tensor.quantize(x, four_over_six=four_over_six)
    return q.codes, q.sf, q.gs


def moderate(dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian rows of different sizes, within what every library represents: scales from 2^-6 to 448, no zeros."""
    rng = np.random.default_rng(seed)
    rows = 2.0 ** rng.uniform(-5, 5, (256, 1))
    x = rng.standard_normal((256, 512)) * rows * 0.02
    return torch.from_numpy(x).to(dtype)


def assert_agrees(theirs: Quantized, mine: Quantized, x: Tensor) -> None:
    """Equal bytes, but for single steps at near-ties (see the module docstring)."""
    scales, want_scales = as_numpy(theirs[1]), as_numpy(mine[1])
    assert e4m3_decode(want_scales).min() >= 2.0**-6  # else the data is not what this comparison is for
    gs = float(mine[2])
    assert float(theirs[2].reshape(())) == pytest.approx(gs, rel=2.0**-23)  # a reciprocal, and one of it

    moved = scales != want_scales
    middle = (e4m3_decode(scales) + e4m3_decode(want_scales)) / 2
    exact = np.abs(as_numpy(x).astype(np.float64)).reshape(*moved.shape, 16).max(axis=-1) / 6 / gs
    assert (np.abs(scales.astype(int) - want_scales)[moved] == 1).all()
    assert (np.abs(exact / middle - 1)[moved] <= NEAR_TIE).all()

    codes, want_codes = unpack(theirs[0]), unpack(mine[0])
    moved_code = (codes != want_codes) & ~np.repeat(moved, 16, axis=1)
    assert (codes // 8 == want_codes // 8).all()
    assert (np.abs(codes.astype(int) - want_codes)[moved_code] == 1).all()
    assert (midpoint_distance(x, mine[1], gs)[moved_code] <= NEAR_TIE).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("quantize_theirs", "dtype"),
    [
        (modelopt, torch.float32),
        (modelopt, torch.bfloat16),
        (torchao, torch.float32),
        (torchao, torch.bfloat16),
        (compressed_tensors, torch.float32),
    ],
)
def test_same_bytes(quantize_theirs: Callable[[Tensor], Quantized], dtype, seed):
    """Scales and codes of moderate data are the library's."""
    x = moderate(dtype, seed)
    assert_agrees(quantize_theirs(x), quantize_to_nvfp4(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "divisor", "adaptive"), [("mse", 1536, True), ("static_6", 2688, False)])
def test_same_bytes_as_4_over_6(rule, divisor, adaptive, dtype):
    """The authors' own PyTorch code makes the same choice in each block, and the same bytes."""
    x = moderate(dtype, seed=4)
    theirs, mine = fouroversix(x, rule, divisor), ours(x, four_over_six=adaptive)
    assert_agrees(theirs, mine, x)


# Differences by design.


def special() -> Tensor:
    """Four blocks with amax 2688 (so gs = 1): the largest, zeros, scale 2^-11 (underflows), scale 2^-8 (subnormal)."""
    x = torch.zeros(4, 16)
    x[0, :3] = torch.tensor([2688.0, -0.0, 448.0])
    x[2, :3] = 6 * 2.0**-11 * torch.tensor([1.0, -0.5, 0.1])
    x[3, :3] = 6 * 2.0**-8 * torch.tensor([1.0, -0.5, 0.1])
    return x


def scales_and_values(quantized: Quantized) -> tuple[list[float], list[list[float]]]:
    """The four block scales of :func:`special` and the first three decoded values of each block."""
    values = dequantize(quantized[0], quantized[1], float(quantized[2]))
    return e4m3_decode(quantized[1])[:, 0].tolist(), values[:, :3].tolist()


def test_our_special_blocks():
    """Here: a zero or underflowing block has scale 0 and decodes to zeros; a subnormal scale is used as it is."""
    sf, values = scales_and_values(quantize_to_nvfp4(special()))
    assert sf == [448, 0, 0, 2.0**-8]
    assert values == [[2688, 0, 448], [0, 0, 0], [0, 0, 0], [6 * 2.0**-8, -3 * 2.0**-8, 0.5 * 2.0**-8]]


def test_modelopt_floors_scales():
    """ModelOpt gives a zero block scale 1 and floors others at 2^-9, so that underflowing blocks keep coarse values."""
    sf, values = scales_and_values(modelopt(special()))
    assert sf == [448, 1, 2.0**-9, 2.0**-8]
    _, want = scales_and_values(quantize_to_nvfp4(special()))
    assert values[:2] + values[3:] == want[:2] + want[3:]
    assert values[2] == [1.5 * 2.0**-9, -1 * 2.0**-9, 0]  # 1.5, 0.75 (a tie) and 0.15 steps; here the block is zero


def test_torchao_floors_scales():
    """torchao floors all scales at 2^-6: small blocks are coded more coarsely, never more exactly, than here."""
    x = special()
    theirs, mine = torchao(x), quantize_to_nvfp4(x)
    sf, values = scales_and_values(theirs)
    assert sf == [448, 2.0**-6, 2.0**-6, 2.0**-6]
    assert values == [[2688, 0, 448], [0, 0, 0], [0, 0, 0], [1.5 * 2.0**-6, -1 * 2.0**-6, 0]]
    errors = [np.abs(dequantize(fp4, s, float(gs)) - x.numpy()).max(axis=1) for fp4, s, gs in (theirs, mine)]
    assert (errors[1] <= errors[0]).all()


def test_compressed_tensors_replaces_zero_scales():
    """compressed-tensors stores 2^-3 where a scale rounds to 0; the values under it decode to zeros, as here."""
    sf, values = scales_and_values(compressed_tensors(special()))
    assert sf == [448, 2.0**-3, 2.0**-3, 2.0**-8]
    assert values == scales_and_values(quantize_to_nvfp4(special()))[1]


def test_compressed_tensors_scales_bf16_data_in_bf16():
    """Of bf16 data, compressed-tensors takes the global scale in bf16; here (as in the others) it is fp32."""
    x = moderate(torch.bfloat16, seed=5)
    _, _, gs = compressed_tensors(x)
    divisor = 1 / gs.double()
    assert divisor.item() == pytest.approx(divisor.bfloat16().item(), rel=2.0**-23)
    mine = quantize_to_nvfp4(x)[2]
    assert gs.item() == pytest.approx(mine.item(), rel=2.0**-8)
    assert gs.item() != pytest.approx(mine.item(), rel=2.0**-12)
    assert float(quantize(x)[2]) == mine.item()


@pytest.mark.parametrize("quantize_theirs", [modelopt, compressed_tensors])
def test_signs_of_zeros(quantize_theirs: Callable[[Tensor], Quantized]):
    """Two libraries drop the sign of a zero (code 0); here, as in torchao, it is kept (code 8)."""
    x = special()[:1]
    assert unpack(quantize_theirs(x)[0])[0, 1] == 0
    assert unpack(quantize_to_nvfp4(x)[0])[0, 1] == unpack(torchao(x)[0])[0, 1] == 8


@pytest.mark.parametrize("quantize_theirs", [modelopt, torchao])
def test_all_zero_tensor_elsewhere(quantize_theirs: Callable[[Tensor], Quantized]):
    """ModelOpt and torchao divide by a global scale of 0 and store NaN scales; here zeros stay zeros, with gs = 1."""
    x = torch.zeros(2, 32)
    _, sf, gs = quantize_theirs(x)
    assert gs == 0
    assert np.isnan(e4m3_decode(sf)).all()
    mine = quantize_to_nvfp4(x)
    assert mine[2] == 1
    assert not dequantize(*mine).any()


def test_all_zero_tensor_in_compressed_tensors():
    """compressed-tensors keeps zeros too, with the same gs = 1."""
    fp4, sf, gs = compressed_tensors(torch.zeros(2, 32))
    assert gs == 1
    assert not dequantize(fp4, sf, gs).any()


# Our bytes in their hands.


def test_modelopt_decodes_our_bytes():
    """ModelOpt's dequantize reads them alike: the exact product, in fp32 with two roundings."""
    tensor = library("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    fp4, sf, gs = quantize_to_nvfp4(moderate(torch.float32, seed=6))
    theirs = tensor(torch.Size((256, 512)), torch.float32, fp4).dequantize(
        dtype=torch.float32, scale=sf, double_scale=gs, block_sizes={-1: 16}
    )
    np.testing.assert_allclose(theirs.numpy(), dequantize(fp4, sf, gs), rtol=2 * 2.0**-24)


@pytest.mark.parametrize("swizzled", [False, True])
def test_torchao_decodes_our_bytes(swizzled):
    """torchao's tensor reads them alike, with linear scales and with ours swizzled."""
    nvfp4 = library("torchao.prototype.mx_formats.nvfp4_tensor")
    fp4, sf, gs = quantize_to_nvfp4(moderate(torch.float32, seed=6))
    scale = pad_and_swizzle_single(sf).view(256, 32) if swizzled else sf
    theirs = nvfp4.NVFP4Tensor(fp4, scale, 16, torch.float32, gs, is_swizzled_scales=swizzled).dequantize()
    np.testing.assert_allclose(theirs.numpy(), dequantize(fp4, sf, gs), rtol=2 * 2.0**-24)


def test_compressed_tensors_decompresses_our_bytes():
    """Its decompress reads them alike, given 1 / gs: in bf16, so with a rounding of 2^-9 at each of two steps."""
    compressor = library("compressed_tensors.compressors.nvfp4").NVFP4PackedCompressor
    scheme = library("compressed_tensors.quantization").preset_name_to_scheme("NVFP4", ["Linear"])
    fp4, sf, gs = quantize_to_nvfp4(moderate(torch.float32, seed=6))
    state = {"weight_packed": fp4, "weight_scale": sf, "weight_global_scale": 1 / gs.reshape(1)}
    theirs = compressor.decompress(state, scheme)["weight"].double().numpy()
    np.testing.assert_allclose(theirs, dequantize(fp4, sf, gs), rtol=2 * 2.0**-9)


# The swizzle.


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 9), (300, 16)], ids=str)
def test_same_swizzle(shape):
    """torchao's ``to_blocked`` gives our swizzled buffer, and its ``from_blocked`` reads one as our inverse does."""
    utils = library("torchao.prototype.mx_formats.utils")
    rng = np.random.default_rng(7)
    layout = Swizzle32x4x4(*shape)
    sf, flat = (torch.from_numpy(rng.integers(1, 256, size, dtype=np.uint8)) for size in (shape, layout.numel))
    assert torch.equal(utils.to_blocked(sf), pad_and_swizzle_single(sf))
    assert torch.equal(utils.from_blocked(flat, *shape), layout.unswizzle(flat))


def test_torchao_swizzles_its_own_scales_as_we_do():
    """From data to swizzled scales in torchao, and with our functions: the same bytes."""
    nvfp4 = library("torchao.prototype.mx_formats.nvfp4_tensor")
    x = moderate(torch.float32, seed=8)[:200]
    fp4, sf, gs = quantize_to_nvfp4(x)
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=gs, is_swizzled_scales=True)
    assert torch.equal(theirs.scale.reshape(-1).view(torch.uint8), pad_and_swizzle_single(sf).view(torch.uint8))
    codes, want = e2m1_decode(unpack(theirs.qdata)), e2m1_decode(unpack(fp4))
    near = midpoint_distance(x, sf, gs) <= NEAR_TIE
    np.testing.assert_array_equal(codes[~near], want[~near])
