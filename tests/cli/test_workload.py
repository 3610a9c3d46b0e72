"""The random layer and the routings that are timed."""

from __future__ import annotations

import pytest
import torch

from dsv4.cli._layer import build_layer, random_call, random_topk_ids, random_weights
from dsv4.cli._modes import MODES
from dsv4.cli._shapes import SHAPES, LayerShape

CPU = torch.device("cpu")
SHAPE = LayerShape(8, 64, 32, 2, 10.0)


def draw(kind, tokens, experts, k, seed=0):
    return random_topk_ids(tokens, experts, k, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 8), (64, 6), (257, 3)])
def test_ids(kind, experts, k):
    """Experts are in range and distinct for a token; a seed fixes them; k = E takes each once."""
    ids = draw(kind, 100, experts, k)
    assert ids.shape == (100, k)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < experts
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(ids, draw(kind, 100, experts, k))
    if 1 < k < experts:
        assert not torch.equal(ids, draw(kind, 100, experts, k, seed=1))


def test_uniform_popularity():
    """Every expert gets its share, within five standard deviations of the binomial distribution."""
    tokens, experts = 20_000, 16
    counts = draw("uniform", tokens, experts, 1).flatten().bincount(minlength=experts)
    share = 1 / experts
    assert ((counts - tokens * share).abs() < 5 * (tokens * share * (1 - share)) ** 0.5).all()


def test_zipf_popularity():
    """With k = 1 the n-th most popular expert gets 1/n over the harmonic number, within five standard deviations."""
    tokens, experts = 20_000, 16
    counts = draw("zipf", tokens, experts, 1).flatten().bincount(minlength=experts).sort(descending=True).values
    share = 1 / torch.arange(1, experts + 1)
    share /= share.sum()
    assert ((counts - tokens * share).abs() < 5 * (tokens * share * (1 - share)).sqrt()).all()


def test_zipf_favourites_are_random():
    """Which expert is the favourite depends on the seed: the skew is not always at the first expert."""
    assert len({int(draw("zipf", 2000, 64, 1, seed).flatten().mode().values) for seed in range(8)}) > 4


def test_calls_are_not_zeros():
    """Inputs are random everywhere, and a token's routing weights are positive and sum to 1.5."""
    call = random_call(SHAPE, 33, "uniform", CPU, seed=0)
    assert call.hidden_states.dtype == torch.bfloat16
    assert (call.hidden_states == 0).float().mean() < 0.01
    assert (call.topk_weights > 0).all()
    torch.testing.assert_close(call.topk_weights.sum(dim=1), torch.full((33,), 1.5))
    assert call.active_experts == len(set(call.topk_ids.flatten().tolist()))


@pytest.mark.parametrize("name", MODES)
def test_layer(name):
    """A layer in each mode gives results of order 1: finite, not zero, nowhere near the range of bf16."""
    layer = build_layer(SHAPE, random_weights(SHAPE, CPU), MODES[name], 40, CPU)
    call = random_call(SHAPE, 40, "zipf", CPU, seed=0)
    out = layer.run(call.hidden_states, call.topk_weights, call.topk_ids).float()
    assert out.isfinite().all()
    assert 0.05 < out.square().mean().sqrt() < 20
    assert layer.config.activation_format == MODES[name].activation_format


def test_presets():
    """The shapes of the models that they are named after."""
    assert SHAPES["v4-flash"] == LayerShape(256, 4096, 2048, 6, 10.0)
    assert SHAPES["v4-pro"] == LayerShape(384, 7168, 3072, 6, 10.0)
    assert SHAPES["qwen3-30b"] == LayerShape(128, 2048, 768, 8, None)
    assert SHAPES["small"].bf16_bytes == 64 * 3 * 1024 * 512 * 2
    assert SHAPES["small"].flops(32) == 2 * 32 * 6 * 3 * 1024 * 512
