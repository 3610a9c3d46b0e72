"""What users of NVFP4 experts in vLLM complain of, one test each."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import BAR, inputs
from oracle import OracleWeights, moe_layer, nearest_reference, random_weights, relative_l2

from dsv4 import ConfigError, InputError
from dsv4.backends.base import Verdict
from dsv4.integrations.vllm import moe_layers, takeover
from dsv4.integrations.vllm.methods import METHODS
from vllm_plugin import layers
from vllm_plugin.layers import NAME, Ranks

E, H, INTER, K = 4, 64, 32, 2
SHAPE: dict[str, Any] = {"experts": E, "hidden": H, "inter": INTER, "top_k": K}
ONES = torch.ones(E)
STATIC: dict[str, Any] = {
    "activation_format": "nvfp4", "activation_scale": "static", "l1_scale_policy": "per_expert"
}  # fmt: skip
W4A16: dict[str, Any] = {"activation_format": "bf16", "activation_scale": "token"}


def loaded(
    tmp_path, layout: str, w: OracleWeights, device: torch.device, *, l1=None, l2=None, leave_out=(), **settings
):
    layer = layers.build(layers.quantization(layout), **SHAPE, device=device, **settings)
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", layout, w, l1, l2, leave_out))
    return layer


def result(layer, batch) -> torch.Tensor:
    device = layer.w13_weight.device
    return layers.run(layer, *(t.to(device) for t in batch)).float().cpu()


def test_gate_and_up_with_different_scales(layout, device, tmp_path):
    """10x apart, as in a real checkpoint, both are used; taking gate's for both is far off."""
    w = random_weights(E, H, INTER, seed=1, split_gate_up=True)
    w.l1_gs[:, 1] = w.l1_gs[:, 0] * 10
    batch = inputs(19, H, K, E)
    got = result(loaded(tmp_path, layout, w, device), batch)
    assert relative_l2(got, moe_layer(*batch, w, **W4A16)) <= BAR
    collapsed = OracleWeights(w.l1_fp4, w.l1_sf, w.l1_gs[:, :1].expand(E, 2), w.l2_fp4, w.l2_sf, w.l2_gs)
    assert relative_l2(got, moe_layer(*batch, collapsed, **W4A16)) > 0.5


@pytest.mark.parametrize("what", ["all missing", "one missing", "zero"])
def test_missing_input_scales(layout, what, device, tmp_path, caplog):
    """An input scale that is not in the checkpoint, or is zero, means W4A16 for the layer, and a warning."""
    w, batch = random_weights(E, H, INTER, seed=2), inputs(19, H, K, E)
    l1, l2 = 30 * ONES / 2688, 2 * ONES / 2688
    leave_out: tuple[str, ...] = ()
    if what == "zero":
        l1 = l1 * (torch.arange(E) != 1)
    else:
        suffix = layers.SUFFIXES[layout][3]
        leave_out = (suffix,) if what == "all missing" else (f"{NAME}.2.up_proj.{suffix}",)
    with _hearing(caplog):
        got = result(loaded(tmp_path, layout, w, device, l1=l1, l2=l2, leave_out=leave_out), batch)
    assert relative_l2(got, moe_layer(*batch, w, **W4A16)) <= BAR
    number = "4 of 4" if what == "all missing" else "1 of 4"
    assert f"{NAME}: the checkpoint has no usable" in caplog.text
    assert number in caplog.text
    assert "W4A16" in caplog.text


@pytest.mark.parametrize("index", [1, 2])
def test_missing_weight_scales(layout, index, device, tmp_path):
    """A block or global scale of a weight that is not in the checkpoint is an error with the layer's name."""
    suffix = layers.SUFFIXES[layout][index]
    with pytest.raises(InputError, match=f"{NAME}: "):
        loaded(tmp_path, layout, random_weights(E, H, INTER, seed=2), device, leave_out=(f".3.down_proj.{suffix}",))


def test_swiglu_limit(layout, device, tmp_path):
    """The clamp is applied, whichever of vLLM's kernels would have been chosen."""
    w, batch = random_weights(E, H, INTER, seed=3), inputs(19, H, K, E)
    got = result(loaded(tmp_path, layout, w, device, limit=0.5), batch)
    assert relative_l2(got, moe_layer(*batch, w, swiglu_limit=0.5, **W4A16)) <= BAR
    assert relative_l2(got, moe_layer(*batch, w, **W4A16)) > 0.1


def test_a_gpu_whose_kernels_are_wrong(device, tmp_path, monkeypatch, caplog):
    """Garbage on some GPU: kernels are compared with the reference on it before they are given a layer. What fails is
    left to vLLM, with the reason."""
    layer = layers.build(layers.quantization("modelopt"), **SHAPE, device=device)
    monkeypatch.setattr(takeover, "choose", _reference_only)
    monkeypatch.setattr(takeover, "explain_all", lambda *_: {"portable": Verdict(False, "self-check failed: NaN")})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layer.moe_config.device = torch.device("cuda")
    theirs = next(iter(METHODS))
    method = theirs.__new__(theirs)
    with _hearing(caplog), layers.set_current_vllm_config(layers.vllm_config(device.type)):
        assert takeover.take_over(layer, NAME, method) is method
    assert "left to vLLM: no kernels for this GPU: portable: self-check failed: NaN" in caplog.text


def _reference_only(*args: Any, **kwargs: Any) -> Any:
    from dsv4.backends.reference import ReferenceBackend

    return ReferenceBackend


def test_tensor_parallelism_that_splits_a_block(layout, device):
    """48 over 2 ranks is 24, and 16 values share a scale: refused before anything is loaded, with what to do."""
    with pytest.raises(ConfigError, match=r"48 over 2 tensor-parallel ranks is 24.*--enable-expert-parallel"):
        layers.build(layers.quantization(layout), **{**SHAPE, "inter": 48}, device=device, ranks=Ranks(tp=(2, 0)))


def test_memory_of_weight_preparation(layout, device, tmp_path):
    """After packing, vLLM's own parameters are gone, and the layer holds the packed bytes once."""
    w = random_weights(E, H, INTER, seed=4)
    layer = layers.build(layers.quantization(layout), **SHAPE, device=device)
    before = [weakref.ref(p.untyped_storage()) for p in layer.parameters()]
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", layout, w, ONES / 100, ONES / 1000))
    gc.collect()
    assert not [ref for ref in before if ref() is not None]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
    moe = moe_layers(layer)[""]
    assert sum(storages.values()) == moe.weight_nbytes + 2 * E * 4  # and the input scales


def test_small_global_scales(layout, device, tmp_path):
    """Block scales over all of e4m3 and a global scale of 1e-6: nothing is folded into e4m3, which would lose them."""
    w = random_weights(E, H, INTER, seed=5)
    w.l1_gs.mul_(1e-6)
    w.l2_gs.mul_(1e6)
    w.l1_sf.view(torch.uint8)[:, ::3] = 1  # the smallest subnormal
    w.l1_sf.view(torch.uint8)[:, 1::3] = 0x7E  # 448
    x, weights, ids = inputs(19, H, K, E)
    batch = ((x.float() * 1e4).bfloat16(), weights, ids)
    got = result(loaded(tmp_path, layout, w, device), batch)
    assert relative_l2(got, moe_layer(*batch, w, **W4A16)) <= BAR


def test_input_scales_of_each_expert(layout, device, tmp_path):
    """100x apart, each expert's is used in both GEMMs; the maximum of all, for all, is far off."""
    w, batch = random_weights(E, H, INTER, seed=6), inputs(64, H, K, E)
    l1 = layers.amax_scales(np.array([20.0, 4000.0, 20.0, 4000.0]))
    l2 = layers.amax_scales(np.array([1.0, 300.0, 2.0, 300.0]))
    got = result(loaded(tmp_path, layout, w, device, l1=l1, l2=l2), batch)
    scales = {"l1_input_scale": l1, "l2_input_scale": l2}
    assert relative_l2(got, nearest_reference(got, *batch, w, **STATIC, **scales)) <= BAR
    collapsed = {name: scale.amax() for name, scale in scales.items()}
    assert relative_l2(got, moe_layer(*batch, w, **STATIC, **collapsed)) > 0.1


@pytest.mark.parametrize("scales", [True, False])
def test_stale_padding(layout, scales, device, tmp_path):
    """Padding rows of NaN, and scratch full of NaN, change no bit of the other rows."""
    given = {"l1": 20 * ONES / 2688, "l2": ONES / 2688} if scales else {}
    layer = loaded(tmp_path, layout, random_weights(E, H, INTER, seed=7), device, **given)
    x, w, ids = inputs(24, H, K, E)
    want = result(layer, (x[:16], w[:16], ids[:16]))
    x[16:] = torch.nan
    moe = moe_layers(layer)[""]
    moe._workspace.reserve(0).fill_(0xFF)  # NaN in every format
    got = result(layer, (x, w, ids))
    assert torch.equal(got[:16], want)
    assert got[16:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scales", [True, False])
def test_nothing_is_compiled_or_tuned_inside_a_capture(layout, scales, tmp_path, monkeypatch):
    """Straight after loading, graphs are captured at vLLM's sizes: no kernel is compiled, nothing waits for the host,
    and replays compute other inputs of that size."""
    from triton import knobs

    device = torch.device("cuda")
    w = random_weights(E, H, INTER, seed=8)
    # Compressed-tensors keeps reciprocals: of these scales they are exact, or as good as.
    l1, l2 = (ONES / 128, ONES / 2688) if scales else (None, None)
    layer = loaded(tmp_path, layout, w, device, l1=l1, l2=l2)
    sizes = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: compiled.append(repr))
    graphs = {}
    for size in reversed(sizes):
        buffers = [t.to(device) for t in inputs(size, H, K, E, seed=size)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers.run(layer, *buffers)
        graphs[size] = graph, buffers, out
    assert not compiled
    settings = {**STATIC, "l1_input_scale": l1, "l2_input_scale": l2} if scales else W4A16
    for size in sizes:
        graph, buffers, out = graphs[size]
        batch = inputs(size, H, K, E, seed=100 + size)
        for buffer, new in zip(buffers, batch, strict=True):
            buffer.copy_(new)
        graph.replay()
        got = out.float().cpu()
        assert relative_l2(got, nearest_reference(got, *batch, w, **settings)) <= BAR


def _hearing(caplog: pytest.LogCaptureFixture) -> Any:
    """Catch what goes to vLLM's logger, which hands nothing on to the root."""
    logger = logging.getLogger("vllm.dsv4")
    logger.addHandler(caplog.handler)
    return caplog.at_level(logging.INFO, logger="vllm.dsv4")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    yield
    logging.getLogger("vllm.dsv4").removeHandler(caplog.handler)
