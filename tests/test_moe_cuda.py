"""Serving promises that only a GPU can prove: no host synchronisation, CUDA graphs over changing routings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import MODES, build, inputs, on, poisoned
from oracle import random_weights

from dsv4 import StateError
from dsv4.backends import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

E, H, INTER, K, T = 8, 64, 32, 3, 16
SCALES: dict[str, Any] = {"l1_input_scale": 0.002, "l2_input_scale": 0.01}


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def target(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    return request.param, torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("mode", MODES)
def test_no_host_synchronisation(target, mode):
    """After warm-up, run never waits for the device: torch's own detector raises on any wait."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, **SCALES, **MODES[mode])
    args = on(target[1], *inputs(T, H, K, E))
    moe.warmup((T,))
    want = moe.run(*args)
    valid = torch.tensor([T], dtype=torch.int32, device=target[1])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = moe.run(*args, num_valid_tokens=valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_replays_any_routing(target, mode):
    """A graph captured once gives eager's bits for fresh inputs: skewed, dropped and padded ones too."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, **SCALES, **MODES[mode])
    x, w, ids = on(target[1], *inputs(T, H, K, E))
    valid = torch.tensor([T], dtype=torch.int32, device=target[1])
    out = poisoned(T, H, target[1])
    moe.warmup((T,))
    moe.run(x, w, ids, out=out, num_valid_tokens=valid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.run(x, w, ids, out=out, num_valid_tokens=valid)
    for seed in range(1, 5):
        new_x, new_w, new_ids = on(target[1], *inputs(T, H, K, E, seed=seed))
        if seed == 2:
            new_ids.fill_(3)
        if seed == 3:
            new_ids[::2] = -1
        x.copy_(new_x)
        w.copy_(new_w)
        ids.copy_(new_ids)
        valid.fill_(T if seed != 4 else 5)
        out.fill_(torch.nan)
        graph.replay()
        want = moe.run(x, w, ids, num_valid_tokens=valid)
        assert torch.equal(out, want), seed


def test_capture_before_warmup_is_refused(target):
    """Capturing a layer that was not warmed up says so, instead of recording half of it."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, **SCALES)
    args = on(target[1], *inputs(T, H, K, E))
    with pytest.raises(StateError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        moe.run(*args)
    torch.cuda.synchronize()
