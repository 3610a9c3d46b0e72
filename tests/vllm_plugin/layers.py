"""Real vLLM layers of routed experts, built from vLLM's configurations and filled by vLLM's loaders.

What a machine without a GPU needs is done in :func:`start` and nowhere else: vLLM's selection of an NVFP4 kernel, which
the plug-in lets run first, must find one (Marlin's, which is not called then), and vLLM's scratch manager may not look
for an accelerator's allocator.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm.model_executor.parameter as vllm_parameter
from oracle import OracleWeights, as_numpy
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.plugins import load_general_plugins
from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager

NAME = "model.layers.0.mlp.experts"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
SUFFIXES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def start() -> None:
    """Make vLLM run on this machine and load its plug-ins, as each of its processes does."""
    if not torch.cuda.is_available():
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts

        MarlinExperts._supports_current_device = staticmethod(lambda: True)
        torch.accelerator.empty_cache = lambda: None
    init_workspace_manager(torch.device(DEVICES[-1]))
    # Results lie in vLLM's workspace, which cannot grow inside a capture: vLLM's profile run has grown it before.
    current_workspace_manager().get_simultaneous(((1 << 20,), torch.bfloat16))
    load_general_plugins()


@dataclass(frozen=True)
class Ranks:
    """This rank among those that share a layer.

    Attributes:
        ep: (size, rank) of expert parallelism.
        tp: (size, rank) of tensor parallelism.
        eplb: the load balancer may move experts.
    """

    ep: tuple[int, int] = (1, 0)
    tp: tuple[int, int] = (1, 0)
    eplb: bool = False

    def parallel(self, all2all: str = "allgather_reducescatter", dp: int = 1) -> FusedMoEParallelConfig:
        """In vLLM's terms."""
        return FusedMoEParallelConfig(
            tp_size=self.tp[0], tp_rank=self.tp[1], pcp_size=1, pcp_rank=0, dp_size=dp, dp_rank=0,
            ep_size=self.ep[0], ep_rank=self.ep[1], sp_size=1, use_ep=self.ep[0] > 1,
            all2all_backend=all2all, enable_eplb=self.eplb,
        )  # fmt: skip


ALONE = Ranks()


@cache
def vllm_config(device: str, max_num_batched_tokens: int = 64) -> VllmConfig:
    """The configuration that layers are built and run under."""
    config = VllmConfig(device_config=DeviceConfig(device=device))
    config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
    return config


def quantization(layout: str, *, weight_only: bool = False) -> Any:
    """What vLLM makes of a checkpoint's ``quantization_config``."""
    if layout == "modelopt":
        algorithm = "W4A16_NVFP4" if weight_only else "NVFP4"
        section = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": [], "kv_cache_quant_algo": None}
        return ModelOptNvFp4Config.from_config({"quant_method": "modelopt", "quantization": section})
    tensor = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "format": "nvfp4-pack-quantized",
        "weights": {**tensor, "dynamic": False},
        "input_activations": None if weight_only else {**tensor, "dynamic": "local"},
        "output_activations": None,
    }
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [],
        }
    )


def build(
    quant_config: Any,
    *,
    experts: int,
    hidden: int,
    inter: int,
    top_k: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    config: VllmConfig | None = None,
    parallel: FusedMoEParallelConfig | None = None,
    activation: MoEActivation = MoEActivation.SILU,
    dtype: torch.dtype = torch.bfloat16,
    moe_backend: str = "auto",
    limit: float | None = None,
    on_input: bool = False,
    **settings: Any,
) -> RoutedExperts:
    """A layer without weights, as vLLM's model code builds it; ``experts`` and ``inter`` are those of all ranks."""
    config = config or vllm_config(device.type)
    parallel = parallel or ranks.parallel()
    tokens = config.scheduler_config.max_num_batched_tokens
    manager = ExpertMapManager(
        max_num_batched_tokens=tokens, top_k=top_k, global_num_experts=experts, num_redundant_experts=0,
        num_expert_group=None, moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=ranks.eplb,
    )  # fmt: skip
    moe = FusedMoEConfig(
        num_experts=experts, experts_per_token=top_k, hidden_dim=hidden, intermediate_size=inter,
        num_local_experts=manager.local_num_experts, num_logical_experts=experts, activation=activation,
        device=device, routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, in_dtype=dtype,
        moe_backend=moe_backend, max_num_tokens=tokens, swiglu_limit=limit, **settings,
    )  # fmt: skip
    mapping: dict[str, Any] = {}
    if "expert_mapping" in inspect.signature(RoutedExperts.__init__).parameters:  # later versions make their own
        gate, up, down = PROJECTIONS
        mapping["expert_mapping"] = RoutedExperts.make_expert_params_mapping(
            torch.nn.Module(), gate, down, up, experts, routed_experts_prefix=""
        )
    vllm_parameter.get_tensor_model_parallel_rank = lambda: ranks.tp[1]
    vllm_parameter.get_tensor_model_parallel_world_size = lambda: ranks.tp[0]
    with set_current_vllm_config(config), device:
        return RoutedExperts(
            NAME, torch.bfloat16, moe, quant_config, expert_map_manager=manager, swiglu_limit=limit,
            apply_router_weight_on_input=on_input, **mapping,
        )  # fmt: skip


def write_checkpoint(
    path: Path,
    layout: str,
    w: OracleWeights,
    l1_input_scale: Tensor | None = None,
    l2_input_scale: Tensor | None = None,
    leave_out: Iterable[str] = (),
) -> Path:
    """The experts as a safetensors file with the names of ``layout``, one matrix of one expert after the other.

    Args:
        l1_input_scale, l2_input_scale: fp32 ``[E]``, multipliers; none are written if None.
        leave_out: endings of names that are not written.
    """
    experts, inter = len(w.l2_fp4), w.l1_fp4.shape[1] // 2
    weight, block, scale, input_scale = SUFFIXES[layout]
    l1_gs = torch.as_tensor(w.l1_gs).reshape(experts, -1).expand(experts, 2)

    def stored(value: Tensor) -> Tensor:
        return value.clone() if layout == "modelopt" else (1.0 / value).reshape(1)

    tensors: dict[str, Tensor] = {}
    for e in range(experts):
        rows = {"gate_proj": slice(0, inter), "up_proj": slice(inter, 2 * inter)}
        parts = {p: (w.l1_fp4[e, r], w.l1_sf[e, r], l1_gs[e, i]) for i, (p, r) in enumerate(rows.items())}
        parts["down_proj"] = (w.l2_fp4[e], w.l2_sf[e], w.l2_gs[e])
        for projection, (codes, sf, gs) in parts.items():
            name = f"{NAME}.{e}.{projection}"
            tensors |= {f"{name}.{weight}": codes, f"{name}.{block}": sf, f"{name}.{scale}": stored(gs)}
            given = l2_input_scale if projection == "down_proj" else l1_input_scale
            if given is not None:
                tensors[f"{name}.{input_scale}"] = stored(given[e])
    leave_out = tuple(leave_out)
    kept = {n: t.contiguous() for n, t in tensors.items() if not leave_out or not n.endswith(leave_out)}
    save_file(kept, path)
    return path


def load(layer: RoutedExperts, path: Path) -> None:
    """Through vLLM's file iterator and the layer's own loader, then vLLM's step after loading."""
    files = safetensors_weights_iterator([str(path)], use_tqdm_on_load=False)
    list(layer.load_weights((name.removeprefix(f"{NAME}."), tensor) for name, tensor in files))
    layer.quant_method.process_weights_after_loading(layer)


def run(layer: RoutedExperts, x: Tensor, weights: Tensor, ids: Tensor, config: VllmConfig | None = None) -> Tensor:
    """One forward pass behind the router, ids in the dtype of vLLM's routers."""
    config = config or vllm_config(x.device.type)
    with set_current_vllm_config(config), set_forward_context(None, config, num_tokens=len(x)):
        return layer.forward_modular(x, weights, ids.int())


def shard(w: OracleWeights, tp: tuple[int, int]) -> OracleWeights:
    """A tensor-parallel rank's part of the weights: rows of gate and of up, columns of down."""
    size, rank = tp
    inter = w.l1_fp4.shape[1] // 2

    def rows(t: Tensor) -> Tensor:
        gate, up = (half.chunk(size, dim=1)[rank] for half in t.view(torch.uint8).split(inter, dim=1))
        return torch.cat((gate, up), dim=1)

    def columns(t: Tensor) -> Tensor:
        return t.view(torch.uint8).chunk(size, dim=2)[rank]

    return OracleWeights(rows(w.l1_fp4), rows(w.l1_sf), w.l1_gs, columns(w.l2_fp4), columns(w.l2_sf), w.l2_gs)


def local(w: OracleWeights, ids: Iterable[int]) -> OracleWeights:
    """Some experts, in that order."""
    chosen = list(ids)
    return OracleWeights(*(t[chosen] for t in vars(w).values()))


def amax_scales(values: Any) -> Tensor:
    """Input scales of activations up to ``values``, fp32."""
    return torch.from_numpy((as_numpy(values) / 2688).astype(np.float32))
