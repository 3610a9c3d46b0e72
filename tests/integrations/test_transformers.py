"""NVFP4 experts inside Transformers models: the numbers, the two ways in, and what is refused."""

from __future__ import annotations

import gc
import json
import logging
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import dsv4.integrations.transformers as dsv4_hf
from dsv4 import Nvfp4MoE
from dsv4.checkpoints import ExpertWeights, InputScale, open_checkpoint
from dsv4.checkpoints.modelopt import expert_tensors
from dsv4.errors import CheckpointError, ConfigError, InputError, StateError
from dsv4.nvfp4 import Nvfp4Tensor

from . import models

KINDS = pytest.mark.parametrize("kind", list(models.BUILDERS))
IDS = models.sample_ids()

# fp32 sums in another order than the oracle's float64 ones: K <= 64 terms, unit roundoff 2^-24, two layers and a head.
SAME_ROUNDING = 1e-5


@pytest.fixture(scope="module")
def weights():
    """Experts whose values quantize to themselves, gate and up sharing a global scale."""
    return models.experts(seed=3)


@pytest.fixture(scope="module")
def split_weights():
    """Experts whose gate and up have different global scales."""
    return models.experts(seed=4, gate_up_gs=(2.0**-14, 2.0**-15))


def oracle_logits(kind, weights, **changes):
    model = models.dense_model(kind, weights, **changes)
    model.set_experts_implementation("oracle_w4a16")
    return models.logits(model, IDS)


def capture_experts(model, layer: int, ids: torch.Tensor = IDS):
    """Inputs and outputs of one layer's experts module in a forward pass."""
    seen = []
    hook = model.model.layers[layer].mlp.experts.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    models.logits(model, ids)
    hook.remove()
    return seen[0]


# The numbers.


@KINDS
def test_weight_only_logits_match_the_oracle(kind, weights):
    """W4A16 of a quantized model gives the logits of a float64 computation with the same rounding points."""
    model = dsv4_hf.quantize_experts(models.dense_model(kind, weights), activation_format="bf16")
    assert models.relative_error(models.logits(model, IDS), oracle_logits(kind, weights)) < SAME_ROUNDING


@KINDS
def test_weight_only_logits_are_close_to_transformers_own(kind, weights):
    """Against Transformers' fp32 experts with the same weights, only activations are rounded to bf16 (2^-9, twice)."""
    model = dsv4_hf.quantize_experts(models.dense_model(kind, weights), activation_format="bf16")
    expected = models.logits(models.dense_model(kind, weights), IDS)
    assert models.relative_error(models.logits(model, IDS), expected) < 2 * 2.0**-9


def test_the_limit_matters_and_is_taken_from_the_model(weights):
    """The clamp is active on this data: a model without it gives other logits, ours follows the model's limit."""
    clamped = oracle_logits("deepseek_v4", weights)
    open_ = oracle_logits("deepseek_v4", weights, swiglu_limit=100.0)
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
    assert models.relative_error(models.logits(model, IDS), oracle_logits(kind, split_weights)) < SAME_ROUNDING


@pytest.mark.parametrize("scale", ["static", "token", "tensor"])
def test_experts_compute_what_the_layer_computes(tmp_path, split_weights, scale):
    """W4A4: an experts module returns the bits of Nvfp4MoE with hand-stacked weights, given the same inputs."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", split_weights)
    model = dsv4_hf.from_pretrained(path, activation_scale=scale)
    (hidden, ids, route), found = capture_experts(model, 1)
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
        error = models.relative_error(models.logits(model, IDS), oracle_logits(kind, weights))
        assert 1e-4 < error < 0.08


def test_expert_parallel_ranks_sum_to_the_whole(tmp_path, split_weights):
    """Ranks that load their own experts and share none: their fp32 outputs sum to the whole layer's."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", split_weights)
    model = dsv4_hf.from_pretrained(path, activation_format="bf16")
    (hidden, ids, route), _ = capture_experts(model, 0)
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
    module = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights), activation_format="bf16").model.layers[
        0
    ]
    hidden = torch.randn(3, models.HIDDEN, generator=torch.Generator().manual_seed(0))
    route = torch.full((3, 2), 0.5)
    skipped = module.mlp.experts(hidden, torch.tensor([[0, 4], [4, 4], [1, 2]]), route)
    kept = module.mlp.experts(
        hidden, torch.tensor([[0, 1], [0, 1], [1, 2]]), route * torch.tensor([[1, 0], [0, 0], [1, 1]])
    )
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
    (hidden, ids, _), _ = capture_experts(model, 0)
    scales = dsv4_hf.calibrate(model, [IDS[:, :10], {"input_ids": IDS}, IDS[:, 3:]])
    assert list(scales) == [0, 1]
    # The first layer's inputs depend on the token and its position only through attention, so the batch of all 20
    # positions has the maxima of its own prefix, and those of the shifted batch are taken by hand.
    (shifted, shifted_ids, _), _ = capture_experts(model, 0, IDS[:, 3:])
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


# Memory.


class LargeTensors(TorchDispatchMode):
    """Collects floating-point tensors off the meta device that are as large as the experts of a layer, or larger."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.is_floating_point()
            and not out.is_meta
            and out.dim() == 3
            and out.numel() >= models.EXPERTS * models.HIDDEN * models.INTER
            and out.itemsize > 1
        ):
            self.found.append(tuple(out.shape))
        return out


@KINDS
def test_loading_never_makes_floating_point_experts(tmp_path, monkeypatch, kind, weights):
    """from_pretrained makes no floating-point tensor of the experts' size; Transformers' own loading does (control)."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # dispatch modes see their own thread only
    dense = models.dense_model(kind, weights)
    dense.save_pretrained(tmp_path / "dense")
    with LargeTensors() as control:
        type(dense).from_pretrained(tmp_path / "dense")
    assert (models.EXPERTS, 2 * models.INTER, models.HIDDEN) in control.found
    path = models.write_checkpoint(tmp_path / "packed", kind, weights)
    with LargeTensors() as ours:
        model = dsv4_hf.from_pretrained(path)
    assert ours.found == []
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert type(model) is type(dense)


def test_quantizing_frees_the_floating_point_experts(weights):
    """After quantize_experts nothing holds the old parameters, and the model has none in their place."""
    model = models.dense_model("deepseek_v4", weights)
    old = [weakref.ref(p) for block in model.model.layers for p in block.mlp.experts.parameters()]
    assert len(old) == 2 * models.LAYERS
    dsv4_hf.quantize_experts(model)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]


def test_everything_else_is_loaded_unchanged(tmp_path, weights):
    """Router, shared expert, attention, buffers: bit for bit what Transformers loads."""
    dense = models.dense_model("deepseek_v4", weights)
    model = dsv4_hf.from_pretrained(models.write_checkpoint(tmp_path, "deepseek_v4", weights))
    expected = {name: t for name, t in dense.state_dict().items() if ".mlp.experts." not in name}
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, buffer in dense.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_dtype_of_the_rest_can_be_chosen(tmp_path, weights):
    """dtype=bfloat16 loads a model that computes in bf16 (on Transformers 5.17 too, whose norms would return fp32)."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights)
    model = dsv4_hf.from_pretrained(path, activation_format="bf16", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    out = models.logits(model, IDS)
    assert out.dtype == torch.bfloat16
    # bf16 everywhere: a few roundings of 2^-9 per layer in the residual stream, attention and head.
    assert models.relative_error(out, oracle_logits("deepseek_v4", weights)) < 0.05


def test_sharded_checkpoint(tmp_path, weights):
    """A checkpoint in several files with an index gives the logits of the single file."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights)
    single = models.logits(dsv4_hf.from_pretrained(path), IDS)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(3):
        part = {name: t for i, (name, t) in enumerate(sorted(tensors.items())) if i % 3 == shard}
        save_file(part, path / f"part-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(models.logits(dsv4_hf.from_pretrained(path), IDS), single)


# Missing input scales.


@pytest.mark.parametrize(("policy", "expected"), [("weight-only", ("bf16", "static")), ("dynamic", ("nvfp4", "token"))])
def test_policy_for_missing_input_scales(tmp_path, caplog, weights, policy, expected):
    """A checkpoint without input scales: refused for static scales unless the caller names what to do instead."""
    path = models.write_checkpoint(tmp_path, "qwen3_moe", weights, input_scales=None)
    with pytest.raises(CheckpointError, match="input_scale"):
        dsv4_hf.from_pretrained(path)
    with caplog.at_level(logging.WARNING, logger="dsv4"):
        model = dsv4_hf.from_pretrained(path, on_missing_input_scale=policy)
    assert "input_scale" in caplog.text
    for moe in dsv4_hf.experts_of(model).values():
        assert (moe.config.activation_format, moe.config.activation_scale) == expected
    models.logits(model, IDS)


def test_modes_that_need_no_input_scales_do_not_ask_for_them(tmp_path, weights):
    """W4A16 and token scales load a checkpoint without input scales as they are."""
    path = models.write_checkpoint(tmp_path, "qwen3_moe", weights, input_scales=None)
    for options in ({"activation_format": "bf16"}, {"activation_scale": "token"}):
        models.logits(dsv4_hf.from_pretrained(path, **options), IDS)


# Refusals.


def test_models_without_convertible_experts_are_refused(weights):
    """A dense model, a model quantized already, and experts with another activation."""
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ConfigError, match="not a mixture-of-experts model"):
        dsv4_hf.quantize_experts(LlamaForCausalLM(config))
    model = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights))
    with pytest.raises(ConfigError, match="already NVFP4"):
        dsv4_hf.quantize_experts(model)
    with pytest.raises(ConfigError, match=r"Qwen3MoeExperts does not compute silu"):
        dsv4_hf.quantize_experts(models.qwen3_moe(hidden_act="gelu"))


def test_bad_weights_name_the_module(weights):
    """A NaN among the floating-point weights is an error that names the experts module."""
    model = models.dense_model("qwen3_moe", weights)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts: l2_sf_stacked"):
        dsv4_hf.quantize_experts(model)


def test_unquantized_experts_are_refused(weights):
    """Choosing the implementation alone does not quantize: the forward pass says what to call."""
    model = models.dense_model("qwen3_moe", weights)
    model.set_experts_implementation("dsv4")
    with pytest.raises(StateError, match="quantize_experts"):
        models.logits(model, IDS)


def test_saving_is_refused(tmp_path, weights):
    """save_pretrained would leave the experts out, so it raises."""
    model = dsv4_hf.quantize_experts(models.dense_model("qwen3_moe", weights))
    with pytest.raises(StateError, match="leave out the NVFP4 experts"):
        model.save_pretrained(tmp_path)


def test_missing_weights_are_refused(tmp_path, weights):
    """A checkpoint without the embedding is an error, where Transformers would initialise it at random."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights of DeepseekV4ForCausalLM are missing.*embed_tokens"):
        dsv4_hf.from_pretrained(path)


def test_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path, weights):
    """More layers in config.json than in the file."""
    path = models.write_checkpoint(tmp_path, "qwen3_moe", weights)
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": None}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layer 2 .*only in layers \[0, 1\]"):
        dsv4_hf.from_pretrained(path)
