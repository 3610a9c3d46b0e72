"""The kernel object that vLLM's modular MoE kernel calls: :class:`~dsv4.moe.Nvfp4MoE` in vLLM's terms."""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from dsv4.moe import Nvfp4MoE


class Nvfp4Experts(mk.FusedMoEExpertsModular):
    """From unquantized tokens and global expert ids to the weighted sum of the local experts.

    The scratch is dsv4's workspace, not vLLM's: it is sized once, for the largest call, so that graphs captured at one
    size and layers run at another see the same addresses, and it is in use before vLLM measures how much memory is left
    for the KV cache. vLLM's is asked for the result alone.
    """

    def __init__(self, moe: Nvfp4MoE, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig):
        super().__init__(moe_config, quant_config)
        self._moe = moe

    # What vLLM's selection would ask. It does not: the layers are chosen in dsv4.integrations.vllm.takeover.

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_batched_activation_format

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def supports_expert_map(self) -> bool:
        return True

    # Computing.

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True: what is quantized, and with which scales, differs from any of vLLM's schemes."""
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def moe_problem_size(self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
        """E, M, N, K, top-k; the packed weights do not tell N."""
        config = self._moe.config
        return config.num_experts, a1.shape[0], 2 * config.intermediate_size, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the result of bf16 ``hidden_states [M, H]`` to ``output [M, H]``.

        The layer's own weights and expert map are used; those in the arguments are the same. More tokens than the layer
        has scratch for (data-parallel ranks gather theirs) are cut into pieces.
        """
        if apply_router_weight_on_input:  # they are in the hidden states already
            topk_weights = torch.ones_like(topk_weights)
        topk_weights = topk_weights.float()
        size = self._moe.config.max_num_tokens
        for start in range(0, hidden_states.shape[0], size):
            rows = slice(start, start + size)
            self._moe.run(hidden_states[rows], topk_weights[rows], topk_ids[rows], out=output[rows])
