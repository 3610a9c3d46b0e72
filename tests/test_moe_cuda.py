"""Serving promises that only a GPU can prove: no host synchronisation, CUDA graphs over changing routings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import MODES, build, fitted, inputs, on, poisoned, weights_on
from oracle import random_weights

from dsv4 import BackendError, StateError
from dsv4.backends import BACKENDS
from dsv4.config import MoEConfig
from dsv4.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

E, H, INTER, K, T = 8, 256, 128, 3, 16
SCALES: dict[str, Any] = {"l1_input_scale": 0.002, "l2_input_scale": 0.01}


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def target(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    device = torch.device("cuda", torch.cuda.current_device())
    verdict = next(b for b in BACKENDS if b.name == request.param).explain(MoEConfig(E, H, INTER, top_k=K), device)
    if not verdict.usable:
        pytest.skip(verdict.reason)
    return request.param, device


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


def test_a_graph_follows_the_weights(target):
    """A graph captured before one expert, and then all weights, were replaced in place computes with the new ones."""
    first, second = random_weights(E, H, INTER, seed=1), random_weights(E, H, INTER, seed=2)
    settings = {"top_k": K, "activation_scale": "token"}
    moe, other = (build(target, w, **settings) for w in (first, second))
    args = on(target[1], *inputs(T, H, K, E))
    moe.warmup((T,))
    out = poisoned(T, H, target[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.run(*args, out=out)

    def replayed() -> torch.Tensor:
        out.fill_(torch.nan)
        graph.replay()
        return out

    assert torch.equal(replayed(), build(target, first, **settings).run(*args))
    for name in ("experts", "l1_gs", "l2_gs"):
        getattr(moe._packed, name)[3].copy_(getattr(other._packed, name)[3])
    mixed = random_weights(E, H, INTER, seed=1)
    for name, tensor in vars(second).items():
        getattr(mixed, name)[3] = tensor[3]
    assert torch.equal(replayed(), build(target, mixed, **settings).run(*args))
    moe.prepare_weights_from_stacked(*weights_on(second, target[1]))
    assert torch.equal(replayed(), other.run(*args))


def test_capture_before_warmup_is_refused(target):
    """Capturing a layer that was not warmed up says so, instead of recording half of it."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, **SCALES)
    args = on(target[1], *inputs(T, H, K, E))
    with pytest.raises(StateError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        moe.run(*args)
    torch.cuda.synchronize()


@pytest.mark.parametrize("mode", MODES)
def test_run_allocates_nothing_but_the_result(target, mode):
    """By the allocator's own count: no allocation with ``out=``, one without; any number of tokens, warmed or not."""
    if target[0] == "reference":
        pytest.skip("the reference makes torch temporaries")
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, max_num_tokens=64, **SCALES, **MODES[mode])
    moe.warmup()
    for tokens in (1, 5, 16, 33, 64):
        args = on(target[1], *inputs(tokens, H, K, E))
        out = poisoned(tokens, H, target[1])
        moe.run(*args, out=out)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        moe.run(*args, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        result = moe.run(*args)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
        assert torch.equal(result, out)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_compiled_after_warmup(target, mode, monkeypatch):
    """Ids of either width, padding rows, results of every dtype, tensors that begin anywhere: all kernels are there."""
    if target[0] == "reference":
        pytest.skip("nothing is ever compiled")
    from triton import knobs

    from dsv4.kernels.blackwell import launch as blackwell_launch
    from dsv4.kernels.cutedsl.cache import KernelCache
    from dsv4.kernels.hopper import launch as hopper_launch

    top_k, device = 5, target[1]  # no other test's, or it would have compiled them
    for launch in (blackwell_launch, hopper_launch):
        launch.gemm_kernel.cache_clear()  # its kernels are not made for one top_k
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=top_k, max_num_tokens=600, **SCALES, **MODES[mode])
    moe.warmup((1, T, 600))
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, repr, **_: compiled.append(repr))
    monkeypatch.setattr(KernelCache, "load", lambda self, config, arch: compiled.append(repr(config)))
    for tokens in (1, T, 600):
        x, w, ids = on(device, *inputs(tokens, H, top_k, E))
        misaligned = torch.zeros(ids.numel() + 1, dtype=torch.int32, device=device)[1:].view(ids.shape)
        misaligned.copy_(ids)
        for these in (ids, ids.int(), misaligned):
            for valid in (None, torch.ones(3, dtype=torch.int32, device=device)[2:]):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    moe.run(x, w, these, num_valid_tokens=valid, out_dtype=dtype)
    assert not compiled


def test_every_budget_replays(target):
    """One graph for each of 1, 2, 4 ... 8192 tokens, replayed in mixed order with fresh routings, gives eager's bits.

    Some replays have padding rows, by id -1 and by ``num_valid_tokens``: those are zero.
    """
    device = target[1]
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, max_num_tokens=8192, activation_scale="token")
    moe.warmup()
    graphs = {}
    for budget in (1 << n for n in range(14)):
        args = on(device, *inputs(budget, H, K, E))
        valid = torch.tensor([budget], dtype=torch.int32, device=device)
        out = poisoned(budget, H, device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            moe.run(*args, out=out, num_valid_tokens=valid)
        graphs[budget] = (graph, args, valid, out)
    for seed in (1, 2, 3):
        for budget, (graph, args, valid, out) in reversed(graphs.items()):
            for old, new in zip(args, inputs(budget, H, K, E, seed=seed), strict=True):
                old.copy_(new)
            padding = torch.zeros(budget, dtype=torch.bool, device=device)
            if seed == 2:
                padding[1::3] = True
                args[2][padding] = -1
            if seed == 3:
                padding[(budget + 1) // 2 :] = True
                valid.fill_((budget + 1) // 2)
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, moe.run(*args, num_valid_tokens=valid)), (budget, seed)
            assert not out[padding].any()
            assert bool(out[~padding].any(dim=1).all())


@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
def test_batch_invariance_along_a_long_k(target, mode):
    """Long sums and calls from 1 to 600 tokens: a token alone keeps the bits that it has in every batch."""
    h, i = fitted(target, 1040, 528)
    moe = build(
        target, random_weights(8, h, i, seed=1), top_k=K, max_num_tokens=600, batch_invariant=True, **SCALES,
        **MODES[mode],
    )  # fmt: skip
    x, w, ids = on(target[1], *inputs(600, h, K, 8))
    whole = moe.run(x, w, ids, out_dtype=torch.float32)
    for tokens in (1, 2, 30, 100):
        part = moe.run(x[:tokens], w[:tokens], ids[:tokens], out_dtype=torch.float32)
        assert torch.equal(part, whole[:tokens]), tokens


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_need_not_be_on_the_current_gpu(target):
    """As when a model's layers are spread over GPUs in one process: the numbers of the current GPU."""
    weights, args = random_weights(E, H, INTER, seed=1), inputs(T, H, K, E)
    here, there = target[1], torch.device("cuda", (target[1].index + 1) % torch.cuda.device_count())
    results = []
    for device in (here, there):
        moe = build((target[0], device), weights, top_k=K, activation_scale="token")
        moe.warmup((T,))
        results.append(moe.run(*on(device, *args)).cpu())
    assert torch.cuda.current_device() == here.index
    assert torch.equal(*results)


def test_two_layers_on_two_streams(target):
    """Layers with a workspace each run at the same time without disturbing each other."""
    _, device = target
    weights = random_weights(E, H, INTER, seed=1)
    layers = [build(target, weights, top_k=K, activation_scale="token", workspace=Workspace(device)) for _ in range(2)]
    calls = [on(device, *inputs(200, H, K, E, seed=seed)) for seed in (1, 2)]
    want = [layer.run(*call) for layer, call in zip(layers, calls, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(20):
        got = []
        for layer, call, stream in zip(layers, calls, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(layer.run(*call))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sharing_a_workspace_between_streams_is_caught(target, monkeypatch):
    """With DSV4_DEBUG=1, a run on one workspace while another stream still uses it is refused."""
    monkeypatch.setenv("DSV4_DEBUG", "1")
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, activation_scale="token")
    args = on(target[1], *inputs(T, H, K, E))
    moe.run(*args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        moe.run(*args)
    with pytest.raises(StateError, match="stream"):
        moe.run(*args)
    torch.cuda.synchronize()
    moe.run(*args)


def test_compiled_with_cuda_graphs(target):
    """``torch.compile(mode="reduce-overhead")`` gives eager's bits."""
    moe = build(target, random_weights(E, H, INTER, seed=1), top_k=K, activation_scale="token")
    moe.warmup()
    compiled = torch.compile(lambda x, w, ids: moe.run(x * 2, w, ids) + 1, mode="reduce-overhead", fullgraph=True)
    for seed in range(3):
        x, w, ids = on(target[1], *inputs(T, H, K, E, seed=seed))
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x, w, ids).clone()
        assert torch.equal(got, moe.run(x * 2, w, ids) + 1)


def test_a_failing_backend_is_passed_over(monkeypatch, caplog):
    """A backend that disagrees with the reference is never given weights: the next takes over, with a warning."""
    pytest.importorskip("triton")
    from dsv4.backends import proof
    from dsv4.backends.portable import PortableBackend

    monkeypatch.setattr(proof, "_keep", lambda path, verdict: None)
    monkeypatch.setattr(proof, "known", lambda backend, device: None)
    run = PortableBackend.run

    def wrong(self, packed, call, scratch, out):
        run(self, packed, call, scratch, out)
        out[0] *= 1.5

    monkeypatch.setattr(PortableBackend, "run", wrong)
    proof.prove.cache_clear()
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        moe = build(("auto", device), random_weights(E, H, INTER, seed=1), top_k=K, activation_scale="token")
        assert moe.backend_name == "reference"
        assert "self-check failed" in caplog.text
        with pytest.raises(BackendError, match="self-check failed"):
            build(("portable", device), random_weights(E, H, INTER, seed=1), top_k=K)
    finally:
        proof.prove.cache_clear()
