"""The layer's numbers, on every backend and device, against the float64 oracle and against Transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import BAR, MODES, build, fitted, inputs, on, poisoned
from oracle import dequantize, nearest_reference, random_weights, relative_l2

SHAPES = {
    # E experts, hidden size H, intermediate size I, k choices, T tokens
    "no-tokens": (4, 64, 32, 2, 0),
    "one-token": (4, 64, 32, 2, 1),
    "below-a-tile": (8, 48, 80, 3, 127),
    "above-a-tile": (8, 112, 16, 6, 129),
    "one-expert": (1, 32, 48, 1, 7),
    "smallest": (2, 16, 16, 1, 3),
    "more-choices-than-experts": (2, 32, 32, 6, 5),
    "two-slabs": (2, 528, 48, 2, 9),
}
L1_SCALE, L2_SCALE = 0.002, 0.01


def compare(target, weights, settings: dict[str, Any], case, *, scales=(L1_SCALE, L2_SCALE)):
    """Run the layer with a poisoned ``out=`` and compare with the oracle; returns the layer's output."""
    x, w, ids = case
    _, device = target
    moe = build(target, weights, top_k=ids.shape[1], l1_input_scale=scales[0], l2_input_scale=scales[1], **settings)
    out = poisoned(*x.shape, device)
    moe.run(*on(device, x, w, ids), out=out)
    unknown = ("experts_start_idx", "batch_invariant", "max_num_tokens")  # to the oracle
    forwarded = {k: v for k, v in settings.items() if k not in unknown}
    forwarded.setdefault("activation_scale", "static")
    got = out.cpu()
    assert got.isfinite().all()
    want = nearest_reference(
        got,
        x,
        w,
        ids,
        weights,
        l1_input_scale=scales[0],
        l2_input_scale=scales[1],
        start=settings.get("experts_start_idx", 0),
        **forwarded,
    )
    assert relative_l2(got, want) <= BAR
    # Row by row as well, a little wider: one row has few elements, and its last rounding (bf16, 2^-9) is all its own.
    for t in range(x.shape[0]):
        if np.any(want[t]):
            assert relative_l2(got[t], want[t]) <= 4 * BAR, f"row {t}"
        else:
            assert not got[t].any(), f"row {t}"
    return got


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(target, mode, shape):
    """Odd shapes, none, one and many tokens: within the bar in every mode, every element written."""
    e, h, i, k, t = SHAPES[shape]
    h, i = fitted(target, h, i)
    compare(target, random_weights(e, h, i, seed=1), MODES[mode] | {"swiglu_limit": 2.0}, inputs(t, h, k, e))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 4, 48, 192, 384, 768, 1536, 2100])
def test_calls_of_every_size(target, mode, tokens):
    """From one slot for every 32 experts to 65 for each: every tiling that a backend has, and rows of 16 bits.

    Neither dimension is a multiple of any tile, for backends that take such sizes. More than 4096 slots let a backend
    keep its slot rows in bf16.
    """
    h, i = fitted(target, 144, 80)
    weights = random_weights(64, h, i, seed=4)
    settings = MODES[mode] | {"swiglu_limit": 2.0, "max_num_tokens": tokens}
    compare(target, weights, settings, inputs(tokens, h, 2, 64, seed=tokens))


@pytest.mark.parametrize("mode", MODES)
def test_gate_and_up_scales_are_kept_apart(target, mode):
    """``l1_gs [E, 2]``: different global scales of gate and up are both honoured."""
    h, i = fitted(target, 64, 32)
    weights = random_weights(4, h, i, seed=2, split_gate_up=True)
    assert (weights.l1_gs[:, 0] != weights.l1_gs[:, 1]).all()
    compare(target, weights, MODES[mode], inputs(17, h, 2, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [None, 0.05, 10.0])
def test_clamp(target, mode, limit):
    """The limit clamps gate from above and up on both sides, before SiLU."""
    h, i = fitted(target, 64, 32)
    compare(target, random_weights(4, h, i, seed=3), MODES[mode] | {"swiglu_limit": limit}, inputs(17, h, 2, 4))


def test_the_clamp_changes_something(target):
    """The limits above are not all idle: a small limit gives another result than none."""
    h, i = fitted(target, 64, 32)
    weights, case = random_weights(4, h, i, seed=3), inputs(17, h, 2, 4)
    settings = MODES["w4a16"]
    free = compare(target, weights, settings | {"swiglu_limit": None}, case)
    clamped = compare(target, weights, settings | {"swiglu_limit": 0.05}, case)
    assert relative_l2(clamped, free.double()) > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("place", "top_k"), [("output", 3), ("before_down", 3), ("input", 1)])
def test_routing_weight_places(target, mode, place, top_k):
    """The weight acts at the combine, before GEMM 2, or on the hidden state (rounded once to bf16)."""
    h, i = fitted(target, 64, 32)
    settings = MODES[mode] | {"route_weight": place, "swiglu_limit": 1.0}
    compare(target, random_weights(4, h, i, seed=4), settings, inputs(17, h, top_k, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_parallel_rank(target, mode, dtype):
    """A rank's experts are a range of the global ids; all other ids, negative ones too, contribute nothing."""
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(33, h, 3, 16, dtype=dtype)
    ids[5] = -1
    ids[6, 0] = 99
    compare(target, random_weights(4, h, i, seed=5), MODES[mode] | {"experts_start_idx": 6}, (x, w, ids))


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_without_tokens_gives_zeros(target, mode):
    """No slot is local: the output is exactly zero, even under infinite weights and with NaN activations."""
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(9, h, 2, 4)
    w[0], x[1] = torch.inf, torch.nan
    _, device = target
    moe = build(
        target,
        random_weights(4, h, i, seed=5),
        top_k=2,
        l1_input_scale=L1_SCALE,
        l2_input_scale=L2_SCALE,
        experts_start_idx=100,
        **MODES[mode],
    )
    out = poisoned(9, h, device)
    moe.run(*on(device, x, w, ids), out=out)
    assert (out == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_expert_map(target, mode):
    """A map places global experts anywhere, in any order."""
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(33, h, 3, 8)
    expert_map = torch.tensor([-1, 3, -1, 0, 2, -1, 1, -1], dtype=torch.int32)
    weights = random_weights(4, h, i, seed=6)
    compare(target, weights, MODES[mode] | {"expert_map": expert_map}, (x, w, ids))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["all-on-one", "repeated-in-a-row", "half-dropped"])
def test_skew(target, mode, kind):
    """Skewed routing takes the same path and gives the same accuracy."""
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(65, h, 3, 8)
    if kind == "all-on-one":
        ids[:] = 5
    elif kind == "repeated-in-a-row":
        ids[:, 1] = ids[:, 0]
    else:
        ids[::2] = -1
    compare(target, random_weights(8, h, i, seed=7), MODES[mode], (x, w, ids))


@pytest.mark.parametrize("policy", ["max", "per_expert"])
def test_static_scales_by_expert(target, policy):
    """GEMM 2 honours one input scale per expert; GEMM 1 merges them by max, or keeps them by choice."""
    h, i = fitted(target, 64, 32)
    # Ratios that are no powers of two: under those, merging would change nothing but what saturates.
    l1 = torch.tensor([0.0010, 0.0043, 0.0021, 0.0077])
    l2 = torch.tensor([0.0190, 0.0053, 0.0110, 0.0370])
    compare(
        target,
        random_weights(4, h, i, seed=8),
        MODES["w4a4-static"] | {"l1_scale_policy": policy},
        inputs(33, h, 2, 4),
        scales=(l1, l2),
    )


@pytest.mark.parametrize("mode", MODES)
def test_padding_rows(target, mode):
    """Rows from num_valid_tokens on are exactly zero and change nothing, whatever stands in them."""
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(21, h, 2, 4)
    weights, valid = random_weights(4, h, i, seed=9), 13
    _, device = target
    scales = {"l1_input_scale": L1_SCALE, "l2_input_scale": L2_SCALE}
    moe = build(target, weights, top_k=2, **scales, **MODES[mode])
    x[valid:] = torch.nan
    w[valid:] = torch.inf
    out = poisoned(21, h, device)
    count = torch.tensor([valid], dtype=torch.int32, device=device)
    moe.run(*on(device, x, w, ids), out=out, num_valid_tokens=count)
    assert (out[valid:] == 0).all()
    settings = {"activation_scale": "static"} | MODES[mode] | scales
    want = nearest_reference(out[:valid].cpu(), x[:valid], w[:valid], ids[:valid], weights, **settings)
    assert relative_l2(out[:valid].cpu(), want) <= BAR


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_stays_alone(target, mode, bad):
    """A NaN or Inf activation spoils its own row only: the other rows equal a run without it.

    W4A4 makes the whole row NaN; W4A16 follows IEEE arithmetic, so the row is not all finite.
    """
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(19, h, 2, 4)
    _, device = target
    moe = build(
        target,
        random_weights(4, h, i, seed=10),
        top_k=2,
        l1_input_scale=L1_SCALE,
        l2_input_scale=L2_SCALE,
        **MODES[mode],
    )
    clean = x.clone()
    clean[7] = 0  # like the bad row, a zero row does not count towards a tensor's amax
    want = moe.run(*on(device, clean, w, ids))
    x[7, 5] = bad
    got = moe.run(*on(device, x, w, ids))
    others = torch.arange(19) != 7
    assert torch.equal(got[others], want[others])
    if mode == "w4a16":
        assert not got[7].isfinite().all()
    else:
        assert got[7].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_sum_to_the_whole(target, mode):
    """fp32 outputs of two expert-parallel ranks add up to the whole layer's.

    (With tensor scales each rank sees the amax of its own slots, so there the sum is only near.)
    """
    h, i = fitted(target, 64, 32)
    x, w, ids = inputs(40, h, 3, 8)
    weights = random_weights(8, h, i, seed=11)
    _, device = target
    scales = {"l1_input_scale": L1_SCALE, "l2_input_scale": L2_SCALE}
    args = on(device, x, w, ids)
    whole = build(target, weights, top_k=3, **scales, **MODES[mode]).run(*args, out_dtype=torch.float32)
    total = torch.zeros_like(whole)
    for start in (0, 4):
        part = type(weights)(**{n: v[start : start + 4] for n, v in vars(weights).items()})
        rank = build(target, part, top_k=3, experts_start_idx=start, **scales, **MODES[mode])
        total += rank.run(*args, out_dtype=torch.float32)
    # fp32 additions in another order: k terms of at most eps/2 relative to the largest partial sum.
    bound = 0.2 if mode == "w4a4-tensor" else 1e-6
    assert relative_l2(total.cpu(), whole.cpu().double()) < bound


def test_w4a16_against_transformers(target):
    """W4A16 equals Transformers' own DeepseekV4Experts run in float64 on the dequantized weights."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    e, k = 8, 3
    h, i = fitted(target, 96, 48)
    weights = random_weights(e, h, i, seed=12, split_gate_up=True)
    config = DeepseekV4Config(
        hidden_size=h,
        moe_intermediate_size=i,
        n_routed_experts=e,
        num_experts_per_tok=k,
        swiglu_limit=2.0,
        num_hidden_layers=1,
    )
    config._experts_implementation = "eager"
    experts = modeling.DeepseekV4Experts(config).double()
    gate, up = (
        dequantize(weights.l1_fp4[:, half], weights.l1_sf[:, half], weights.l1_gs[:, j][:, None, None])
        for j, half in enumerate((slice(0, i), slice(i, 2 * i)))
    )
    down = dequantize(weights.l2_fp4, weights.l2_sf, weights.l2_gs[:, None, None])
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.from_numpy(np.concatenate([gate, up], axis=1)))
        experts.down_proj.copy_(torch.from_numpy(down))
        x, w, ids = inputs(50, h, k, e)
        want = experts(x.double(), ids, w.double())
    _, device = target
    moe = build(target, weights, top_k=k, swiglu_limit=2.0, activation_format="bf16")
    got = moe.run(*on(device, x, w, ids))
    assert relative_l2(got.cpu(), want.numpy()) <= BAR
