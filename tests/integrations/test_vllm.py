"""The half of the vLLM plug-in that needs no vLLM; the other half is in tests/vllm_plugin (``make test-vllm``)."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

from dsv4 import InputError
from dsv4.integrations import vllm as plugin
from dsv4.integrations.vllm.gate import missing_parameters, version_problem
from dsv4.integrations.vllm.parameters import (
    COMPRESSED_TENSORS,
    MODELOPT,
    ParameterNames,
    choose_mode,
    fill_dummy,
    poison,
    read,
    replace_packed,
)

E, H, INTER = 3, 32, 16
LAYOUTS = pytest.mark.parametrize("names", [MODELOPT, COMPRESSED_TENSORS], ids=["modelopt", "compressed-tensors"])


def vllm_layer(names: ParameterNames, value: float = 0.5) -> nn.Module:
    """A module with the parameters that vLLM creates; every fp32 scale is ``value``."""
    layer = nn.Module()
    sizes = (
        (names.codes, torch.uint8, [(E, 2 * INTER, H // 2), (E, H, INTER // 2)]),
        (names.block_scales, torch.float8_e4m3fn, [(E, 2 * INTER, H // 16), (E, H, INTER // 16)]),
        (names.global_scales, torch.float32, [(E, 2), (E,)]),
        (names.input_scales, torch.float32, [(E, 2), (E,)]),
    )
    for pair, dtype, shapes in sizes:
        for name, shape in zip(pair, shapes, strict=True):
            tensor = torch.full(shape, value) if dtype == torch.float32 else torch.ones(shape).to(dtype)
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return layer


# Whether to be there at all.


def test_the_entry_point():
    """vLLM finds the plug-in by installation: an entry point of its group, which resolves to ``register``."""
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "dsv4"]
    assert found.load() is plugin.register


@pytest.mark.parametrize("version", ["0.24.0", "0.24.3.dev1+g123", "0.33.0+cu130", "0.33.1rc1"])
def test_known_versions(version):
    """Every build of a minor version in the tested range is served."""
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.23.9", "0.34.0", "1.0.0", "0.3.3", "nightly"])
def test_unknown_versions(version):
    """Others are named, with the range that is known."""
    problem = version_problem(version)
    assert problem is not None
    assert version in problem
    assert "0.24 to 0.33" in problem


def test_stepping_aside(monkeypatch, caplog):
    """Whatever goes wrong while registering is a warning, never an exception in vLLM's process."""

    def broken() -> str:
        raise RuntimeError("surprise")

    monkeypatch.setattr(plugin, "version_problem", broken)
    monkeypatch.delenv("DSV4_VLLM", raising=False)
    plugin.register()
    monkeypatch.setattr(plugin, "version_problem", lambda: "vLLM 9.9 was never tested")
    plugin.register()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "dsv4: NVFP4 experts are left to vLLM: RuntimeError: surprise",
        "dsv4: NVFP4 experts are left to vLLM: vLLM 9.9 was never tested",
    ]


def test_the_switch(monkeypatch, caplog):
    """DSV4_VLLM=0: not even the version is asked for."""
    monkeypatch.setenv("DSV4_VLLM", "0")
    monkeypatch.setattr(plugin, "version_problem", lambda: pytest.fail("asked"))
    plugin.register()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_importing_takes_nothing_of_vllm():
    """The entry point's module imports nothing of vLLM, which would be imported in part when plug-ins are loaded."""
    code = "import sys, dsv4.integrations.vllm; print(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_signature_that_changed():
    """What a function no longer takes is named, with what it takes."""

    def function(layer: object, other: int = 0) -> None: ...

    assert missing_parameters(function, ("layer",)) is None
    assert missing_parameters(function, ("layer", "prefix")) == (
        f"{function.__qualname__} does not take prefix: found layer, other"
    )


# What vLLM has loaded.


@LAYOUTS
def test_reading(names):
    """Codes and block scales are vLLM's own memory; global scales and input scales come as multipliers."""
    layer = vllm_layer(names, value=0.25)
    weights = read(layer, names)
    want = 4.0 if names.divisors else 0.25
    assert weights.arguments["l1_fp4_stacked"].data_ptr() == getattr(layer, names.codes[0]).data_ptr()
    assert weights.arguments["l2_sf_stacked"].data_ptr() == getattr(layer, names.block_scales[1]).data_ptr()
    assert torch.equal(weights.arguments["l1_gs"], torch.full((E, 2), want))
    assert torch.equal(weights.arguments["l2_gs"], torch.full((E,), want))
    assert weights.l1_input_scale is not None
    assert weights.l2_input_scale is not None
    assert torch.equal(weights.l1_input_scale, torch.full((E,), want))
    assert torch.equal(weights.l2_input_scale, torch.full((E,), want))
    assert weights.problem is None


@LAYOUTS
def test_gate_and_up_share_the_larger_input_scale(names):
    """They read one activation, which is quantized once: the scale that covers both."""
    layer = vllm_layer(names)
    getattr(layer, names.input_scales[0]).data[:, 0] = 4.0
    getattr(layer, names.input_scales[0]).data[:, 1] = 2.0
    scale = read(layer, names).l1_input_scale
    assert scale is not None
    assert torch.equal(scale, torch.full((E,), 0.5 if names.divisors else 4.0))


@LAYOUTS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_input_scales_that_cannot_be_used(names, value):
    """One bad scale of one expert, and the layer has none, with a sentence that says where."""
    layer = vllm_layer(names)
    getattr(layer, names.input_scales[0]).data[2, 1] = value
    weights = read(layer, names)
    assert weights.l1_input_scale is None
    assert weights.l2_input_scale is None
    assert weights.problem == f"{names.input_scales[0]} of 1 of 3 local experts (first: 2)"


@LAYOUTS
def test_what_was_never_loaded_is_seen(names):
    """After :func:`poison` every scale is NaN: input scales are reported, a global scale raises."""
    layer = vllm_layer(names)
    poison(layer, names)
    for name in names.block_scales:
        assert getattr(layer, name).float().isnan().all()
    for name in names.global_scales:
        with pytest.raises(InputError, match=rf"{name}: found none \(or NaN\).*3 of 3 local experts"):
            read(layer, names)
        getattr(layer, name).data.fill_(1.0)
    problem = read(layer, names).problem
    assert problem is not None
    assert all(name in problem for name in names.input_scales)


@LAYOUTS
def test_dummy_scales(names):
    """Scales drawn at random are replaced by ones that any weights can have."""
    layer = vllm_layer(names, value=-1.0)
    fill_dummy(layer, names)
    weights = read(layer, names)
    assert weights.problem is None
    assert (weights.arguments["l1_gs"] > 0).all()
    assert (weights.arguments["l1_sf_stacked"].float() > 0).all()


# What a layer is computed in.


@pytest.mark.parametrize(
    ("l1", "move", "policy"),
    [([0.5, 0.5, 0.5], False, "max"), ([0.5, 0.5, 0.5], True, "per_expert"), ([0.5, 0.25, 0.5], False, "per_expert")],
)
def test_static_scales(l1, move, policy):
    """A token is quantized once only if all its experts, now and after the load balancer, have one scale."""
    layer = vllm_layer(MODELOPT)
    layer.get_parameter("w13_input_scale").data.copy_(torch.tensor(l1).unsqueeze(1).expand(E, 2))
    mode = choose_mode("static", read(layer, MODELOPT), experts_move=move)
    assert (mode.static, mode.l1_scale_policy, mode.reason) == (True, policy, None)


def test_missing_scales_mean_w4a16():
    """Without scales activations are not quantized, and the mode says why."""
    layer = vllm_layer(MODELOPT)
    poison(layer, MODELOPT)
    for name in MODELOPT.global_scales:
        layer.get_parameter(name).data.fill_(1.0)
    mode = choose_mode("static", read(layer, MODELOPT), experts_move=False)
    assert (str(mode), mode.static) == ("W4A16", False)
    assert mode.reason is not None
    assert "w13_input_scale of 3 of 3" in mode.reason


@pytest.mark.parametrize(("wanted", "words"), [("token", "W4A4 with token scales"), ("bf16", "W4A16")])
def test_other_wishes_need_no_scales(wanted, words):
    """The checkpoint's scales are not looked at where they are not asked for."""
    layer = vllm_layer(MODELOPT, value=0.5)
    layer.get_parameter("w2_input_scale").data.fill_(torch.nan)
    mode = choose_mode(wanted, read(layer, MODELOPT), experts_move=True)
    assert (str(mode), mode.static, mode.reason) == (words, False, None)


@LAYOUTS
def test_packed_experts_take_the_place_of_vllms_parameters(names):
    """Nothing of vLLM's stays; ours are there without a copy, by names that its load balancer does not leave out."""
    layer = vllm_layer(names)
    tensors = {
        "experts": torch.zeros(E, 100, dtype=torch.uint8),
        "l1_gs": torch.zeros(E, 2),
        "l2_gs": torch.zeros(E),
        "l1_input_scale": torch.zeros(E),
        "l2_input_scale": torch.zeros(E),
    }
    for _ in range(2):  # and again, when weights are loaded anew
        replace_packed(layer, names, tensors)
        found = dict(layer.named_parameters())
        assert {p.data_ptr() for p in found.values()} == {t.data_ptr() for t in tensors.values()}
        assert not {"w13_input_scale", "w2_input_scale"} & found.keys()
        assert all(len(p) == E and p.is_contiguous() for p in found.values())
        assert layer.get_parameter("w2_weight") is layer.get_parameter("w13_weight")
