"""The peers that third-party scripts drive, with stand-ins for those scripts: what they are given, and when."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from dsv4.cli._layer import random_call, random_weights
from dsv4.cli._shapes import LayerShape

CPU = torch.device("cpu")
SHAPE = LayerShape(8, 128, 64, 3, 1.0)

COMMON = """
import torch

LUT = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])


def decode(weight, scale, gs):
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(-2).long()
    return LUT[codes] * scale.float().repeat_interleave(16, -1) * gs


def forward(x, weights, ids, w1, w2, limit):
    assert ids.dtype == torch.int32
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            gate, up = (w1[ids[t, k]] @ x[t].float()).chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y = (torch.nn.functional.silu(gate) * up).bfloat16().float()
            out[t] += weights[t, k] * (w2[ids[t, k]] @ y)
    return out.bfloat16()
"""

HUMMING = (
    COMMON
    + """
LIMIT, SWIGLU = 10.0, "10.0f"


def import_humming():
    pass


class Glue:
    def __init__(self, folder):
        self.align_src, self.combine_src = "vLLM _moe_C", "stand-in"


def to_humming(raw, num_experts, n, k, stacks):
    assert raw["weight"].shape == (num_experts, n, k // 2) and sum(stacks) == n
    assert raw["weight_scale_2"].shape == (num_experts, len(stacks))
    return "config", decode(raw["weight"], raw["weight_scale"], raw["weight_scale_2"][:, :1, None])


class Layer:
    def set_mode(self, mode):
        self.mode = mode

    def precompile(self, tokens):
        self.__dict__.setdefault("compiled", []).append((self.mode, tuple(tokens)))

    def prepare(self, tokens):
        self.tokens, self.prepared = tokens, self.mode

    def forward(self, x, weights, ids):
        assert self.mode == self.prepared and len(x) == self.tokens
        return forward(x, weights, ids, self.w13, self.w2, LIMIT)
"""
)

VLLM = (
    COMMON
    + """
import os
from contextlib import contextmanager
from types import SimpleNamespace

import vllm_boot

ACTIVE = []
PLUGIN = "portable"
built = []


@contextmanager
def set_current_vllm_config(config):
    ACTIVE.append(config)
    yield
    ACTIVE.pop()


@contextmanager
def set_forward_context(attention, config, num_tokens):
    ACTIVE.append(num_tokens)
    yield
    ACTIVE.pop()


class VllmConfig:
    def __init__(self):
        self.scheduler_config = SimpleNamespace(max_num_batched_tokens=0)


def init_workspace_manager(device):
    ACTIVE.clear()


def make_layer(backend, E, L, H, I, topk, limit, device):
    assert len(ACTIVE) == 1 and E == L
    layer = SimpleNamespace(
        w13_weight=torch.zeros(E, 2 * I, H // 2, dtype=torch.uint8),
        w2_weight=torch.zeros(E, H, I // 2, dtype=torch.uint8),
        w13_weight_scale=torch.zeros(E, 2 * I, H // 16).to(torch.float8_e4m3fn),
        w2_weight_scale=torch.zeros(E, H, I // 16).to(torch.float8_e4m3fn),
        w13_weight_scale_2=torch.zeros(E, 2), w2_weight_scale_2=torch.zeros(E),
        w13_input_scale=torch.zeros(E, 2), w2_input_scale=torch.zeros(E),
    )

    def process(same):
        layer.w1 = decode(layer.w13_weight, layer.w13_weight_scale, layer.w13_weight_scale_2[:, :1, None])
        layer.w2 = decode(layer.w2_weight, layer.w2_weight_scale, layer.w2_weight_scale_2[:, None, None])

    def forward_modular(x, weights, ids):
        assert len(ACTIVE) == 2 and ACTIVE[1] == len(x)
        return forward(x, weights, ids, layer.w1, layer.w2, limit)

    class Kernel:
        pass

    layer.parameters = lambda: (value for value in list(vars(layer).values()) if isinstance(value, torch.Tensor))
    layer.quant_method = SimpleNamespace(process_weights_after_loading=process, experts_cls=Kernel)
    if backend == "auto" and PLUGIN is not None:
        layer.quant_method.nvfp4_moe = SimpleNamespace(backend_name=PLUGIN)
    built.append((backend, os.environ.get("DSV4_VLLM_ACTIVATIONS")))
    layer.forward_modular = forward_modular
    return layer
"""
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stand-ins for the scripts, forgotten after the test."""
    (tmp_path / "humming_moe.py").write_text(HUMMING)
    (tmp_path / "bench_vllm_experts.py").write_text(VLLM)
    (tmp_path / "vllm_boot.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield tmp_path
    for name in ("humming_moe", "bench_vllm_experts", "vllm_boot"):
        sys.modules.pop(name, None)


def contenders_of(name: str, folder, shape: LayerShape = SHAPE):
    import peers
    from peers.base import Setup

    setup = Setup(shape, random_weights(shape, CPU), (5,), CPU, folder)
    found, skipped = peers.load([name], setup)
    assert not skipped
    calls = [random_call(shape, 5, "uniform", CPU, seed) for seed in range(2)]
    return setup, calls, found[name], found[name].contenders(calls)


def errors_of(setup, calls, contenders, activations=None) -> list[float]:
    from reference import reference, relative_error

    errors = []
    # Backwards: a contender must not depend on which of them ran last.
    for contender in reversed(contenders):
        for index, call in enumerate(calls):
            with contender.context():
                found = contender.run(index)[0]
            limit = setup.shape.swiglu_limit
            wanted = reference(setup.weights, call, torch.arange(5), limit, activations or contender.activations)
            errors.append(relative_error(found, wanted))
    return errors


@pytest.mark.parametrize("limit", [1.0, None])
def test_humming_is_given_our_weights(benchmarks, folder, limit):
    """Both modes compute the layer from the shared weights, for any shape and limit, each with its own buffers."""
    shape = LayerShape(8, 128, 64, 3, limit)
    setup, calls, peer, contenders = contenders_of("humming", folder, shape)
    assert [contender.name for contender in contenders] == ["humming-indexed", "humming-grouped"]
    assert all(error < 1e-2 for error in errors_of(setup, calls, contenders))
    assert peer._layer.compiled == [("indexed", (5,)), ("grouped", (5,))]
    swiglu = sys.modules["humming_moe"].SWIGLU
    assert ("fminf(g, 1.0f)" in swiglu) == (limit is not None)
    assert swiglu.count("{") == swiglu.count("}") == 1


@pytest.mark.parametrize("backend", ["marlin", "humming", "emulation"])
def test_vllm_is_given_our_weights(benchmarks, folder, backend):
    """A vLLM layer has the shared weights and runs in vLLM's contexts; only emulation is judged as quantizing."""
    from reference import BF16

    setup, calls, peer, (contender,) = contenders_of(f"vllm-{backend}", folder)
    assert contender.name == f"vllm-{backend}"
    assert all(error < 1e-2 for error in errors_of(setup, calls, [contender], BF16))
    assert contender.activations.quantized == (backend == "emulation")
    assert peer.facts["kernel"] == "Kernel"
    if backend == "emulation":
        assert torch.equal(peer._layer.w2_input_scale, contender.activations.l2)
        assert peer._layer.w13_input_scale.unique() == contender.activations.l1


@pytest.mark.parametrize(("mode", "activations"), [("w4a16", "bf16"), ("w4a4", "static")])
def test_our_plugin_is_a_contender_of_its_own(benchmarks, folder, monkeypatch, mode, activations):
    """vLLM's layer is built with the plug-in registered and the mode asked for, and is judged by what it computes."""
    import peers.vllm_layers

    calls_of_register = []
    monkeypatch.setattr(peers.vllm_layers, "register", lambda: calls_of_register.append(1))
    monkeypatch.delenv("DSV4_VLLM_ACTIVATIONS", raising=False)
    _, _, peer, (contender,) = contenders_of(f"vllm-dsv4-{mode}", folder)
    assert contender.name == f"vllm-dsv4-{mode}"
    assert contender.activations.quantized == (mode == "w4a4")
    assert peer.facts["kernel"] == "dsv4 portable"
    script = sys.modules["bench_vllm_experts"]
    assert script.built == [("auto", activations)]
    assert script.shared_config.scheduler_config.max_num_batched_tokens == 5
    assert calls_of_register
    assert "DSV4_VLLM_ACTIVATIONS" not in os.environ


def test_a_layer_that_the_plugin_left_to_vllm(benchmarks, folder, monkeypatch):
    """Then there is no time of ours: vLLM's own must not stand under our name."""
    import peers
    import peers.vllm_layers
    from peers.base import Setup
    from peers.scripts import load_script

    monkeypatch.setattr(peers.vllm_layers, "register", lambda: None)
    load_script(folder, "bench_vllm_experts").PLUGIN = None
    setup = Setup(SHAPE, random_weights(SHAPE, CPU), (5,), CPU, folder)
    found, skipped = peers.load(["vllm-dsv4-w4a16"], setup)
    assert not found
    assert skipped == {"vllm-dsv4-w4a16": "the plug-in left this layer to vLLM"}
