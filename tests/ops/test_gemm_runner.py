"""The grouped GEMM entry points: documented operand layouts against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import dequantize, random_weights, relative_l2

from dsv4 import InputError
from dsv4.ops.gemm_runner import (
    run_fused_swiglu_grouped_gemm,
    run_nvfp4_grouped_gemm,
    warmup_compilation,
    warmup_fused_swiglu_compilation,
)
from dsv4.ops.layouts import (
    assemble_raw_scales_2d3d_3d_side,
    interleave_l1_weights,
    make_b_k_major,
    pad_and_swizzle_single,
    round_up,
)
from dsv4.ops.quantize import quantize_activation_nvfp4

BAR = 3e-3
E, K, N = 4, 96, 64


class Case:
    """Operands for the given rows of each expert, with ``spare`` rows past the last end, and the float64 product."""

    def __init__(self, counts: list[int], device: torch.device, *, interleave: bool = False, spare: int = 0):
        generator = torch.Generator().manual_seed(0)
        self.counts, self.device = counts, device
        self.rows = sum(counts) + spare
        weights = random_weights(E, K, N // 2, seed=0, split_gate_up=True)
        w_fp4, w_sf = weights.l1_fp4, weights.l1_sf.view(torch.float8_e4m3fn)
        self.gs_b = weights.l1_gs
        x = torch.randn(self.rows, K, generator=generator)
        self.gs_a = torch.rand(E, generator=generator) * 0.01 + 0.001
        expert = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
        row_gs = torch.cat([self.gs_a[expert], torch.ones(spare)])
        fp4, sf = quantize_activation_nvfp4(x, row_gs)
        parts = []
        for piece in sf[: sum(counts)].split(counts):
            padded = torch.zeros(round_up(piece.shape[0], 128), K // 16, dtype=torch.uint8)
            padded[: piece.shape[0]] = piece.view(torch.uint8)
            parts.append(padded)
        order = torch.arange(N)
        if interleave:  # columns [gate | up] -> [g*4, u*4, ...], codes and scales alike
            order = interleave_l1_weights(order)
        sf_b = w_sf.view(torch.uint8)[:, order].view(torch.float8_e4m3fn)
        self.operands = {
            "mat_a": fp4,
            "mat_b": make_b_k_major(w_fp4[:, order].transpose(1, 2)),
            "scale_a": pad_and_swizzle_single(torch.cat(parts)).view(torch.float8_e4m3fn),
            "scale_b": assemble_raw_scales_2d3d_3d_side(list(sf_b)),
            "expert_offsets": torch.tensor(counts).cumsum(0).to(torch.int32),
            "global_scale_a": self.gs_a,
        }
        self.operands = {name: t.to(device) for name, t in self.operands.items()}
        a = dequantize(fp4, sf, row_gs[:, None].numpy())
        b = dequantize(w_fp4, w_sf, 1.0)  # [E, N, K], without its global scales
        self.product = np.zeros((self.rows, N))
        for row, e in enumerate(expert.tolist()):
            self.product[row] = a[row] @ b[e].T
        self.expert = expert

    def scaled(self, separate: bool) -> np.ndarray:
        """The product with B's global scales: one an expert, or its gate and up scale by halves."""
        result = self.product.copy()
        for row, e in enumerate(self.expert.tolist()):
            gate, up = self.gs_b[e].tolist() if separate else [self.gs_b[e, 0].item()] * 2
            result[row, : N // 2] *= gate
            result[row, N // 2 :] *= up
        return result

    def global_scale_b(self, separate: bool) -> torch.Tensor:
        return (self.gs_b if separate else self.gs_b[:, 0].contiguous()).to(self.device)


COUNTS = [[3, 0, 130, 1], [0, 0, 0, 5], [128, 128, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("separate", [False, True])
def test_grouped_gemm(device, counts, separate):
    """Every expert's rows meet its own matrix and scales; experts may be empty, scale rows are padded to 128."""
    case = Case(counts, device)
    out = run_nvfp4_grouped_gemm(**case.operands, global_scale_b=case.global_scale_b(separate), out_dtype=torch.float32)
    assert out.shape == (case.rows, N)
    if case.rows:
        assert relative_l2(out.cpu(), case.scaled(separate)) < 1e-6  # fp32 accumulation of exact products


def test_row_scale_and_dtypes(device):
    """row_scale multiplies output rows; bf16 is the fp32 result rounded once; a 4-bit dtype is accepted."""
    case = Case([3, 0, 5, 1], device)
    row_scale = torch.arange(1, 10, device=device).float()
    arguments = case.operands | {"global_scale_b": case.global_scale_b(True)}
    full = run_nvfp4_grouped_gemm(**arguments, row_scale=row_scale, out_dtype=torch.float32)
    want = case.scaled(True) * row_scale.cpu().numpy()[:, None]
    assert relative_l2(full.cpu(), want) < 1e-6
    arguments["mat_a"] = arguments["mat_a"].view(torch.float4_e2m1fn_x2)
    half = run_nvfp4_grouped_gemm(**arguments, row_scale=row_scale)
    assert torch.equal(half, full.bfloat16())


def test_rows_past_the_end_are_not_touched(device):
    """``out`` keeps what it held in rows past the last end, NaN included."""
    case = Case([3, 0, 5, 1], device, spare=6)
    out = torch.full((15, N), torch.nan, device=device)
    run_nvfp4_grouped_gemm(**case.operands, global_scale_b=case.global_scale_b(True), out=out)
    assert out[9:].isnan().all()
    assert relative_l2(out[:9].cpu(), case.scaled(True)[:9]) < 1e-6


def swiglu(product: np.ndarray, limit: float) -> np.ndarray:
    gate, up = product[:, : N // 2], product[:, N // 2 :]
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_fused_swiglu(device, counts, limit, layout):
    """Interleaved columns, clamp (0.0 is off) and both output layouts; up groups stay as they were."""
    case = Case(counts, device, interleave=True, spare=2)
    want = swiglu(case.scaled(True), limit)
    columns = N // 2 if layout == "half" else N
    out = torch.full((case.rows, columns), 7.0, dtype=torch.bfloat16, device=device)
    arguments = case.operands | {"global_scale_b": case.global_scale_b(True), "swiglu_limit": limit}
    result = run_fused_swiglu_grouped_gemm(**arguments, out=out)  # the layout follows from out's width
    assert result is out
    got = out.cpu()
    if layout == "interleaved":
        groups = got.unflatten(1, (-1, 2, 4))
        assert (groups[:, :, 1] == 7).all()
        got = groups[:, :, 0].flatten(1)
    assert (got[-2:] == 7).all()
    if sum(counts):
        assert relative_l2(got[:-2], want[:-2]) < BAR
    allocated = run_fused_swiglu_grouped_gemm(**arguments, layout=layout)
    assert allocated.shape == out.shape


def test_fused_default_is_half(device):
    """Without out and layout the result is [rows, I]; one global scale an expert serves gate and up."""
    case = Case([3, 0, 5, 1], device, interleave=True)
    got = run_fused_swiglu_grouped_gemm(**case.operands, global_scale_b=case.global_scale_b(False))
    assert got.shape == (9, N // 2)
    assert relative_l2(got.cpu(), swiglu(case.scaled(False), 0.0)) < BAR


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mat_a": torch.zeros(9, 40, dtype=torch.uint8)}, "same K"),
        ({"mat_a": torch.zeros(9, 48)}, "mat_a"),
        ({"expert_offsets": torch.zeros(3, dtype=torch.int32)}, "expert_offsets"),
        ({"scale_b": torch.zeros(4, 8, dtype=torch.float8_e4m3fn)}, "scale_b"),
        ({"scale_a": torch.zeros(512, dtype=torch.uint8)}, "scale_a.*at least 384 rows"),
        ({"scale_a": torch.zeros(4096)}, "scale_a"),
        ({"global_scale_a": torch.ones(())}, "global_scale_a"),
        ({"global_scale_b": torch.ones(4, 3)}, "global_scale_b"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"out": torch.zeros(9, N + 1)}, "out"),
    ],
)
def test_bad_operands(change, match):
    """An operand that does not fit is refused by name."""
    case = Case([3, 0, 5, 1], torch.device("cpu"))
    with pytest.raises(InputError, match=match):
        run_nvfp4_grouped_gemm(**(case.operands | {"global_scale_b": case.global_scale_b(True)} | change))


def test_bad_fused_settings():
    """A negative limit and an unknown layout are refused."""
    case = Case([3, 0, 5, 1], torch.device("cpu"), interleave=True)
    arguments = case.operands | {"global_scale_b": case.global_scale_b(True)}
    with pytest.raises(InputError, match="swiglu_limit"):
        run_fused_swiglu_grouped_gemm(**arguments, swiglu_limit=-1.0)
    with pytest.raises(InputError, match="layout"):
        run_fused_swiglu_grouped_gemm(**arguments, layout="quarter")  # type: ignore[arg-type]


def test_warmups(device):
    """The warm-up entry points take the documented arguments and check them."""
    warmup_compilation(E, K // 2, N, device)
    warmup_fused_swiglu_compilation(E, K // 2, N, device, swiglu_limit=10.0)
    with pytest.raises(InputError, match="K must be a multiple"):
        warmup_compilation(E, 9, N, device)
    with pytest.raises(InputError, match="swiglu_limit"):
        warmup_fused_swiglu_compilation(E, K // 2, N, device, swiglu_limit=-1.0)
