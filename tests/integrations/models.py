"""Tiny Transformers models whose experts are exactly NVFP4, checkpoints of them, and an oracle for their experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HIDDEN, INTER, EXPERTS, TOP_K, LAYERS, VOCAB = 64, 32, 4, 2, 2, 96
LIMIT = 0.75  # low enough that the clamp of DeepSeek-V4 is active on random data
NAMES = {
    "deepseek_v4": ("ffn", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclass(frozen=True)
class Matrix:
    """One NVFP4 matrix and its exact values."""

    codes: Tensor
    sf: Tensor
    gs: float

    @property
    def values(self) -> Tensor:
        """float32, exact: every factor is a small number times a power of two."""
        nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2).long()
        return E2M1[nibbles] * self.sf.float().repeat_interleave(16, dim=-1) * self.gs


def matrix(rows: int, columns: int, gs: float, g: torch.Generator) -> Matrix:
    """A matrix that quantizing its values gives back: each block has a 6, the first block the largest scale, and gs is
    a power of two."""
    nibbles = torch.randint(0, 16, (rows, columns // 16, 16), generator=g, dtype=torch.uint8)
    nibbles[nibbles == 8] = 0  # the sign of a zero is not a value
    nibbles[..., 0] = 7
    nibbles = nibbles.flatten(-2)
    sf = torch.randint(0x68, 0x7F, (rows, columns // 16), generator=g, dtype=torch.uint8)  # 64 to 448
    sf[0, 0] = 0x7E
    return Matrix(nibbles[:, ::2] | (nibbles[:, 1::2] << 4), sf.view(torch.float8_e4m3fn), gs)


def experts(seed: int, gate_up_gs: tuple[float, float] = (2.0**-14, 2.0**-14)) -> list[list[dict[str, Matrix]]]:
    """layer -> expert -> projection -> matrix."""
    g = torch.Generator().manual_seed(seed)
    return [
        [
            {
                "gate": matrix(INTER, HIDDEN, gate_up_gs[0], g),
                "up": matrix(INTER, HIDDEN, gate_up_gs[1], g),
                "down": matrix(HIDDEN, INTER, 2.0**-14, g),
            }
            for _ in range(EXPERTS)
        ]
        for _ in range(LAYERS)
    ]


def deepseek_v4(**changes) -> PreTrainedModel:
    """A DeepSeek-V4 model with a hash-routed and a learned layer."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "num_experts_per_tok": TOP_K,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": LIMIT,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "mlp_layer_types": ["hash_moe", "moe"],
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "sliding_window": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 512,
        "max_position_embeddings": 256,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**(config | changes))).eval()
    table = model.model.layers[0].mlp.gate.tid2eid  # zeros after initialisation: every token to expert 0
    table.copy_(torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(VOCAB)]))
    return model


def qwen3_moe(**changes) -> PreTrainedModel:
    """A Qwen3-MoE model: no shared expert, no clamp."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTER,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts_per_tok": TOP_K,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(config | changes))).eval()


BUILDERS = {"deepseek_v4": deepseek_v4, "qwen3_moe": qwen3_moe}


def dense_model(kind: str, weights, **changes) -> PreTrainedModel:
    """The model in float32 with ``weights`` decoded into its experts."""
    model = BUILDERS[kind](**changes)
    for layer, block in zip(weights, model.model.layers, strict=True):
        module = block.mlp.experts
        with torch.no_grad():
            for e, parts in enumerate(layer):
                module.gate_up_proj[e] = torch.cat((parts["gate"].values, parts["up"].values))
                module.down_proj[e] = parts["down"].values
    return model


def write_checkpoint(
    folder: Path, kind: str, weights, input_scales: tuple[float, float] | None = (2.0**-9, 2.0**-11), **changes
) -> Path:
    """``dense_model`` saved by Transformers, its experts then replaced by their NVFP4 tensors, by hand."""
    dense_model(kind, weights, **changes).save_pretrained(folder)
    block, projections = NAMES[kind]
    tensors = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if ".experts." not in name
    }
    for n, layer in enumerate(weights):
        for e, parts in enumerate(layer):
            for projection, part in parts.items():
                base = f"model.layers.{n}.{block}.experts.{e}.{projections[projection]}"
                tensors |= {
                    f"{base}.weight": part.codes,
                    f"{base}.weight_scale": part.sf,
                    f"{base}.weight_scale_2": torch.tensor(part.gs),
                }
                if input_scales is not None:
                    tensors[f"{base}.input_scale"] = torch.tensor(input_scales[projection == "down"])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "moe_quant_algo": "NVFP4", "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def oracle_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """W4A16 experts in float64 with dsv4's rounding points: bf16 in, bf16 before the second product, one at the end."""
    x = hidden_states.bfloat16().double()
    limit = getattr(self, "limit", None)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights.float().tolist(), strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            if not 0 <= e < self.num_experts:
                continue
            gate, up = (self.gate_up_proj[e].double() @ x[token]).chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            inner = (gate * torch.sigmoid(gate) * up).bfloat16().double()
            out[token] += weight * (self.down_proj[e].double() @ inner)
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("oracle_w4a16", oracle_forward)


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def sample_ids(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


IDS = sample_ids()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def oracle_logits(kind: str, weights, **changes) -> Tensor:
    """Logits on IDS with W4A16 experts in float64: see :func:`oracle_forward`."""
    model = dense_model(kind, weights, **changes)
    model.set_experts_implementation("oracle_w4a16")
    return logits(model, IDS)


def capture_experts(model: PreTrainedModel, layer: int, ids: Tensor = IDS):
    """Inputs and outputs of one layer's experts module in a forward pass."""
    seen = []
    hook = model.model.layers[layer].mlp.experts.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    logits(model, ids)
    hook.remove()
    return seen[0]
