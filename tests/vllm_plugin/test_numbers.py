"""Real vLLM layers, filled by vLLM's loaders from a file, give the oracle's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import BAR, inputs
from oracle import OracleWeights, moe_layer, nearest_reference, random_weights, relative_l2

from dsv4.backends import BACKENDS, ReferenceBackend, explain_all
from dsv4.config import MoEConfig
from dsv4.integrations.vllm import moe_layers
from vllm_plugin import layers
from vllm_plugin.layers import Ranks

E, H, INTER, K, LIMIT = 6, 64, 96, 2, 0.75
SHAPE: dict[str, Any] = {"experts": E, "hidden": H, "inter": INTER, "top_k": K}

RANKS = {
    "one rank": [Ranks()],
    "ep=2": [Ranks(ep=(2, rank)) for rank in range(2)],
    "tp=2": [Ranks(tp=(2, rank)) for rank in range(2)],  # 48 of 96: a multiple of 16, not of 32
}


@dataclass(frozen=True)
class Case:
    """A layer's weights and scales, over all ranks."""

    weights: OracleWeights
    l1_input: torch.Tensor
    l2_input: torch.Tensor

    def part(self, ranks: Ranks) -> tuple[OracleWeights, list[int]]:
        """What a rank has, and its experts' global ids."""
        size, rank = ranks.ep
        ids = list(range(rank * E // size, (rank + 1) * E // size))
        return layers.shard(layers.local(self.weights, ids), ranks.tp), ids


def case(seed: int = 3, hidden: int = H, inter: int = INTER) -> Case:
    """Gate and up with scales of their own, and input scales that differ by expert."""
    rng = np.random.default_rng(seed)
    return Case(
        random_weights(E, hidden, inter, seed=seed, split_gate_up=True),
        layers.amax_scales(rng.uniform(6, 30, E)),
        layers.amax_scales(rng.uniform(0.5, 2, E)),
    )


def expected(got: torch.Tensor, batch: tuple[torch.Tensor, ...], case: Case, ranks: Ranks, **settings: Any) -> Any:
    weights, ids = case.part(ranks)
    settings = {
        "activation_format": "nvfp4",
        "activation_scale": "static",
        "l1_input_scale": case.l1_input[ids],
        "l2_input_scale": case.l2_input[ids],
        "l1_scale_policy": "per_expert",
        "swiglu_limit": LIMIT,
        "start": ids[0],
        **settings,
    }
    return nearest_reference(got, *batch, weights, **settings)


def loaded(path: Path, layout: str, case: Case, device: torch.device, ranks: Ranks = layers.ALONE) -> Any:
    hidden, inter = case.weights.l2_fp4.shape[1], case.weights.l1_fp4.shape[1] // 2
    layer = layers.build(
        layers.quantization(layout), experts=E, hidden=hidden, inter=inter, top_k=K, device=device, ranks=ranks,
        limit=LIMIT,
    )  # fmt: skip
    file = path / "w.safetensors"
    layers.load(layer, layers.write_checkpoint(file, layout, case.weights, case.l1_input, case.l2_input))
    return layer


@pytest.mark.parametrize("ranks", RANKS)
def test_the_oracles_numbers(layout, ranks, device, tmp_path):
    """W4A4 with the checkpoint's scales: per expert, gate and up apart, clamped; on each rank, and in sum."""
    whole, total = case(), np.zeros((33, H))
    batch = inputs(33, H, K, E, seed=1)
    for rank in RANKS[ranks]:
        layer = loaded(tmp_path, layout, whole, device, rank)
        got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
        want = expected(got, batch, whole, rank)
        assert relative_l2(got, want) <= BAR
        assert set(moe_layers(layer)) == {""}
        total += got.double().numpy()
    assert relative_l2(total, expected(torch.from_numpy(total), batch, whole, Ranks())) <= (
        # A rank's intermediate is quantized by block, as the whole one is; only bf16 sums of two ranks are added.
        2 * BAR
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b is not ReferenceBackend])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("activations", ["static", "bf16"])
def test_cuda_graphs_of_each_backend(layout, ranks, activations, backend, tmp_path, monkeypatch):
    """At sizes that every backend takes, on each rank: graphs captured straight after loading give the oracle's numbers
    for inputs that came later."""
    monkeypatch.setenv("DSV4_VLLM_ACTIVATIONS", activations)
    monkeypatch.setenv("DSV4_BACKEND", backend)
    device, whole = torch.device("cuda"), case(6, 256, 512)
    verdict = explain_all(MoEConfig(E, 256, 256, 64, K), device)[backend]
    if not verdict.usable:
        pytest.skip(verdict.reason)
    settings = {} if activations == "static" else {"activation_format": "bf16", "activation_scale": "token"}
    for rank in RANKS[ranks]:
        layer = loaded(tmp_path, layout, whole, device, rank)
        assert moe_layers(layer)[""].backend_name == backend
        for tokens in (64, 17, 1):
            buffers = [t.to(device) for t in inputs(tokens, 256, K, E, seed=1)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layers.run(layer, *buffers)
            batch = inputs(tokens, 256, K, E, seed=2)
            for buffer, later in zip(buffers, batch, strict=True):
                buffer.copy_(later)
            graph.replay()
            got = out.float().cpu()
            assert relative_l2(got, expected(got, batch, whole, rank, **settings)) <= BAR


@pytest.mark.parametrize("activations", ["token", "bf16"])
def test_the_users_choice_of_activations(layout, activations, device, tmp_path, monkeypatch):
    """DSV4_VLLM_ACTIVATIONS chooses W4A4 with token scales or W4A16, whatever the checkpoint has."""
    monkeypatch.setenv("DSV4_VLLM_ACTIVATIONS", activations)
    whole, batch = case(), inputs(17, H, K, E, seed=2)
    layer = loaded(tmp_path, layout, whole, device)
    got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
    settings = {"activation_format": "bf16" if activations == "bf16" else "nvfp4", "activation_scale": "token"}
    assert relative_l2(got, expected(got, batch, whole, Ranks(), **settings)) <= BAR


def test_a_weight_only_checkpoint(layout, device, tmp_path):
    """A checkpoint that says W4A16 is computed so, and nothing is missed."""
    whole, batch = case(), inputs(17, H, K, E, seed=2)
    layer = layers.build(layers.quantization(layout, weight_only=True), **SHAPE, device=device)
    layers.load(layer, layers.write_checkpoint(tmp_path / "w.safetensors", layout, whole.weights))
    got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
    assert relative_l2(got, moe_layer(*batch, whole.weights, activation_format="bf16", activation_scale="token")) <= BAR


def test_more_tokens_than_scratch(device, tmp_path, monkeypatch):
    """A call of more tokens than a layer's scratch is for, as data-parallel ranks make, is cut, not refused."""
    monkeypatch.setattr("dsv4.integrations.vllm.takeover.MAX_NUM_TOKENS", 16)
    whole, batch = case(), inputs(40, H, K, E, seed=4)
    layer = loaded(tmp_path, "modelopt", whole, device)
    assert moe_layers(layer)[""].config.max_num_tokens == 16
    got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
    assert relative_l2(got, expected(got, batch, whole, Ranks())) <= BAR


def test_no_tokens(device, tmp_path):
    """An empty call gives an empty result."""
    layer = loaded(tmp_path, "modelopt", case(), device)
    batch = inputs(0, H, K, E)
    assert layers.run(layer, *(t.to(device) for t in batch)).shape == (0, H)


def test_router_weights_on_the_input(device, tmp_path):
    """``apply_router_weight_on_input``: vLLM has multiplied the hidden states, and nothing is multiplied twice."""
    whole = case()
    x, w, ids = inputs(17, H, 1, E, seed=5)
    layer = layers.build(
        layers.quantization("modelopt"), **{**SHAPE, "top_k": 1}, device=device, on_input=True, limit=LIMIT
    )
    layers.load(
        layer,
        layers.write_checkpoint(tmp_path / "w.safetensors", "modelopt", whole.weights, whole.l1_input, whole.l2_input),
    )
    got = layers.run(layer, *(t.to(device) for t in (x, w, ids))).float().cpu()
    weighted = x * w.bfloat16()  # as vLLM rounds it
    want = expected(got, (weighted, torch.ones_like(w), ids), whole, Ranks())
    assert relative_l2(got, want) <= BAR
