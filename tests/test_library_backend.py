"""The library backend without its library: a stand-in multiplies, everything around it is its own.

What the library itself does, only ``dsv4 verify --backend library`` shows, on a machine that has it.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4.backends import library
from dsv4.backends.blackwell import layer_kernels
from dsv4.backends.library import LibraryBackend
from dsv4.config import MoEConfig, capacity
from dsv4.kernels.blackwell.launch import Operands, Requantized
from dsv4.nvfp4 import decode_e2m1, quantize_blocks, unpack_nibbles
from dsv4.ops import gemm_runner
from dsv4.ops.layouts import Swizzle32x4x4, assemble_raw_scales_2d3d_3d_side
from dsv4.ops.quantize import quantize_nvfp4_swizzled

CPU = torch.device("cpu")
COUNTS = [3, 0, 130, 5]
H, INTER, TOP_K = 96, 64, 2
USED = sum(COUNTS)
SLOTS = USED + 4  # the last are dropped


def operands(n: int, k: int, seed: int, gate_up: bool) -> Operands:
    """Rows by expert, scales and codes at random, slots in another order than rows."""
    g = torch.Generator().manual_seed(seed)
    e, ends = len(COUNTS), torch.tensor(COUNTS).cumsum(0).int()
    codes = torch.zeros(SLOTS, k // 2, dtype=torch.uint8)
    sf = torch.zeros(Swizzle32x4x4(capacity(SLOTS, e, 128), k // 16).numel, dtype=torch.uint8)
    x = torch.randn(SLOTS, k, generator=g)
    quantize_nvfp4_swizzled(x, 0.01, ends, out=(codes, sf.view(torch.float8_e4m3fn)))
    w = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, generator=g)
    w_sf = torch.randint(0, 0x40, (e, n, k // 16), dtype=torch.uint8, generator=g)
    order = torch.randperm(SLOTS, generator=g).int()
    return Operands(
        codes,
        sf,
        w,
        assemble_raw_scales_2d3d_3d_side(list(w_sf)),
        ends,
        torch.rand(e, generator=g) + 0.5,
        torch.rand((e, 2) if gate_up else (e,), generator=g) + 0.5,
        row_scale=torch.rand(SLOTS, generator=g) * 0.01,
        row_slot=torch.where(torch.arange(SLOTS) < USED, order, -1),
        topk_weights=torch.rand(SLOTS // TOP_K, TOP_K, generator=g),
    )


def stand_in(o: Operands) -> torch.Tensor:
    """Expert by expert in float64, rounded once to bf16, NaN behind the last end."""
    k = 2 * o.mat_a.shape[1]
    out = torch.full((o.mat_a.shape[0], o.mat_b.shape[1]), torch.nan, dtype=torch.bfloat16)
    sf_a = Swizzle32x4x4(o.scale_a.numel() // (-(-k // 64) * 4), k // 16).unswizzle(o.scale_a)
    begin = tiles = 0
    for expert, end in enumerate(o.ends.tolist()):
        rows = end - begin
        scale = sf_a[128 * tiles : 128 * tiles + rows].view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
        a = decode_e2m1(unpack_nibbles(o.mat_a[begin:end]), torch.float64) * scale
        sf_b = Swizzle32x4x4(o.mat_b.shape[1], k // 16).unswizzle(o.scale_b[expert])
        b = decode_e2m1(unpack_nibbles(o.mat_b[expert]), torch.float64)
        out[begin:end] = (a @ (b * sf_b.view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)).T).bfloat16()
        begin, tiles = end, tiles + -(-rows // 128)
    return out


@pytest.fixture
def backend(monkeypatch) -> LibraryBackend:
    monkeypatch.setattr(library, "multiply", stand_in)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=148, major=10)
    )
    config = MoEConfig(len(COUNTS), H, INTER, top_k=TOP_K, swiglu_limit=2.0, route_weight="before_down")
    return LibraryBackend(config, CPU)


def public(o: Operands) -> dict[str, torch.Tensor]:
    return {
        "mat_a": o.mat_a, "mat_b": o.mat_b.transpose(1, 2), "scale_a": o.scale_a, "scale_b": o.scale_b,
        "expert_offsets": o.ends, "global_scale_a": o.gs_a, "global_scale_b": o.gs_b, "row_scale": o.row_scale,
    }  # fmt: skip


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def test_rows_go_to_their_slots(backend):
    """GEMM 2: every scale applied, each row at its slot, slots that no expert serves never read from a NaN row."""
    o = operands(H, INTER, 0, gate_up=False)
    _, config = layer_kernels(backend.config, 64, fixed_scales=False)
    out = torch.zeros(SLOTS, H)
    backend._launch(replace(config, wide_out=True), o, out)
    want = gemm_runner.run_nvfp4_grouped_gemm(**public(o), out_dtype=torch.float32)
    got = out[o.row_slot[:USED].long()]
    assert relative_l2(got, want[:USED]) < 3e-3  # one rounding to bf16


@pytest.mark.parametrize("fixed", [False, True])
def test_swiglu_follows_the_library_s_product(backend, fixed):
    """GEMM 1: gate and up by fours with scales apart, clamp, routing weight; bf16, or the codes of that."""
    o = operands(2 * INTER, H, 1, gate_up=True)
    config, _ = layer_kernels(backend.config, 64, fixed_scales=fixed)
    weight = o.topk_weights.flatten()[o.row_slot[:USED].long()].unsqueeze(1)
    plain = gemm_runner.run_fused_swiglu_grouped_gemm(**public(o), swiglu_limit=2.0)[:USED]
    want = plain.float() * weight
    rows = torch.zeros(SLOTS, INTER, dtype=torch.bfloat16)
    backend._launch(replace(config, requantize=False), o, rows)
    assert relative_l2(rows[:USED], want) < 2e-2  # gate and up are rounded to bf16: library numerics
    if not fixed:
        return
    gs, e = torch.rand(len(COUNTS)) * 1e-2 + 1e-3, len(COUNTS)
    codes = torch.zeros(SLOTS, INTER // 2, dtype=torch.uint8)
    scales = torch.zeros(capacity(SLOTS, e, 128) * 4 + 512, dtype=torch.uint8)  # sized for a larger call
    backend._launch(config, o, codes, Requantized(scales, gs))
    expert = torch.searchsorted(o.ends, torch.arange(USED, dtype=torch.int32), right=True)
    want_codes, want_sf = quantize_blocks(rows[:USED], gs[expert].unsqueeze(1))
    assert torch.equal(codes[:USED], want_codes)
    linear = Swizzle32x4x4(capacity(SLOTS, e, 128), 4).unswizzle(scales[: capacity(SLOTS, e, 128) * 4])
    place = torch.cat([torch.arange(3), 128 + torch.arange(130), 384 + torch.arange(5)])
    assert torch.equal(linear[place], want_sf.view(torch.uint8))


def test_what_the_library_is_given(monkeypatch):
    """Operands in PyTorch's own form: packed fp4 with K contiguous, both block scales swizzled and of the documented
    shapes, global scales of one, ends on the device."""
    from torch.nn import functional
    from torch.nn.functional import ScalingType, SwizzleType

    calls = []
    monkeypatch.setattr(functional, "scaled_grouped_mm", lambda *args, **kwargs: calls.append((args, kwargs)))
    o = operands(H, INTER, 0, gate_up=False)
    library.multiply(o)
    ((a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b), keywords) = calls[0]
    assert (a.dtype, b.dtype) == (torch.float4_e2m1fn_x2,) * 2
    assert (a.shape, b.shape) == ((SLOTS, INTER // 2), (len(COUNTS), INTER // 2, H))
    assert (a.stride(1), b.stride(1)) == (1, 1)
    assert scale_a[0].shape == (capacity(SLOTS, len(COUNTS), 128), 4)
    assert scale_b[0].shape == (len(COUNTS), 128 * 4)
    assert {s[0].dtype for s in (scale_a, scale_b)} == {torch.float8_e4m3fn}
    assert all(s[1].tolist() == [1.0] * len(COUNTS) for s in (scale_a, scale_b))
    assert recipe_a == recipe_b == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert swizzle_a[0] == swizzle_b[0] == SwizzleType.SWIZZLE_32_4_4
    assert keywords["offs"] is o.ends


def test_it_declines_by_name(monkeypatch):
    """Without the chip, without the library's kernel, and where bits are promised."""
    config = MoEConfig(8, 256, 128)
    cuda = torch.device("cuda", 0)
    assert "found cpu" in LibraryBackend.explain(config, CPU).reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "found 9.0" in LibraryBackend.explain(config, cuda).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(library, "_missing", lambda device: "this build of PyTorch has no grouped NVFP4 GEMM: no")
    assert "this build" in LibraryBackend.explain(config, cuda).reason
    invariant = MoEConfig(8, 256, 128, activation_scale="token", batch_invariant=True)
    assert "independent of the batch" in LibraryBackend.explain(invariant, cuda).reason
    monkeypatch.setattr(library, "_missing", lambda device: None)
    verdict = LibraryBackend.explain(config, cuda)
    assert verdict.usable
    assert verdict.reason.startswith("library numerics")


def test_a_build_without_the_kernel_is_told_from_one_with_it(monkeypatch):
    """PyTorch on a CPU has none and says so; a stand-in that multiplies passes, one that is wrong does not."""
    assert "has no grouped NVFP4 GEMM" in library._missing.__wrapped__(CPU)
    monkeypatch.setattr(library, "multiply", stand_in)
    assert library._missing.__wrapped__(CPU) is None
    monkeypatch.setattr(library, "multiply", lambda o: 2 * stand_in(o))
    assert "something else" in library._missing.__wrapped__(CPU)
