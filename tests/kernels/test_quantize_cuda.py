"""The quantizing and swizzling kernels on a GPU at real sizes: the torch twin's bytes, in graphs and under compile."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("triton")

from dsv4.config import capacity
from dsv4.nvfp4 import Nvfp4Tensor, finite_row_amax, global_scale, quantize_blocks
from dsv4.ops.layouts import Swizzle32x4x4, gate_groups, swizzle_32_4_4
from dsv4.ops.quantize import (
    deinterleave_amax_quantize_nvfp4_fused,
    deinterleave_quantize_nvfp4_cuda,
    quantize_activation_nvfp4,
    quantize_nvfp4_gpu_fused,
    quantize_nvfp4_swizzled,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(1, 16), (1, 7168), (3, 4096), (64, 4096), (1000, 48), (333, 3072), (8192, 4096), (5, 131088)]


def hard_rows(rows: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different size, with ties, signed zeros, subnormals, NaN and Inf among them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, k, device="cuda", generator=generator)
    span = 12 if dtype == torch.float16 else 100
    x *= torch.exp2(torch.randint(-span, span // 4, (rows, 1), device="cuda", generator=generator).float())
    x[1::7] = torch.randint(-12, 13, x[1::7].shape, device="cuda", generator=generator) * 0.25  # many ties
    x[2::9] = -0.0
    if rows > 8:
        x[5, 3], x[6, 0], x[7, k - 1] = torch.nan, torch.inf, -torch.inf
        x[8, :16] = 1e-42
    return x.to(dtype)


def assert_bytes(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(("codes", "scales", "gs"), got, want, strict=True):
        a, b = (t.reshape(-1).view(torch.uint8) for t in (a, b))
        wrong = (a != b).nonzero()
        assert not wrong.numel(), (name, wrong.numel(), wrong[:5].tolist(), a[wrong[:5, 0]], b[wrong[:5, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_of_the_twin(shape, dtype):
    """Codes, scales and gs: own scale, one a row, and from interleaved columns with poison between."""
    for seed in range(3):
        x = hard_rows(*shape, dtype, seed)
        q = Nvfp4Tensor.quantize(x)
        assert_bytes(quantize_nvfp4_gpu_fused(x), (q.codes, q.sf, q.gs))
        gs = global_scale(finite_row_amax(x)) * torch.exp2(torch.randn(shape[0], device="cuda"))
        assert_bytes(quantize_activation_nvfp4(x, gs), quantize_blocks(x, gs.unsqueeze(1)))
        wide = torch.full((shape[0], shape[1] // 4, 2, 4), torch.nan, dtype=dtype, device="cuda")
        wide[:, :, 0] = x.view(shape[0], -1, 4)
        wide = wide.view(shape[0], -1)
        assert torch.equal(gate_groups(wide).nan_to_num(), x.nan_to_num())
        assert_bytes(deinterleave_amax_quantize_nvfp4_fused(wide, shape[1]), (q.codes, q.sf, q.gs))
        assert_bytes(deinterleave_quantize_nvfp4_cuda(wide, shape[1], q.gs), (q.codes, q.sf))


@pytest.mark.parametrize("k", [16, 2048, 7168])
@pytest.mark.parametrize("experts", [1, 7, 256, 384])
def test_swizzled_bytes_of_the_twin(experts, k):
    """Skewed, empty and uniform experts; the CPU twin's bytes over the same poison."""
    generator = torch.Generator().manual_seed(experts + k)
    for rows in (1, 384, 3000):
        x = hard_rows(rows, k, torch.bfloat16, seed=rows)
        ends = torch.randint(0, rows + 1, (experts,), generator=generator).sort().values.to(torch.int32)
        gs = torch.rand(experts, generator=generator) + 1e-3
        sf_numel = Swizzle32x4x4(capacity(rows, experts, 128), k // 16).numel
        results = []
        for device in ("cpu", "cuda"):
            fp4 = torch.full((rows, k // 2), 0x5A, dtype=torch.uint8, device=device)
            sf = torch.full((sf_numel,), 0x5A, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            results.append(quantize_nvfp4_swizzled(x.to(device), gs.to(device), ends.to(device), (fp4, sf)))
        assert_bytes(tuple(t.cpu() for t in results[1]), results[0])


@pytest.mark.parametrize("shape", [(1, 1), (127, 3), (129, 256), (8192, 448), (1000, 260)], ids=str)
def test_swizzle_of_the_twin(shape):
    """Every byte, padding included, over poison."""
    sf = torch.randint(1, 256, shape, dtype=torch.uint8, device="cuda")
    layout = Swizzle32x4x4(*shape)
    out = torch.full((layout.numel,), 0x77, dtype=torch.uint8, device="cuda")
    assert torch.equal(swizzle_32_4_4(sf, out=out), layout.swizzle(sf))


def pipeline(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    fp4, sf, gs = quantize_nvfp4_gpu_fused(x)
    ends = torch.full((4,), x.shape[0], dtype=torch.int32, device=x.device)
    return fp4, swizzle_32_4_4(sf), gs, *quantize_nvfp4_swizzled(x, gs, ends)


def twin(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = Nvfp4Tensor.quantize(x)
    flat = Swizzle32x4x4(*q.sf.shape).swizzle(q.sf)
    return q.codes, flat, q.gs, q.codes, flat


def assert_pipeline(got: tuple[torch.Tensor, ...], x: torch.Tensor) -> None:
    for a, b in zip(got, twin(x), strict=True):
        # Tiles behind the last expert's are undefined.
        assert torch.equal(a.reshape(-1).view(torch.uint8)[: b.nbytes], b.reshape(-1).view(torch.uint8))


def test_in_a_graph_without_the_host():
    """Captured and replayed on new values; nothing synchronises."""
    x = hard_rows(130, 2048, torch.bfloat16, 0)
    pipeline(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pipeline(x)
    for seed in (1, 2):
        fresh = hard_rows(130, 2048, torch.bfloat16, seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            x.copy_(fresh)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_pipeline(got, fresh)


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="needs a C compiler")
def test_under_compile():
    """torch.compile traces through without a graph break and gives the same bytes."""
    compiled = torch.compile(pipeline, fullgraph=True)
    for seed in (0, 1):
        x = hard_rows(130, 2048, torch.bfloat16, seed)
        assert_pipeline(compiled(x), x)
