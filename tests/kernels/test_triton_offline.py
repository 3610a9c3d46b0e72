"""Every Triton kernel compiles for every architecture it claims, without a GPU, and uses what it should of the chip."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsv4.backends.base import Call, InputScales, Packed
from dsv4.backends.portable import TILINGS, PortableBackend
from dsv4.config import MoEConfig
from kernels.offline import Launch, recorded, sass

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
E, H, INTER, K = 16, 256, 128, 4


class _Properties:
    multi_processor_count = 132


@pytest.fixture(autouse=True)
def a_gpu_on_paper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties())


def launches(tokens: int, **settings) -> list[Launch]:
    """What the backend launches for one call."""
    config = MoEConfig(E, H, INTER, max_num_tokens=max(tokens, 16), top_k=settings.pop("top_k", K), **settings)
    backend = PortableBackend(config, torch.device("cpu"))
    scratch = torch.zeros(PortableBackend.workspace_bytes(config, torch.device("cpu")), dtype=torch.uint8)
    packed = Packed(torch.zeros(E, backend._l2.end, dtype=torch.uint8), torch.ones(E, 2), torch.ones(E))
    scales = InputScales.updated(None, torch.ones(E), torch.ones(E))
    fixed = config.quantizes_activations and config.activation_scale == "static"
    call = Call(
        torch.zeros(tokens, H, dtype=torch.bfloat16),
        torch.zeros(tokens, config.top_k),
        torch.zeros(tokens, config.top_k, dtype=torch.int64),
        input_scales=scales if fixed else None,
    )
    with recorded() as found:
        backend.run(packed, call, scratch, torch.zeros(tokens, H, dtype=torch.bfloat16))
    return found


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
@pytest.mark.parametrize("tokens", [4, 400])
def test_every_stage_compiles_for_hopper(variant, tokens):
    """Each launch of each mode compiles, and spills nothing to local memory worth speaking of."""
    found = launches(tokens, **VARIANTS[variant])
    assert [launch.kernel.__name__ for launch in found][-1] == "_combine"
    for launch in found:
        compiled = launch.compile(90)
        assert compiled.metadata.shared <= 227 * 1024, launch.kernel.__name__


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gemm_uses_tensor_cores_everywhere(arch, tmp_path):
    """On each architecture both products are done by tensor cores: wgmma on Hopper, mma elsewhere."""
    gemms = [launch for launch in launches(4, **VARIANTS["w4a16"]) if launch.kernel.__name__ == "_grouped_gemm"]
    assert len(gemms) == 2
    for gemm in gemms:
        ops = sass(gemm.compile(arch).asm["cubin"], tmp_path)
        wanted = {"HGMMA"} if arch == 90 else {"HMMA", "UTCHMMA", "TCGEN05", "HGMMA"}
        assert any(ops[name] for name in wanted), dict(ops)


@pytest.mark.parametrize("tiling", range(len(TILINGS)))
def test_no_tiling_spills_on_hopper(tiling, tmp_path):
    """Accumulators and decoded weights stay in registers: no local-memory traffic in any line of the table."""
    mean = TILINGS[tiling].rows_per_expert
    tokens = int(mean * E / K) if mean < 1e6 else 1024
    for launch in launches(tokens, **VARIANTS["w4a16"]):
        if launch.kernel.__name__ == "_grouped_gemm":
            assert launch.arguments["BM"] == TILINGS[tiling].gemm1[0]
            ops = sass(launch.compile(90).asm["cubin"], tmp_path)
            assert ops["HGMMA"] > 0
            assert ops["LDL"] == ops["STL"] == 0, dict(ops)
