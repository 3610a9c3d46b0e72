"""The Blackwell kernel and backend on a GPU without its tensor cores: everything but those, against plain torch.

See :mod:`kernels.blackwell_emulation`; ``test_blackwell_on_cpu.py`` runs the same without a GPU. What is emulated stays
unproven: docs/blackwell.md has the list.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import MODES, inputs, random_weights
from test_moe_numbers import compare

pytest.importorskip("triton")

from dsv4 import backends
from dsv4.backends import proof
from dsv4.backends.base import Verdict
from dsv4.backends.blackwell import BlackwellBackend, declines
from dsv4.config import capacity
from dsv4.kernels.blackwell import ops
from dsv4.kernels.blackwell.launch import Requantized
from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS
from dsv4.nvfp4 import quantize_blocks
from dsv4.ops import gemm_runner
from dsv4.ops.layouts import Swizzle32x4x4, assemble_raw_scales_2d3d_3d_side
from dsv4.ops.quantize import quantize_nvfp4_swizzled
from kernels.blackwell_emulated import PLAIN, TILES, emulated_kernel, layer_configs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
    ),
]

CUDA = torch.device("cuda")
COUNTS = {
    "ragged": [1, 0, 130, 128, 7, 0, 300],
    "one expert": [0, 0, 0, 515, 0, 0, 0],
    "none": [0] * 7,
    "tail unused": [3, 129, 0, 64, 2, 1, 0],
}


def problem(counts: list[int], n: int, k: int, spare: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Operands in the public layouts; ``spare`` rows of A behind the last end, and poisoned padding scales."""
    g = torch.Generator(CUDA).manual_seed(seed)
    e, rows = len(counts), sum(counts) + spare
    ends = torch.tensor(counts, device=CUDA).cumsum(0).int()
    x = torch.randn(rows, k, device=CUDA, generator=g)
    codes = torch.full((rows, k // 2), 0xFF, dtype=torch.uint8, device=CUDA)
    sf = torch.full((Swizzle32x4x4(capacity(rows, e, 128), k // 16).numel,), 0x7F, dtype=torch.uint8, device=CUDA)
    quantize_nvfp4_swizzled(x, 0.01, ends, out=(codes, sf.view(torch.float8_e4m3fn)))
    w = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device=CUDA, generator=g)
    w_sf = torch.randint(0, 0x40, (e, n, k // 16), dtype=torch.uint8, device=CUDA, generator=g)
    return {
        "mat_a": codes,
        "mat_b": w.transpose(1, 2),
        "scale_a": sf.view(torch.float8_e4m3fn),
        "scale_b": assemble_raw_scales_2d3d_3d_side(list(w_sf.view(torch.float8_e4m3fn))),
        "expert_offsets": ends,
        "global_scale_a": torch.rand(e, device=CUDA, generator=g) + 0.5,
        "global_scale_b": torch.rand(e, device=CUDA, generator=g) + 0.5,
    }


def close(got: torch.Tensor, want: torch.Tensor, bar: float) -> None:
    """Relative L2 of what was written; what was not is still poison in both."""
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num().double(), want.nan_to_num().double()
    if want.norm() > 0:
        assert ((got - want).norm() / want.norm()).item() < bar
    else:
        assert (got == 0).all()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tiles", TILES)
def test_plain_products(tiles, counts):
    """Every row, column and tail of K equals the reference within fp32 summation; rows past the end keep their poison.

    N leaves a tile partly filled, K a stage.
    """
    operands = problem(COUNTS[counts], 224, 352)
    rows = operands["mat_a"].shape[0]
    results = []
    for run, extra in (
        (gemm_runner.run_nvfp4_grouped_gemm, {}),
        (ops.run_nvfp4_grouped_gemm, {"config": TILES[tiles], "loader": emulated_kernel}),
    ):
        out = torch.full((rows, 224), torch.nan, device=CUDA)
        results.append(run(**operands, out=out, **extra))
    close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_scales_of_rows_and_halves(separate):
    """``row_scale``, gate and up scales by columns, bf16 results."""
    operands = problem(COUNTS["ragged"], 256, 256)
    rows = operands["mat_a"].shape[0]
    operands["row_scale"] = torch.rand(rows, device=CUDA) + 0.5
    if separate:
        operands["global_scale_b"] = torch.rand(7, 2, device=CUDA) + 0.5
    want = gemm_runner.run_nvfp4_grouped_gemm(**operands)
    close(ops.run_nvfp4_grouped_gemm(**operands, config=PLAIN, loader=emulated_kernel), want, 3e-3)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("limit", [0.0, 3.0])
def test_swiglu(layout, limit):
    """Clamped SwiGLU of interleaved columns with scales apart, in both layouts; up groups keep their poison."""
    operands = problem(COUNTS["ragged"], 192, 128)
    rows = operands["mat_a"].shape[0]
    operands |= {"row_scale": torch.rand(rows, device=CUDA), "global_scale_b": torch.rand(7, 2, device=CUDA)}
    results = []
    for run, extra in (
        (gemm_runner.run_fused_swiglu_grouped_gemm, {}),
        (ops.run_fused_swiglu_grouped_gemm, {"config": TILES["128x128"], "loader": emulated_kernel}),
    ):
        out = torch.full((rows, 96 if layout == "half" else 192), torch.nan, dtype=torch.bfloat16, device=CUDA)
        results.append(run(**operands, swiglu_limit=limit, layout=layout, out=out, **extra))
    close(results[1], results[0], 3e-3)


@pytest.mark.parametrize("tiles", ["64x64", "overlapped"])
def test_requantization_gives_the_twin_s_bytes(tiles):
    """Codes and swizzled scales are those of ``quantize_blocks`` on the kernel's own bf16 results, bit for bit.

    Scales make blocks saturate, underflow to zero and become NaN.
    """
    operands = problem(COUNTS["ragged"], 320, 128)
    operands["row_scale"] = torch.logspace(-6, 3, operands["mat_a"].shape[0], device=CUDA)
    operands["row_scale"][3] = torch.inf
    gs = torch.tensor([1e-3, 1e-2, 1e-1, 1.0, 10.0, 2.0**-99, 0.02], device=CUDA)
    config = TILES[tiles]
    rounded = ops.run_fused_swiglu_grouped_gemm(**operands, config=config, loader=emulated_kernel)
    rows, ends = operands["mat_a"].shape[0], operands["expert_offsets"]
    scales = torch.full((Swizzle32x4x4(capacity(rows, 7, 128), 10).numel,), 0x5A, dtype=torch.uint8, device=CUDA)
    codes = ops.run_fused_swiglu_grouped_gemm(
        **operands, requantized=Requantized(scales, gs), config=config, loader=emulated_kernel
    )
    used = int(ends[-1])
    expert = torch.searchsorted(ends, torch.arange(used, device=CUDA, dtype=torch.int32), right=True)
    want_codes, want_sf = quantize_blocks(rounded[:used], gs[expert].unsqueeze(1))
    assert torch.equal(codes[:used], want_codes)
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles_before = ((counts + 127) // 128).cumsum(0) - (counts + 127) // 128
    place = tiles_before[expert] * 128 + torch.arange(used, device=CUDA) - (ends - counts)[expert]
    linear = Swizzle32x4x4(capacity(rows, 7, 128), 12).unswizzle(scales)
    assert torch.equal(linear[place][:, :10], want_sf.view(torch.uint8))
    assert (linear[place][:, 10:] == 0).all()
    assert {0, 0x7E, 0x7F} <= set(want_sf.view(torch.uint8).flatten().tolist())


def test_many_experts():
    """The schedule's table at its largest, most experts empty."""
    counts = [(e % 7 == 3) * (1 + e % 3 * 70) for e in range(MAX_EXPERTS)]
    operands = problem(counts, 64, 64)
    want = gemm_runner.run_nvfp4_grouped_gemm(**operands, out_dtype=torch.float32)
    got = ops.run_nvfp4_grouped_gemm(**operands, out_dtype=torch.float32, config=PLAIN, loader=emulated_kernel)
    close(got, want, 1e-6)


class EmulatedBackend(BlackwellBackend):
    """The backend on the emulated kernel: all its lines of rows, none of its tiles."""

    name = "blackwell-emulated"
    loader = staticmethod(emulated_kernel)

    @classmethod
    def explain(cls, config, device):
        return Verdict(declines(config) is None, declines(config) or "")

    def _configs(self, call):
        return layer_configs(self.config, call.input_scales is not None)


def test_the_self_check_passes(monkeypatch, tmp_path):
    """The whole backend agrees with the reference: routing, staging, both GEMMs, requantization, combine; and a
    backend whose weights are one row off does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # One warp for a tensor core: small matrices, and no more calls than needed.
    monkeypatch.setattr(proof, "_SIZE", 256)
    monkeypatch.setattr(proof, "_TOKENS", (1, 48, 384))
    monkeypatch.setattr(EmulatedBackend, "budgets", lambda self: ())
    verdict = proof._check(EmulatedBackend, CUDA)
    assert verdict.usable, verdict.reason

    class OneRowOff(EmulatedBackend):
        def pack(self, weights, into=None):
            return super().pack(replace(weights, l2_fp4=weights.l2_fp4.roll(1, 1)), into)

    assert not proof._check(OneRowOff, CUDA).usable


@pytest.mark.parametrize("place", ["output", "before_down"])
@pytest.mark.parametrize("mode", ["w4a4-static", "w4a4-token", "w4a4-tensor"])
def test_the_layer_matches_the_oracle(mode, place, monkeypatch):
    """Dropped ids, a skewed expert, an idle one, and more than one tile of rows: within the bar of float64."""
    monkeypatch.setattr(backends, "BACKENDS", (EmulatedBackend,))
    monkeypatch.setattr(backends, "prove", lambda backend, device: Verdict(True, "asked elsewhere"))
    x, w, ids = inputs(200, 256, 2, 8, seed=3)
    ids[ids == 3] = 5
    ids[1::7, 0] = -1
    target = (EmulatedBackend.name, torch.empty(0, device=CUDA).device)
    weights = random_weights(8, 256, 128, seed=1, split_gate_up=True)
    compare(target, weights, MODES[mode] | {"swiglu_limit": 2.0, "route_weight": place}, (x, w, ids))
