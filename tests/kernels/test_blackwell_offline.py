"""The Blackwell backend on paper: its weights, what a layer launches and with which operands; its stages compiled."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dsv4.backends import proof
from dsv4.backends.base import Call, InputScales, Packed
from dsv4.backends.blackwell import MEANS, BlackwellBackend, kernels, layer_kernels
from dsv4.cli._shapes import SHAPES
from dsv4.config import MoEConfig, capacity
from dsv4.ops.layouts import Swizzle32x4x4, interleave_l1_weights
from dsv4.weights import MoEWeights
from kernels.offline import Launch, recorded, sass
from kernels.test_blackwell_launch import Driver, installed

CPU = torch.device("cpu")
MODES: dict[str, dict[str, Any]] = {
    "static": {"swiglu_limit": 10.0},
    "token": {"activation_scale": "token"},
    "tensor": {"activation_scale": "tensor"},
    "per-expert": {"l1_scale_policy": "per_expert", "route_weight": "before_down"},
    "input": {"activation_scale": "token", "route_weight": "input", "top_k": 1},
    "invariant": {"activation_scale": "token", "batch_invariant": True},
}


@pytest.fixture(autouse=True)
def a_gpu_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=148, major=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def launches(tokens: int, experts: int, h: int, i: int, **settings: Any) -> tuple[Driver, list[Launch], Packed]:
    """What one call launches: GEMMs, and kernels of Triton."""
    top_k = settings.pop("top_k", 2)
    config = MoEConfig(experts, h, i, max_num_tokens=max(tokens, 16), top_k=top_k, **settings)
    backend = BlackwellBackend(config, CPU)
    scratch = torch.zeros(BlackwellBackend.workspace_bytes(config, CPU) + 256, dtype=torch.uint8)
    scratch = scratch[-scratch.data_ptr() % 256 :]
    row = backend._down.end
    memory = torch.zeros(experts * row + 256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 256 :][: experts * row]
    packed = Packed(memory.view(experts, row), torch.ones(experts, 2), torch.ones(experts))
    fixed = config.activation_scale == "static"
    call = Call(
        torch.zeros(tokens, h, dtype=torch.bfloat16),
        torch.zeros(tokens, top_k),
        torch.zeros(tokens, top_k, dtype=torch.int64),
        input_scales=InputScales.updated(None, torch.ones(experts), torch.ones(experts)) if fixed else None,
    )
    driver = Driver()
    with recorded() as stages, installed(driver):
        backend.run(packed, call, scratch, torch.zeros(tokens, h, dtype=torch.bfloat16))
    return driver, stages, packed


def test_weights_are_permuted_and_nothing_else():
    """Codes are the checkpoint's rows, gate and up by fours, as the public interleaving has them; scales follow and are
    swizzled; unpacking gives every byte back. Sizes are no multiples of the scales' tiles."""
    e, h, i = 3, 96, 160
    backend = BlackwellBackend(MoEConfig(e, h, i), CPU)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 126, shape, dtype=torch.uint8, generator=generator)

    e4m3 = torch.float8_e4m3fn
    weights = MoEWeights(
        draw(e, 2 * i, h // 2), draw(e, 2 * i, h // 16).view(e4m3), torch.rand(e, 2),
        draw(e, h, i // 2), draw(e, h, i // 16).view(e4m3), torch.rand(e),
    )  # fmt: skip
    packed = backend.pack(weights)
    codes = backend._up.codes(packed.experts)
    assert torch.equal(codes, interleave_l1_weights(weights.l1_fp4.transpose(1, 2)).transpose(1, 2))
    scales = interleave_l1_weights(weights.l1_sf.view(torch.uint8).transpose(1, 2)).transpose(1, 2)
    for expert in range(e):
        want = Swizzle32x4x4(2 * i, h // 16).swizzle(scales[expert])
        assert torch.equal(backend._up.scales(packed.experts)[expert], want)
    assert torch.equal(backend._down.codes(packed.experts), weights.l2_fp4)
    restored = backend.unpack(packed)
    for field in fields(MoEWeights):
        got, want = getattr(restored, field.name), getattr(weights, field.name)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mean", MEANS)
def test_two_products_hand_over_codes(mean, mode):
    """Every line, every mode: operands fit (or the launch refuses), both products have the same ends, GEMM 2 multiplies
    what GEMM 1 or the stage between them wrote, and each row has the scales that its mode gives it."""
    settings = dict(MODES[mode])
    top_k, experts, h, i = settings.get("top_k", 2), 4, 256, 384
    tokens = int(min(mean, 300) * experts // top_k)
    driver, stages, packed = launches(tokens, experts, h, i, **settings)
    first, second = (launched.arguments for launched in driver.launches)
    slots = tokens * top_k
    fixed = settings.get("activation_scale", "static") == "static"
    names = [stage.kernel.__name__ for stage in stages]
    assert first[4] == second[4]  # ends
    assert (first[13], first[14], first[15]) == (experts, 2 * i, h)
    assert (second[13], second[14], second[15]) == (experts, h, i)
    assert first[16] == 2  # gate and up
    assert second[16] == 1
    a, b, _, _, act, down, act_scales, _ = driver.maps
    assert a.sizes[:2] == [h // 2, slots]
    assert act.sizes[:2] == [i // 2, slots]
    assert b.address == packed.experts.data_ptr()
    assert down.strides[1] == b.strides[1] == packed.experts.stride(0)
    if fixed:
        assert (first[10], first[11]) == (act.address, act_scales.address)
        assert names.count("_quantize_rows") == 1  # the tokens
    else:
        staged = stages[-2].arguments
        assert names[-2] == "_quantize_rows"
        assert staged["x"].data_ptr() == first[10]
        assert (staged["codes"].data_ptr(), staged["sf"].data_ptr()) == (act.address, act_scales.address)
        assert staged["row_gs"].data_ptr() == second[7]
    assert names[-1] == "_combine"
    assert ("_gather_rows" in names) == (mode != "per-expert")
    assert first[17] == pytest.approx(settings.get("swiglu_limit", 0.0))


def test_the_proof_reaches_every_kernel():
    """The calls of the self-check take each line once at least, pairs of CTAs too: no kernel is used unproven."""
    means = [tokens * proof._TOP_K / proof._EXPERTS for tokens in proof._TOKENS]
    lines = {next(m for m in MEANS if mean <= m) for mean in means}
    assert lines == set(MEANS)
    assert {c.m for c in kernels(MoEConfig(64, 256, 128, activation_scale="token"))} == {128, 256}


def test_scratch_is_sized_from_the_bound():
    """Scales of both operands have the rows that any routing can need, each expert's padded to a tile."""
    config = MoEConfig(8, 256, 128, max_num_tokens=100, top_k=3)
    views = BlackwellBackend(config, CPU)._plan.buffers
    rows = capacity(300, 8, 128)
    assert views["x_sf"][0] == (rows * 16,)
    assert views["act_sf"][0] == (rows * 8,)
    assert views["x_rows"][0] == (300, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation_format": "bf16"}, "bf16"),
        ({"fused_swiglu": False}, "set_fused_swiglu"),
        ({"hidden_size": 272}, "multiples of 32"),
        ({"intermediate_size": 144}, "multiples of 32"),
        ({"num_experts": 513}, "512 experts"),
    ],
)
def test_what_it_cannot_do_it_declines(change, reason, monkeypatch):
    """By name, on the chip itself; on any other GPU, and on none, it declines everything."""
    settings = {"num_experts": 8, "hidden_size": 256, "intermediate_size": 128} | change
    config = MoEConfig(**settings)
    cuda = torch.device("cuda", 0)
    assert "found cpu" in BlackwellBackend.explain(config, CPU).reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((9, 0), (10, 1), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        verdict = BlackwellBackend.explain(config, cuda)
        assert not verdict.usable
        assert f"{capability[0]}.{capability[1]}" in verdict.reason
    for capability in ((10, 0), (10, 3)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        verdict = BlackwellBackend.explain(config, cuda)
        assert not verdict.usable
        assert reason in verdict.reason
        assert BlackwellBackend.explain(MoEConfig(8, 256, 128), cuda).usable


def test_calls_of_every_size_have_one_tiling_where_bits_are_promised():
    """With batch_invariant=True K is added up in one order, whatever the batch."""
    config = MoEConfig(8, 256, 128, activation_scale="token", batch_invariant=True)
    assert len({layer_kernels(config, mean, False) for mean in MEANS}) == 1


@pytest.mark.parametrize(
    ("mode", "name"),
    [("per-expert", "v4-flash"), *(pytest.param(m, "v4-pro", marks=pytest.mark.kernels) for m in MODES)],
)
def test_stages_compile_for_blackwell(mode, name, tmp_path):
    """The stages of the two models compile and keep nothing in local memory."""
    shape = SHAPES[name]
    _, stages, _ = launches(64, 8, shape.hidden_size, shape.intermediate_size, **MODES[mode])
    for stage in stages:
        compiled = stage.compile(100)
        assert not {"LDL", "STL"} & set(sass(compiled.asm["cubin"], tmp_path)), stage.kernel.__name__
