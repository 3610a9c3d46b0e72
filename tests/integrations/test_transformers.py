"""NVFP4 experts inside Transformers models: the numbers, how experts are called, calibration."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4.integrations.transformers as dsv4_hf
from dsv4 import Nvfp4MoE
from dsv4.checkpoints import ExpertWeights, InputScale, open_checkpoint
from dsv4.checkpoints.modelopt import expert_tensors
from dsv4.errors import StateError
from dsv4.nvfp4 import Nvfp4Tensor

from . import models

KINDS = pytest.mark.parametrize("kind", list(models.BUILDERS))
IDS = models.IDS

# fp32 sums in another order than the oracle's float64 ones: K <= 64 terms, unit roundoff 2^-24, two layers and a head.
SAME_ROUNDING = 1e-5


# The numbers.


@KINDS
def test_weight_only_logits_match_the_oracle(kind, weights):
    """W4A16 of a quantized model gives the logits of a float64 computation with the same rounding points."""
    model = dsv4_hf.quantize_experts(models.dense_model(kind, weights), activation_format="bf16")
    assert models.relative_error(models.logits(model, IDS), models.oracle_logits(kind, weights)) < SAME_ROUNDING


@KINDS
def test_weight_only_logits_are_close_to_transformers_own(kind, weights):
    """Against Transformers' fp32 experts with the same weights, only activations are rounded to bf16 (2^-9, twice)."""
    model = dsv4_hf.quantize_experts(models.dense_model(kind, weights), activation_format="bf16")
    expected = models.logits(models.dense_model(kind, weights), IDS)
    assert models.relative_error(models.logits(model, IDS), expected) < 2 * 2.0**-9


def test_the_limit_matters_and_is_taken_from_the_model(weights):
    """The clamp is active on this data: a model without it gives other logits, ours follows the model's limit."""
    clamped = models.oracle_logits("deepseek_v4", weights)
    open_ = models.oracle_logits("deepseek_v4", weights, swiglu_limit=100.0)
    assert models.relative_error(clamped, open_) > 100 * SAME_ROUNDING
    model = dsv4_hf.quantize_experts(
        models.dense_model("deepseek_v4", weights, swiglu_limit=100.0), activation_format="bf16"
    )
    assert models.relative_error(models.logits(model, IDS), open_) < SAME_ROUNDING


@KINDS
def test_checkpoint_and_memory_give_the_same_bits(tmp_path, kind, weights):
    """Weights that quantize to themselves: from the packed checkpoint and from memory, equal logits."""
    loaded = dsv4_hf.from_pretrained(models.write_checkpoint(tmp_path, kind, weights), activation_scale="token")
    quantized = dsv4_hf.quantize_experts(models.dense_model(kind, weights), activation_scale="token")
    assert torch.equal(models.logits(loaded, IDS), models.logits(quantized, IDS))


@KINDS
def test_checkpoint_with_two_global_scales_matches_the_oracle(tmp_path, kind, split_weights):
    """gate and up with different weight_scale_2 are both honoured, end to end."""
    path = models.write_checkpoint(tmp_path, kind, split_weights)
    model = dsv4_hf.from_pretrained(path, activation_format="bf16")
    assert models.relative_error(models.logits(model, IDS), models.oracle_logits(kind, split_weights)) < SAME_ROUNDING


@pytest.mark.parametrize("scale", ["static", "token", "tensor"])
def test_experts_compute_what_the_layer_computes(tmp_path, split_weights, scale):
    """W4A4: an experts module returns the bits of Nvfp4MoE with hand-stacked weights, given the same inputs."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", split_weights)
    model = dsv4_hf.from_pretrained(path, activation_scale=scale)
    (hidden, ids, route), found = models.capture_experts(model, 1)
    layer = split_weights[1]
    moe = Nvfp4MoE(
        models.EXPERTS,
        models.HIDDEN,
        models.INTER,
        64,
        models.TOP_K,
        "cpu",
        activation_scale=scale,
        swiglu_limit=models.LIMIT,
    )
    moe.prepare_weights_from_stacked(
        torch.stack([torch.cat((e["gate"].codes, e["up"].codes)) for e in layer]),
        torch.stack([torch.cat((e["gate"].sf.view(torch.uint8), e["up"].sf.view(torch.uint8))) for e in layer]).view(
            torch.float8_e4m3fn
        ),
        torch.tensor([[e["gate"].gs, e["up"].gs] for e in layer]),
        torch.stack([e["down"].codes for e in layer]),
        torch.stack([e["down"].sf.view(torch.uint8) for e in layer]).view(torch.float8_e4m3fn),
        torch.tensor([e["down"].gs for e in layer]),
        l1_input_scale=2.0**-9,
        l2_input_scale=2.0**-11,
    )
    assert torch.equal(found, moe.run(hidden.bfloat16(), route.float(), ids, out_dtype=torch.float32))


@KINDS
def test_w4a4_is_near_w4a16(tmp_path, kind, weights):
    """Quantized activations change the logits by a few per cent, not more: e2m1's steps are 1/12 to 1/4 of a value."""
    path = models.write_checkpoint(tmp_path, kind, weights)
    for scale in ("static", "token"):
        model = dsv4_hf.from_pretrained(path, activation_scale=scale)
        error = models.relative_error(models.logits(model, IDS), models.oracle_logits(kind, weights))
        assert 1e-4 < error < 0.08


def test_expert_parallel_ranks_sum_to_the_whole(tmp_path, split_weights):
    """Ranks that load their own experts and share none: their fp32 outputs sum to the whole layer's."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", split_weights)
    model = dsv4_hf.from_pretrained(path, activation_format="bf16")
    (hidden, ids, route), _ = models.capture_experts(model, 0)
    hidden, route = hidden.bfloat16(), route.float()

    def rank(experts, **where) -> torch.Tensor:
        with open_checkpoint(path) as checkpoint:
            loaded = checkpoint.load_layer(0, experts)
        moe = Nvfp4MoE(
            len(experts),
            models.HIDDEN,
            models.INTER,
            64,
            models.TOP_K,
            "cpu",
            activation_format="bf16",
            swiglu_limit=models.LIMIT,
            **where,
        )
        moe.prepare_weights_from_stacked(**loaded.prepare_arguments())
        return moe.run(hidden, route, ids, out_dtype=torch.float32)

    whole = rank(range(4))
    contiguous = rank(range(1)) + rank(range(1, 4), experts_start_idx=1)
    mapped = rank([3, 0], expert_map=torch.tensor([1, -1, -1, 0])) + rank(
        [1, 2], expert_map=torch.tensor([-1, 0, 1, -1])
    )
    # One fp32 sum instead of two partial ones: a rounding of 2^-24 for each of top_k terms.
    torch.testing.assert_close(contiguous, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mapped, whole, rtol=1e-6, atol=1e-6)


# How a model calls its experts.


def test_expert_id_equal_to_the_count_means_skip(weights):
    """An id of E, Transformers' mark for "skip", adds nothing; a row of such ids is zero."""
    model = models.dense_model("qwen3_moe", weights)
    # Experts have other rows with and without the skipped ones: their bits agree if they do not depend on the batch.
    dsv4_hf.quantize_experts(model, activation_format="bf16", batch_invariant=True)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(3, models.HIDDEN, generator=torch.Generator().manual_seed(0))
    route = torch.full((3, 2), 0.5)
    skipped = experts(hidden, torch.tensor([[0, 4], [4, 4], [1, 2]]), route)
    kept = experts(hidden, torch.tensor([[0, 1], [0, 1], [1, 2]]), route * torch.tensor([[1, 0], [0, 0], [1, 1]]))
    assert torch.equal(skipped, kept)
    assert (skipped[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_have_the_models_dtype(weights, dtype):
    """Whatever the dtype of hidden states and routing weights, the result has that dtype, rounded once."""
    module = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights), activation_format="bf16").model.layers[
        0
    ]
    hidden = torch.randn(5, models.HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]])
    route = torch.full((5, 2), 0.5)
    exact = module.mlp.experts(hidden.float(), ids, route)
    found = module.mlp.experts(hidden.to(dtype), ids, route.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def test_no_tokens(weights):
    """Zero tokens give an empty result of the right shape."""
    module = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights)).model.layers[0].mlp.experts
    out = module(torch.empty(0, models.HIDDEN), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert out.shape == (0, models.HIDDEN)


def test_long_forward_passes_are_chunked(weights):
    """40 tokens through layers built for 7 at a time: the bits of one pass."""
    options = {"activation_scale": "token", "batch_invariant": True}
    whole = dsv4_hf.quantize_experts(models.dense_model("deepseek_v4", weights), **options)
    chunked = dsv4_hf.quantize_experts(models.dense_model("deepseek_v4", weights), max_num_tokens=7, **options)
    assert torch.equal(models.logits(whole, IDS), models.logits(chunked, IDS))


@KINDS
def test_generation_with_a_cache(tmp_path, kind, weights):
    """Greedy decoding with a cache gives the tokens of full forward passes."""
    model = dsv4_hf.from_pretrained(models.write_checkpoint(tmp_path, kind, weights), activation_scale="token")
    prompt = IDS[:1, :8]
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    expected = prompt
    for _ in range(6):
        scores = models.logits(model, expected)[:, -1]
        if model.generation_config.eos_token_id is not None:
            scores[:, model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        expected = torch.cat((expected, scores.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found, expected)


def test_backward_raises(weights):
    """The experts are inference only: a forward pass with gradients works, a backward pass through them raises."""
    model = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights))
    loss = model(IDS).logits.sum()
    with pytest.raises(StateError, match="no backward pass"):
        loss.backward()


# Calibration.


def test_calibration_observes_what_enters_each_expert(weights):
    """l1 is the largest magnitude routed to an expert over all batches, l2 that of the SwiGLU outputs, over 2688."""
    model = dsv4_hf.quantize_experts(models.dense_model("deepseek_v4", weights), activation_format="bf16")
    (hidden, ids, _), _ = models.capture_experts(model, 0)
    scales = dsv4_hf.calibrate(model, [IDS[:, :10], {"input_ids": IDS}, IDS[:, 3:]])
    assert list(scales) == [0, 1]
    # The first layer's inputs depend on the token and its position only through attention, so the batch of all 20
    # positions has the maxima of its own prefix, and those of the shifted batch are taken by hand.
    (shifted, shifted_ids, _), _ = models.capture_experts(model, 0, IDS[:, 3:])
    hidden, ids = torch.cat((hidden, shifted)), torch.cat((ids, shifted_ids))
    for e, parts in enumerate(weights[0]):
        rows = hidden[(ids == e).any(-1)].bfloat16().double()
        gate, up = rows @ parts["gate"].values.double().T, rows @ parts["up"].values.double().T
        gate, up = gate.clamp(max=models.LIMIT), up.clamp(-models.LIMIT, models.LIMIT)
        inner = (gate * torch.sigmoid(gate) * up).bfloat16()
        assert float(scales[0].l1[e]) == pytest.approx(float(rows.abs().max()) / 2688, rel=1e-6)
        # The bf16 value before it is 2^-8 away, should a sum differ in its last fp32 bit at a rounding boundary.
        assert float(scales[0].l2[e]) == pytest.approx(float(inner.abs().max()) / 2688, rel=2.0**-8)


def test_calibrated_scales_serve_at_once_and_through_a_checkpoint(tmp_path, weights):
    """Scales that calibrate() returns, written as input scales, give the static model the calibrated model's bits."""
    model = dsv4_hf.quantize_experts(models.dense_model("deepseek_v4", weights), activation_scale="calibrated")
    with pytest.raises(StateError, match="nothing was observed"):
        models.logits(model, IDS)
    scales = dsv4_hf.calibrate(model, [IDS])
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights, input_scales=None)
    tensors = load_file(path / "model.safetensors")
    for n, layer in enumerate(weights):
        for e, parts in enumerate(layer):
            l1, l2 = InputScale(float(scales[n].l1[e])), InputScale(float(scales[n].l2[e]))
            matrices = [Nvfp4Tensor(m.codes, m.sf, torch.tensor(m.gs)) for m in parts.values()]
            tensors |= expert_tensors(ExpertWeights(*matrices, {"gate": l1, "up": l1, "down": l2}), n, e)
    save_file(tensors, path / "model.safetensors")
    static = dsv4_hf.from_pretrained(path)
    assert torch.equal(models.logits(static, IDS), models.logits(model, IDS))


def test_calibration_without_data_or_experts_is_refused(weights):
    """No batch, and a model without NVFP4 experts."""
    model = models.dense_model("qwen3_moe", weights)
    with pytest.raises(StateError, match="no NVFP4 experts"):
        dsv4_hf.calibrate(model, [IDS])
    with pytest.raises(StateError, match="at least one batch"):
        dsv4_hf.calibrate(dsv4_hf.quantize_experts(model), [])
