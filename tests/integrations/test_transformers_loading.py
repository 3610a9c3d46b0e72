"""NVFP4 experts in Transformers models: memory, checkpoints as they come, and what is refused."""

from __future__ import annotations

import gc
import json
import logging
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import dsv4.integrations.transformers as dsv4_hf
from dsv4.errors import CheckpointError, ConfigError, InputError, StateError

from . import models

KINDS = pytest.mark.parametrize("kind", list(models.BUILDERS))
IDS = models.IDS


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
    assert models.relative_error(out, models.oracle_logits("deepseek_v4", weights)) < 0.05


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


FP8_NAMES = re.compile(r".*(attn\.(wq_a|wq_b|wkv|wo_b)|shared_experts\.w[123])\.weight")


def write_fp8_rest(path, block: int = 32):
    """Put attention and shared experts into FP8 blocks and the rest into bf16, as releases have them.

    Returns the values of what is now FP8.
    """
    tensors = load_file(path / "model.safetensors")
    values = {}
    for name in [name for name in tensors if FP8_NAMES.fullmatch(name)]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // block, block, columns // block, block)
        scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / 448)))
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.reshape(rows, columns)
        tensors[name.replace(".weight", ".scale")] = scale
        values[name] = (codes.float() * scale[:, None, :, None]).reshape(rows, columns)
    for name, tensor in tensors.items():
        if ".experts." not in name and not name.endswith(".scale") and tensor.dtype == torch.float32:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] |= {"weight_block_size": [block, block], "activation_scheme": "dynamic"}
    (path / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, that quantizer keeps FP8 for it")
def test_rest_of_the_model_in_fp8(tmp_path, weights):
    """The rest in FP8 blocks under the same quantization_config goes through Transformers' own FP8 quantizer."""
    pytest.importorskip("accelerate")  # which that quantizer needs
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights)
    values = write_fp8_rest(path)
    model = dsv4_hf.from_pretrained(path, activation_scale="token")
    loaded = model.model.layers[1].mlp.shared_experts.gate_proj.weight
    assert torch.equal(loaded, values["model.layers.1.ffn.shared_experts.w1.weight"].bfloat16())
    assert sorted(dsv4_hf.experts_of(model)) == [0, 1]
    assert models.logits(model, IDS).isfinite().all()


def test_fp8_without_its_configuration_is_refused(tmp_path, weights):
    """FP8 tensors and no quant_method "fp8": their scales would be left out, so this is an error."""
    path = models.write_checkpoint(tmp_path, "deepseek_v4", weights)
    write_fp8_rest(path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "modelopt"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"stored in FP8.*'modelopt'"):
        dsv4_hf.from_pretrained(path)


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


def test_experts_that_are_quantized_otherwise_are_refused(weights):
    """Experts with scales beside their weights, or in FP8, would be read as if they were plain values."""
    model = models.dense_model("qwen3_moe", weights)
    module = model.model.layers[0].mlp.experts
    module.gate_up_proj_scale_inv = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match="gate_up_proj_scale_inv"):
        dsv4_hf.quantize_experts(model)
    del module.gate_up_proj_scale_inv
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        dsv4_hf.quantize_experts(model)


def test_checkpoint_without_a_configuration_is_refused(tmp_path, weights):
    """Tensors alone make no model."""
    path = models.write_checkpoint(tmp_path, "qwen3_moe", weights)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: expected a model configuration"):
        dsv4_hf.from_pretrained(path)


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
    with pytest.raises(CheckpointError, match=r"config\.json: num_hidden_layers is 3, .* 2 layers"):
        dsv4_hf.from_pretrained(path)
