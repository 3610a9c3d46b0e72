"""``quantize_nvfp4_swizzled``: codes and scales of the oracle, each scale where the layout's formula says."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import wide_values

from dsv4.config import capacity
from dsv4.errors import InputError
from dsv4.ops.gemm_runner import run_nvfp4_grouped_gemm
from dsv4.ops.layouts import assemble_raw_scales_2d3d_3d_side
from dsv4.ops.quantize import quantize_nvfp4_gpu_fused, quantize_nvfp4_swizzled, quantize_to_nvfp4

POISON = 0x5A
COUNTS = [[0], [1], [128], [129], [0, 3, 0, 0, 130, 1, 0], [128, 256], [0, 0, 5], [5, 0, 0], [1] * 9, [300, 0, 2]]


def poisoned(*shape: int, dtype: torch.dtype = torch.uint8, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.full(shape, POISON, dtype=torch.uint8, device=device).view(dtype)


def expected(x: torch.Tensor, gs: object, counts: list[int], tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """``(fp4 [M, K/2], sf)`` as poison overwritten row by row: each expert's from the start of a tile, padding zero."""
    cols = x.shape[1] // 16
    across = -(-cols // 4)
    fp4_all, sf_all, _ = oracle.quantize(x, gs)
    fp4 = np.full_like(fp4_all, POISON)
    sf = np.full((tiles * across, 512), POISON, np.uint8)
    row = tile = 0
    for count in counts:
        for r in range(-(-count // 128) * 128):
            within = (r % 32) * 16 + r % 128 // 32 * 4
            for c in range(across * 4):
                served = r < count and c < cols
                sf[(tile + r // 128) * across + c // 4, within + c % 4] = sf_all[row + r, c] if served else 0
        fp4[row : row + count] = fp4_all[row : row + count]
        row, tile = row + count, tile + -(-count // 128)
    return fp4, sf.reshape(-1)


@pytest.mark.parametrize("k", [16, 80, 1088])
@pytest.mark.parametrize("rows", [0, 1, 4, 127, 128, 300])
@pytest.mark.parametrize("per_row", [False, True])
def test_one_matrix(device, rows, k, per_row):
    """Without experts: whole tiles, padding rows and columns zero, over whatever stood in the buffers."""
    x = wide_values((rows, k), -6, 6, torch.bfloat16, seed=rows + k)
    gs = torch.linspace(0.001, 0.1, rows).unsqueeze(1) if per_row else torch.tensor(0.01)
    tiles = -(-rows // 128)
    out = (
        poisoned(rows, k // 2, device=device),
        poisoned(tiles * 128 * (-(-k // 64) * 4), dtype=torch.float8_e4m3fn, device=device),
    )
    fp4, sf = quantize_nvfp4_swizzled(x.to(device), gs.to(device), out=out)
    assert fp4 is out[0]
    assert sf is out[1]
    want = expected(x, gs, [rows], tiles)
    oracle.assert_same_bytes(fp4, sf, want)
    fresh = quantize_nvfp4_swizzled(x.to(device), gs.to(device))
    assert fresh[1].shape == sf.shape
    oracle.assert_same_bytes(*fresh, want)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("scale", ["one", "row", "expert"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts(device, counts, scale, dtype):
    """Each expert's scales begin a tile; rows past the last end and tiles behind the last expert's are left alone."""
    spare, k, experts = 7, 80, len(counts)
    rows = sum(counts) + spare
    x = wide_values((rows, k), -6, 6, torch.float32, seed=rows)
    x[0, 3] = torch.nan
    per_expert = torch.exp2(torch.linspace(-9, -3, experts))
    of_row = torch.cat([per_expert.repeat_interleave(torch.tensor(counts)), torch.ones(spare)])
    gs = {"one": torch.tensor([0.02]), "row": of_row.unsqueeze(1), "expert": per_expert}[scale]
    ends = torch.tensor(counts).cumsum(0).to(device, dtype)
    tiles = capacity(rows, experts, 128) // 128
    out = (
        poisoned(rows, k // 2, device=device),
        poisoned(tiles, 128 * 8, dtype=torch.float8_e4m3fn, device=device),
    )
    fp4, sf = quantize_nvfp4_swizzled(x.to(device), gs.to(device), ends, out)
    want = expected(x, gs if scale == "one" else of_row, counts, tiles)
    oracle.assert_same_bytes(fp4, sf.view(-1), want)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_counts(counts, cols, seed):
    """Any counts and widths, no row spare; a buffer of the documented size always suffices."""
    x = wide_values((sum(counts), 16 * cols), -3, 3, torch.bfloat16, seed)
    tiles = capacity(sum(counts), len(counts), 128) // 128
    out = (
        poisoned(sum(counts), 8 * cols),
        poisoned(tiles * 128 * (-(-cols // 4) * 4), dtype=torch.float8_e4m3fn),
    )
    fp4, sf = quantize_nvfp4_swizzled(x, 0.01, torch.tensor(counts).cumsum(0), out)
    oracle.assert_same_bytes(fp4, sf, expected(x, 0.01, counts, tiles))


def test_as_operand_of_the_grouped_gemm(device):
    """What it writes is what ``run_nvfp4_grouped_gemm`` takes: the float64 product of the decoded operands."""
    counts, n, k = [3, 0, 130], 32, 96
    x = wide_values((sum(counts), k), -2, 2, torch.bfloat16, seed=1).to(device)
    w = [quantize_to_nvfp4(wide_values((n, k), -4, 0, torch.float32, seed=2 + e).to(device)) for e in range(3)]
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    gs = quantize_nvfp4_gpu_fused(x)[2]
    fp4, sf = quantize_nvfp4_swizzled(x, gs, ends)
    out = run_nvfp4_grouped_gemm(
        mat_a=fp4,
        mat_b=torch.stack([codes.t() for codes, _, _ in w]),
        scale_a=sf,
        scale_b=assemble_raw_scales_2d3d_3d_side([sf for _, sf, _ in w]),
        expert_offsets=ends,
        global_scale_a=gs.expand(3).contiguous(),
        global_scale_b=torch.stack([gs for _, _, gs in w]),
        out_dtype=torch.float32,
    )
    a = oracle.dequantize(*oracle.quantize(x))
    weights = [oracle.dequantize(*(oracle.as_numpy(t) for t in q)) for q in w]
    expert = np.repeat(np.arange(3), counts)
    want = np.stack([a[row] @ weights[e].T for row, e in enumerate(expert)])
    assert oracle.relative_l2(out, want) < 1e-6  # fp32 sums of 96 terms


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x": torch.zeros(4, 24)}, r"multiple of 16.*\(4, 24\)"),
        ({"x": torch.zeros(16)}, r"matrix.*\(16,\)"),
        ({"gs": torch.ones(3)}, r"gs: .*one a row \(4\).*\(3,\)"),
        ({"gs": torch.ones(4), "expert_offsets": torch.tensor([1, 4])}, r"gs: .*\[4, 1\].*an expert \[2\].*\(4,\)"),
        ({"expert_offsets": torch.tensor([[4]])}, r"expert_offsets: .*\[E\].*\(1, 1\)"),
        ({"expert_offsets": torch.tensor([4.0])}, r"expert_offsets: .*int32 or int64.*float32"),
        ({"out": (torch.zeros(4, 7, dtype=torch.uint8), None)}, r"out fp4: .*\[4, 8\].*\[4, 7\]"),
        ({"out": (poisoned(4, 8), poisoned(512))}, r"out sf: .*float8_e4m3fn.*uint8"),
        ({"out": (poisoned(4, 8), poisoned(256, dtype=torch.float8_e4m3fn))}, "512 scales.*256"),
        ({"out": (poisoned(4, 16)[:, ::2], poisoned(512, dtype=torch.float8_e4m3fn))}, "contiguous.*strides"),
    ],
)
def test_bad_arguments(arguments, match):
    """Shapes, dtypes and buffers that do not fit are refused with what was found and expected."""
    with pytest.raises(InputError, match=match):
        quantize_nvfp4_swizzled(**({"x": torch.zeros(4, 16), "gs": 1.0} | arguments))
