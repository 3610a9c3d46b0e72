"""What is taken over, what is left to vLLM, and how the plug-in comes and goes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_cases import inputs
from oracle import random_weights
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config

from dsv4 import ConfigError, StateError
from dsv4.integrations import vllm as plugin
from dsv4.integrations.vllm import gate, moe_layers
from dsv4.integrations.vllm.layer import Dsv4RoutedExperts
from dsv4.integrations.vllm.methods import METHODS
from dsv4.integrations.vllm.takeover import take_over, why_not
from vllm_plugin import layers
from vllm_plugin.layers import NAME, Ranks

E, H, INTER, K = 4, 64, 32, 2
SHAPE: dict[str, Any] = {"experts": E, "hidden": H, "inter": INTER, "top_k": K}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture):
    """What goes to vLLM's logger, which hands nothing on to the root."""
    logger = logging.getLogger("vllm.dsv4")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, logger="vllm.dsv4"):
        yield caplog
    logger.removeHandler(caplog.handler)


# Which layers.


def test_a_layer_that_is_taken_over(layout, device, tmp_path, log):
    """Both layouts are, and the log says the layer, the mode and the backend."""
    layer = layers.build(layers.quantization(layout), **SHAPE, device=device)
    assert type(layer) is Dsv4RoutedExperts
    assert type(layer.quant_method) in METHODS.values()
    scales = torch.full((E,), 0.01)
    w = random_weights(E, H, INTER, seed=1)
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", layout, w, scales, scales))
    backend = moe_layers(layer)[""].backend_name
    assert f"dsv4: {NAME}: 4 experts, W4A4 with static scales, backend {backend}" in log.text


def test_a_backend_of_vllms_that_was_asked_for(layout, device, log):
    """``moe_backend`` other than auto is vLLM's layer, untouched, with the reason."""
    layer = layers.build(layers.quantization(layout), **SHAPE, device=device, moe_backend="marlin")
    assert type(layer.quant_method) in METHODS
    assert f"dsv4: {NAME}: left to vLLM: the MoE backend 'marlin' was asked for" in log.text


@pytest.mark.parametrize("method", [UnquantizedFusedMoEMethod, type("Theirs", (next(iter(METHODS)),), {})])
def test_methods_that_are_not_vllms_nvfp4(method, device, log):
    """Others than NVFP4, and what a model made of vLLM's NVFP4 method, are none of the plug-in's business; it says so
    only to those who debug."""
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device)
    theirs = method.__new__(method)
    assert take_over(layer, NAME, theirs) is theirs
    ours = [record for record in log.records if record.name == "vllm.dsv4"]
    assert {record.levelname for record in ours} == {"DEBUG"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": MoEActivation.GELU}, "activation gelu"),
        ({"swiglu_alpha": 1.702}, "alpha 1.702"),
        ({"swiglu_beta": 1.0}, "beta 1.0"),
        ({"moe_config.has_bias": True}, "biases"),
        ({"moe_config.is_lora_enabled": True}, "LoRA"),
        ({"moe_config.in_dtype": torch.float16}, "float16"),
        ({"moe_config.hidden_dim": 72}, "72 is no multiple of 16"),
        ({"all2all": "deepep_low_latency"}, "deepep_low_latency"),
        ({"shared": 1}, "shared experts fused"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_left_to_vllm(change, reason, device):
    """Everything that the layer does not compute is declined by name; without the change the layer would be taken."""
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device, ranks=Ranks(ep=(2, 0)))
    assert why_not(layer) is None
    facts = {name: getattr(layer, name) for name in ("activation", "swiglu_alpha", "swiglu_beta", "moe_config")}
    manager = SimpleNamespace(num_fused_shared_experts=change.get("shared", 0))
    changed = SimpleNamespace(**facts, expert_map_manager=manager)
    for name, value in change.items():
        if name == "all2all":
            parallel = Ranks(ep=(2, 0)).parallel(value, dp=2)
            changed.moe_config = dataclasses.replace(layer.moe_config, moe_parallel_config=parallel)
        elif name.startswith("moe_config."):
            config = SimpleNamespace(
                **{f.name: getattr(layer.moe_config, f.name) for f in dataclasses.fields(layer.moe_config)}
            )
            setattr(config, name.removeprefix("moe_config."), value)
            changed.moe_config = config
        else:
            setattr(changed, name, value)
    found = why_not(changed)
    assert found is not None
    assert reason in found


def test_a_deepseek_v4_checkpoint(device):
    """What V4's NVFP4 releases say in config.json (FP8, with ``moe_quant_algo``) comes to the plug-in."""
    config = layers.vllm_config(device.type, 1024)
    hf = SimpleNamespace(expert_dtype="fp4", quantization_config={"moe_quant_algo": "NVFP4"})
    quant_config = DeepseekV4FP8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )
    config.model_config = SimpleNamespace(hf_config=hf, dtype=torch.bfloat16)
    layer = layers.build(quant_config, **SHAPE, device=device, config=config, limit=10.0)
    assert type(layer.quant_method) in METHODS.values()
    assert layer.quant_method.plan.swiglu_limit == 10.0


def test_an_interface_that_changed_under_a_layer(device, log, monkeypatch):
    """Something that is no longer there when a layer is built leaves the layer to vLLM, with a warning."""
    monkeypatch.setattr("dsv4.integrations.vllm.takeover.MoEActivation", SimpleNamespace())
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device)
    assert type(layer.quant_method) in METHODS
    assert "left to vLLM: AttributeError" in log.text


def test_a_wish_that_there_is_not(device, monkeypatch):
    """A value of DSV4_VLLM_ACTIVATIONS that means nothing is an error that says what does."""
    monkeypatch.setenv("DSV4_VLLM_ACTIVATIONS", "fp8")
    with pytest.raises(ConfigError, match="DSV4_VLLM_ACTIVATIONS=fp8: expected one of static, token, bf16"):
        layers.build(layers.quantization("modelopt"), **SHAPE, device=device)


def test_dummy_weights(layout, device):
    """``--load-format dummy`` draws scales at random, negative ones too: they are replaced, and the layer runs."""
    config = layers.vllm_config(device.type, 2048)
    config.load_config.load_format = "dummy"
    layer = layers.build(layers.quantization(layout), **SHAPE, device=device, config=config)
    for parameter in layer.parameters():
        if parameter.dtype == torch.uint8:
            parameter.data.random_(0, 256)
        else:
            parameter.data.view(torch.uint8).fill_(0xBB)  # negative, in every format
    layer.quant_method.process_weights_after_loading(layer)
    batch = [t.to(device) for t in inputs(5, H, K, E)]
    out = layers.run(layer, *batch)
    assert out.isfinite().all()
    assert out.abs().sum() > 0


def test_batch_invariance_is_passed_on(device, tmp_path, monkeypatch):
    """vLLM's VLLM_BATCH_INVARIANT is the layer's setting: a token's bits do not depend on its batch."""
    monkeypatch.setattr("dsv4.integrations.vllm.takeover.envs", SimpleNamespace(VLLM_BATCH_INVARIANT=True))
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device)
    w = random_weights(E, H, INTER, seed=1)
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", "modelopt", w))
    x, weights, ids = (t.to(device) for t in inputs(40, H, K, E))
    alone = layers.run(layer, x[7:8], weights[7:8], ids[7:8])
    assert torch.equal(layers.run(layer, x, weights, ids)[7:8], alone)
    assert moe_layers(layer)[""].config.batch_invariant


def test_ranks_that_change(device, tmp_path):
    """Elastic expert parallelism, which gives a rank other experts, is refused in words once experts are packed."""
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device, ranks=Ranks(ep=(2, 0)))
    w = random_weights(E, H, INTER, seed=1)
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", "modelopt", w))
    layer.update_expert_map()  # the same ranks
    layer.moe_config.moe_parallel_config = Ranks(ep=(2, 1)).parallel()
    with pytest.raises(StateError, match=f"{NAME}: the experts of this rank changed"):
        layer.update_expert_map()


# How the plug-in comes and goes.

_PROBE = """
import json, logging
lines = []
class Keep(logging.Handler):
    def emit(self, record): lines.append(record.getMessage())
import vllm.plugins
logging.getLogger("vllm.dsv4").addHandler(Keep())
{before}
vllm.plugins.load_general_plugins()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
from vllm.model_executor.custom_op import op_registry_oot
found = op_registry_oot.get("RoutedExperts")
print("RESULT", json.dumps([found and found.__module__, lines]))
"""

_CHANGED = """
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
RoutedExperts._get_quant_method = lambda self, layer: None
"""
_MISSING = "import vllm.model_executor.layers.fused_moe.all2all_utils as module; del module.maybe_make_prepare_finalize"
_ANOTHER = """
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
@RoutedExperts.register_oot
class Another(RoutedExperts): pass
"""


def probe(before: str = "", **environment: str) -> tuple[str | None, str]:
    """The class that vLLM would build and what was logged, in a new process that loads plug-ins twice."""
    run = subprocess.run(
        [sys.executable, "-c", _PROBE.format(before=before)], env={**os.environ, **environment}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    module, lines = json.loads(line.removeprefix("RESULT "))
    return module, "\n".join(lines)


def test_loading_by_vllm():
    """Installed is on: vLLM finds the entry point, may load it twice, and builds our class; nothing is said."""
    assert probe() == (Dsv4RoutedExperts.__module__, "")


@pytest.mark.parametrize("environment", [{"DSV4_VLLM": "0"}, {"VLLM_PLUGINS": "another"}])
def test_switching_off(environment):
    """DSV4_VLLM=0, or vLLM's own list of plug-ins, leaves vLLM as it is."""
    assert probe(**environment)[0] is None


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (_CHANGED, "does not take prefix, quant_config, moe_config"),
        (_MISSING, "ImportError"),
        (
            "import dsv4.integrations.vllm as p; p.version_problem = lambda: 'vLLM 9.9 was never tested'",
            "9.9 was never",
        ),
    ],
    ids=["another signature", "a name that is gone", "another version"],
)
def test_stepping_aside(before, reason):
    """A vLLM that is not the one we know is left as it is: one warning for each load, no exception."""
    module, log = probe(before)
    assert module is None
    assert log.count("NVFP4 experts are left to vLLM") == 2
    assert reason in log


def test_another_plugin_was_first():
    """A class that another plug-in put there stays."""
    module, log = probe(_ANOTHER)
    assert module == "__main__"
    assert "was replaced by another plug-in already" in log


def test_the_installed_release_is_a_known_one():
    """The release that these tests run with is one that the plug-in serves, with the interface that it expects."""
    assert gate.version_problem() is None
    assert gate.interface_problem() is None
    assert op_registry_oot[RoutedExperts.__name__] is Dsv4RoutedExperts
    plugin.register()
    assert op_registry_oot[RoutedExperts.__name__] is Dsv4RoutedExperts
