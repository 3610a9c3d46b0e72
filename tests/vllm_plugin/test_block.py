"""The whole MoE block, as vLLM's models build it: its router and shared experts, our routed experts; and experts that
move."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.layer as fused_moe
from layer_cases import BAR, inputs
from oracle import OracleWeights, moe_layer, nearest_reference, random_weights, relative_l2
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from dsv4.integrations.vllm import moe_layers
from vllm_plugin import layers
from vllm_plugin.layers import NAME, Ranks

E, H, INTER, K = 4, 64, 32, 2


class SharedExperts(nn.Module):
    """Something that a model computes beside its routed experts."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.weight = torch.randn(H, H, generator=torch.Generator().manual_seed(0)).bfloat16().div(H).to(device)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def route(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    """Softmax, then the best; vLLM's own router is a CUDA kernel."""
    weights, ids = torch.softmax(gating_output.float(), dim=-1).topk(topk, dim=-1)
    return weights, ids.int()


def test_shared_experts_are_left_to_vllm(one_process, device, tmp_path):
    """The block of a model: routed experts by dsv4, shared experts by vLLM, each counted once."""
    config = layers.vllm_config(device.type)
    factory = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE  # its name before 0.28
    mapping: dict[str, Any] = {}
    if "expert_mapping" in inspect.signature(factory).parameters:
        names = ("gate_proj", "down_proj", "up_proj")
        mapping["expert_mapping"] = RoutedExperts.make_expert_params_mapping(
            nn.Module(), *names, E, routed_experts_prefix=""
        )
    shared, w = SharedExperts(device), random_weights(E, H, INTER, seed=1, split_gate_up=True)
    with set_current_vllm_config(config), device:
        block = factory(
            num_experts=E, top_k=K, hidden_size=H, intermediate_size=INTER, params_dtype=torch.bfloat16,
            quant_config=layers.quantization("modelopt"), prefix=NAME, custom_routing_function=route,
            shared_experts=shared, swiglu_limit=0.75, **mapping,
        )  # fmt: skip
    layers.load(block.routed_experts, layers.write_checkpoint(tmp_path / "w.safetensors", "modelopt", w))
    assert set(moe_layers(block)) == {"routed_experts"}
    x = inputs(23, H, K, E)[0]
    logits = torch.randn(23, E, generator=torch.Generator().manual_seed(1))
    with set_current_vllm_config(config), set_forward_context(None, config, num_tokens=len(x)):
        got = block(x.to(device), logits.to(device)).float().cpu()
    routed = moe_layer(
        x, *route(x, logits, K, True), w, activation_format="bf16", activation_scale="token", swiglu_limit=0.75
    )
    want = routed + (x.to(device) @ shared.weight).double().cpu().numpy()
    assert relative_l2(got, want) <= 2 * BAR  # two bf16 results are added, and the sum is rounded


def ranks_of_one_layer(
    layout: str, w: OracleWeights, scales: dict[str, Tensor], path: Path, device: torch.device
) -> Any:
    quant_config = layers.quantization(layout)
    file = layers.write_checkpoint(path / "w.safetensors", layout, w, **scales)
    result = []
    for rank in range(2):
        ranks = Ranks(ep=(2, rank), eplb=True)
        layer = layers.build(
            quant_config, experts=E, hidden=H, inter=INTER, top_k=K, device=device, ranks=ranks, limit=0.75
        )
        layers.load(layer, file)
        result.append(layer)
    return result


def test_experts_that_move(layout, device, tmp_path):
    """Rows of what vLLM's load balancer is given are experts: exchanged between ranks in place, input scales with them,
    the layers compute the new placement."""
    w = random_weights(E, H, INTER, seed=2, split_gate_up=True)
    # The same on each rank, different between ranks: a scale that stayed behind would show.
    l1, l2 = (layers.amax_scales(torch.tensor(values)) for values in ([10.0, 10, 1000, 1000], [0.5, 0.5, 50, 50]))
    scales = {"l1_input_scale": l1, "l2_input_scale": l2}
    here, there = ranks_of_one_layer(layout, w, scales, tmp_path, device)
    pointers = [t.data_ptr() for t in here.get_expert_weights()]
    for mine, other in zip(here.get_expert_weights(), there.get_expert_weights(), strict=True):
        assert mine.shape[0] == 2
        kept = mine[1].clone()
        mine[1].copy_(other[0])
        other[0].copy_(kept)
    assert [t.data_ptr() for t in here.get_expert_weights()] == pointers
    placement = [0, 2, 1, 3]  # expert 1 and expert 2 have changed places
    batch = inputs(29, H, K, E, seed=3)
    for rank, layer in enumerate((here, there)):
        held = placement[2 * rank : 2 * rank + 2]
        got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
        want = nearest_reference(
            got, *batch, layers.local(w, held), activation_format="nvfp4", activation_scale="static",
            l1_scale_policy="per_expert", l1_input_scale=l1[held], l2_input_scale=l2[held], swiglu_limit=0.75,
            start=2 * rank,
        )  # fmt: skip
        assert relative_l2(got, want) <= BAR


def test_weights_that_are_loaded_again(layout, device, tmp_path):
    """A second load, into parameters that vLLM puts back, packs in place: captured graphs would use the new weights."""
    first, second = (random_weights(E, H, INTER, seed=seed) for seed in (4, 5))
    layer = layers.build(layers.quantization(layout), experts=E, hidden=H, inter=INTER, top_k=K, device=device)
    layers.load(layer, layers.write_checkpoint(tmp_path / "1.safetensors", layout, first))
    pointers = {name: p.data_ptr() for name, p in layer.named_parameters()}
    layer._parameters.clear()
    with device:
        layer.quant_method.create_weights(
            layer, E, H, INTER, torch.bfloat16, weight_loader=layer.weight_loader, global_num_experts=E
        )
    layers.load(layer, layers.write_checkpoint(tmp_path / "2.safetensors", layout, second))
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == pointers
    batch = inputs(11, H, K, E)
    got = layers.run(layer, *(t.to(device) for t in batch)).float().cpu()
    assert relative_l2(got, moe_layer(*batch, second, activation_format="bf16", activation_scale="token")) <= BAR
