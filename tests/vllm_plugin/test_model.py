"""A whole model: vLLM's engine configuration, its model class, its loader; attention is the one thing not run here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from layer_cases import BAR, inputs
from oracle import OracleWeights, nearest_reference, relative_l2
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform

from dsv4.integrations.vllm import moe_layers
from vllm_plugin import layers

HIDDEN, INTER, EXPERTS, LAYERS = 64, 32, 8, 2


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Qwen3-MoE checkpoint of the benchmark, small."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "benchmarks")])
    import vllm_generate

    heads = {"HEADS": 2, "KV_HEADS": 2, "HEAD_DIM": 32}
    sizes = {"HIDDEN": HIDDEN, "INTER": INTER, "EXPERTS": EXPERTS, "VOCAB": 64, **heads}
    for name, value in sizes.items():
        monkeypatch.setattr(vllm_generate, name, value)
    vllm_generate.make_checkpoint(tmp_path / "model", LAYERS, torch.device("cpu"))
    return tmp_path / "model"


@pytest.fixture
def config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """What ``LLM(model)`` makes of it; on a machine without a GPU, of a platform that vLLM does not know."""
    if layers.DEVICES[-1] == "cpu":
        monkeypatch.setattr(type(current_platform), "device_type", "cpu")
        backend = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
        monkeypatch.setattr(type(current_platform), "get_attn_backend_cls", lambda *_, **__: backend)
    arguments = EngineArgs(
        str(checkpoint), skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4, attention_backend="TRITON_ATTN"
    )
    return arguments.create_engine_config()


def test_a_whole_qwen3_moe(config, checkpoint, one_process):
    """Every MoE layer of the loaded model is ours, and computes the checkpoint's experts; vLLM builds models under a
    default dtype of bf16 and a default device, and its loader goes through the model's own names."""
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
    found = moe_layers(model)
    assert len(found) == LAYERS
    tensors = load_file(checkpoint / "model.safetensors")
    device = next(model.parameters()).device
    batch = inputs(21, HIDDEN, 8, EXPERTS)
    for number, (name, moe) in enumerate(found.items()):
        assert f"layers.{number}." in name
        assert moe.config.activation_scale == "static"

        def stack(suffix: str, *projections: str, number: int = number) -> list[torch.Tensor]:
            prefix = f"model.layers.{number}.mlp.experts"
            return [
                torch.stack([tensors[f"{prefix}.{e}.{projection}.{suffix}"] for e in range(EXPERTS)])
                for projection in projections
            ]

        l1 = ("gate_proj", "up_proj")
        w = OracleWeights(
            torch.cat(stack("weight", *l1), dim=1),
            torch.cat([sf.view(torch.uint8) for sf in stack("weight_scale", *l1)], dim=1),
            torch.stack(stack("weight_scale_2", *l1), dim=1),
            *stack("weight", "down_proj"),
            *stack("weight_scale", "down_proj"),
            *stack("weight_scale_2", "down_proj"),
        )
        got = layers.run(model.get_submodule(name), *(t.to(device) for t in batch), config=config).float().cpu()
        want = nearest_reference(
            got, *batch, w, activation_format="nvfp4", activation_scale="static",
            l1_input_scale=stack("input_scale", "up_proj")[0], l2_input_scale=stack("input_scale", "down_proj")[0],
        )  # fmt: skip
        assert relative_l2(got, want) <= BAR
