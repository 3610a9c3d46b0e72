"""Every Triton kernel compiles for every architecture it claims, without a GPU, and uses what it should of the chip."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from dsv4.backends import hopper, proof
from dsv4.backends.base import Call, InputScales, Packed
from dsv4.backends.portable import HOPPER_TILINGS, TILINGS, PortableBackend
from dsv4.config import MoEConfig
from kernels.offline import Launch, recorded, sass

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
E, H, INTER, K = 64, 256, 128, 2


class _Properties:
    multi_processor_count = 132

    def __init__(self, major: int):
        self.major = major


@pytest.fixture(autouse=True)
def a_gpu_on_paper(monkeypatch):
    """Hopper, unless a test says otherwise."""
    use_gpu(monkeypatch, 90)


def use_gpu(monkeypatch, arch: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties(arch // 10))


def launches(tokens: int, **settings) -> list[Launch]:
    """What the backend launches for one call."""
    config = MoEConfig(E, H, INTER, max_num_tokens=max(tokens, 16), top_k=settings.pop("top_k", K), **settings)
    scales = InputScales.updated(None, torch.ones(E), torch.ones(E))
    fixed = config.quantizes_activations and config.activation_scale == "static"
    call = Call(
        torch.zeros(tokens, H, dtype=torch.bfloat16),
        torch.zeros(tokens, config.top_k),
        torch.zeros(tokens, config.top_k, dtype=torch.int64),
        input_scales=scales if fixed else None,
    )
    return launches_of(config, call, torch.zeros(tokens, H, dtype=torch.bfloat16))


def launches_of(config: MoEConfig, call: Call, out: torch.Tensor) -> list[Launch]:
    backend, packed, scratch = prepared(config)
    with recorded() as found:
        backend.run(packed, call, scratch, out)
    return found


def prepared(config: MoEConfig) -> tuple[PortableBackend, Packed, torch.Tensor]:
    """The backend on paper, its weights and its scratch."""
    backend = PortableBackend(config, torch.device("cpu"))
    scratch = torch.zeros(PortableBackend.workspace_bytes(config, torch.device("cpu")), dtype=torch.uint8)
    packed = Packed(torch.zeros(E, backend._l2.end, dtype=torch.uint8), torch.ones(E, 2), torch.ones(E))
    return backend, packed, scratch


VARIANTS = {
    "w4a16": {"activation_format": "bf16", "swiglu_limit": 10.0},
    "static": {},
    "token": {"activation_scale": "token"},
    "tensor": {"activation_scale": "tensor"},
    "unfused": {"activation_scale": "token", "fused_swiglu": False, "swiglu_limit": 10.0},
    "per-expert": {"l1_scale_policy": "per_expert", "route_weight": "before_down"},
    "input": {"activation_format": "bf16", "route_weight": "input", "top_k": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [4, 4000])
def test_every_stage_compiles_for_hopper(variant, tokens, tmp_path):
    """Each launch of each mode compiles, spills nothing to local memory, and fits into shared memory."""
    found = launches(tokens, **VARIANTS[variant])
    assert [launch.kernel.__name__ for launch in found][-1] == "_combine"
    for launch in found:
        compiled = launch.compile(90)
        assert not {"LDL", "STL"} & set(sass(compiled.asm["cubin"], tmp_path)), launch.kernel.__name__
        assert compiled.metadata.shared <= SHARED_MEMORY[90] * 1024, launch.kernel.__name__


def misaligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, but not at a multiple of 16 bytes."""
    numel = math.prod(shape)
    return torch.zeros(numel + 16, dtype=dtype)[1 : numel + 1].view(shape)


@pytest.mark.parametrize("variant", ["w4a16", "token"])
def test_kernels_are_given_aligned_tensors(variant):
    """Views that begin anywhere are copied: asynchronous copies take 16 bytes, and another alignment would compile
    another kernel after warm-up. Only ``num_valid`` is read where it is, by kernels that take any alignment."""
    config = MoEConfig(E, H, INTER, max_num_tokens=16, top_k=K, **VARIANTS[variant])
    call = Call(
        misaligned(5, H, dtype=torch.bfloat16),
        misaligned(5, K, dtype=torch.float32),
        misaligned(5, K, dtype=torch.int32),
        num_valid_tokens=misaligned(1, dtype=torch.int32),
    )
    found = launches_of(config, call, misaligned(5, H, dtype=torch.bfloat16))
    assert found[-1].kernel.__name__ == "_combine"
    for launch in found:
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                assert parameter.do_not_specialize_on_alignment, (launch.kernel.__name__, parameter.name)
                assert value is call.num_valid_tokens


def test_warming_up_reaches_results_of_every_dtype():
    """Each call is run for every dtype that ``out_dtype`` allows: none is compiled later."""
    config = MoEConfig(E, H, INTER, max_num_tokens=4096, top_k=K, **VARIANTS["w4a16"])
    backend, packed, scratch = prepared(config)
    calls = [
        Call(torch.zeros(t, H, dtype=torch.bfloat16), torch.zeros(t, K), torch.zeros(t, K, dtype=torch.int32))
        for t in (1, 4096)
    ]
    with recorded() as found:
        backend.warmup(packed, scratch, calls)
    results = [launch.arguments["out"] for launch in found if launch.kernel.__name__ == "_combine"]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert {(len(out), out.dtype) for out in results} == {(t, dtype) for t in (1, 4096) for dtype in dtypes}


def gemms(tokens: int, **settings) -> list[Launch]:
    return [launch for launch in launches(tokens, **settings) if launch.kernel.__name__ == "_grouped_gemm"]


def tokens_for(line: int, table) -> int:
    """A call that takes this line of the table."""
    mean = table[line].rows_per_expert
    return max(1, int(mean * E / K)) if mean < 1e6 else 4096


# What a thread block may use, from CUDA's table of compute capabilities.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("line", [0, 3, len(TILINGS) - 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gemm_is_fit_for_every_architecture(arch, line, tmp_path, monkeypatch):
    """Tensor cores do the products, nothing spills between them, shared memory suffices: lines of every kind.

    (On some architectures division calls a function for hard cases, and the return address goes to local memory.)
    """
    use_gpu(monkeypatch, arch)
    for gemm in gemms(tokens_for(line, TILINGS), **VARIANTS["w4a16"]):
        compiled = gemm.compile(arch)
        listing = sass(compiled.asm["cubin"], tmp_path)
        products = [i for i, name in enumerate(listing) if name in ("HMMA", "HGMMA")]
        assert products
        assert not {"LDL", "STL"} & set(listing[products[0] : products[-1]])
        assert compiled.metadata.shared <= SHARED_MEMORY[arch] * 1024


@pytest.mark.parametrize("line", range(len(HOPPER_TILINGS)))
def test_hopper_multiplies_what_it_decodes_in_place(line, tmp_path):
    """The number of tensor-core instructions is the tile's, and decoded weights never pass through shared memory.

    A step multiplies BN x 128 weights with BM tokens; an ``mma`` does 16 x 16 by 8 of that for a warp, a ``wgmma`` 64 x
    16 by BM for four. Shared memory is written to by asynchronous copies, and in the epilogue, by STSM or STS, at most
    once for each result of a thread (twice where gate and up are stored apart).
    """
    rows_per_expert = HOPPER_TILINGS[line].rows_per_expert
    found = gemms(tokens_for(line, HOPPER_TILINGS), **VARIANTS["w4a16"])
    assert len(found) == 2
    for gemm, tiling in zip(found, (HOPPER_TILINGS[line].gemm1, HOPPER_TILINGS[line].gemm2), strict=True):
        block_m, block_n, warps, _, _, wgmma = tiling
        assert gemm.arguments["BM"] == block_m, rows_per_expert
        compiled = gemm.compile(90)
        ops = Counter(sass(compiled.asm["cubin"], tmp_path))
        repeat = block_n // (16 * warps)
        assert ops["HGMMA" if wgmma else "HMMA"] == repeat * 8 * (1 if wgmma else block_m // 8), dict(ops)
        assert ops["HMMA" if wgmma else "HGMMA"] == 0
        assert ops["STS"] + ops["STSM"] <= block_n * block_m // (32 * warps), dict(ops)
        assert ops["LDL"] == ops["STL"] == 0, dict(ops)
        assert compiled.metadata.shared <= SHARED_MEMORY[90] * 1024


@pytest.mark.parametrize("table", [TILINGS, HOPPER_TILINGS, hopper.TILINGS], ids=["any", "hopper", "hopper backend"])
def test_the_proof_reaches_every_line(table):
    """The calls of the self-check take each line of the tables once at least: no tiling is used unproven."""
    means = [tokens * proof._TOP_K / proof._EXPERTS for tokens in proof._TOKENS]
    lines = {next(i for i, line in enumerate(table) if mean <= line.rows_per_expert) for mean in means}
    assert lines == set(range(len(table)))


@pytest.mark.parametrize("tokens", [1, 4, 48, 384, 4096])
def test_one_kind_of_instruction_where_bits_are_promised(tokens):
    """With batch_invariant=True all calls, small and large, use ``mma``: it adds along K in one order."""
    found = gemms(tokens, batch_invariant=True, **VARIANTS["w4a16"])
    assert [gemm.arguments["WGMMA"] for gemm in found] == [False, False]
