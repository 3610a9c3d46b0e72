"""vLLM's two quantization methods for NVFP4 experts, with :class:`~dsv4.moe.Nvfp4MoE` behind them.

Creating parameters, loading them and calling the kernel are inherited; the names of the classes keep the part that
vLLM's weight loader looks for in them ("ModelOpt", "compressed").
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import nn
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as compressed_tensors,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from dsv4.errors import Dsv4Error
from dsv4.integrations.vllm import parameters
from dsv4.integrations.vllm.experts import Nvfp4Experts
from dsv4.integrations.vllm.parameters import Activations, LoadedWeights, Mode, ParameterNames
from dsv4.moe import Nvfp4MoE

_log = logging.getLogger("vllm.dsv4")


@dataclass(frozen=True)
class Plan:
    """What was settled about a layer before it has weights.

    Attributes:
        name: the layer's, for messages.
        activations: what is asked for.
        max_num_tokens: of one call; scratch is sized for it.
        swiglu_limit: the clamp, None for none.
        batch_invariant: vLLM was asked for batch invariance.
        dummy: weights come from vLLM's dummy loader.
    """

    name: str
    activations: Activations
    max_num_tokens: int
    swiglu_limit: float | None
    batch_invariant: bool
    dummy: bool


class _Nvfp4Method:
    """What both have in common, to be put before vLLM's class.

    Attributes:
        names: the layer's parameters.
        plan: see :class:`Plan`.
        nvfp4_moe: the layer, once its weights are loaded.
    """

    names: ParameterNames
    plan: Plan
    nvfp4_moe: Nvfp4MoE | None
    moe: Any  # vLLM's FusedMoEConfig

    supports_pre_processed_weights = False  # vLLM's own packed weights

    @classmethod
    def replacing(cls, method: Any, plan: Plan) -> Self:
        """A method with everything that vLLM's constructor made, without running it again."""
        ours = cls.__new__(cls)
        vars(ours).update(vars(method))
        vars(ours).update(plan=plan, nvfp4_moe=None, use_global_sf=False)  # input scales of local experts only
        return ours

    @property
    def supports_eplb(self) -> bool:
        """True: an expert is a row of every parameter, and is replaced in place."""
        return True

    @property
    def is_monolithic(self) -> bool:
        """False, whatever the kernel that vLLM would have chosen: routing stays vLLM's."""
        return False

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """vLLM's parameters, their scales filled with NaN: what the checkpoint lacks shall be seen."""
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        parameters.poison(layer, self.names)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig:
        """That activations arrive as they are; the rest is between the layer and its kernel."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the loaded weights, free vLLM's, warm up and make the kernel.

        At its peak this takes one layer's experts above what is kept. A second call (reloaded weights) packs in place.

        Raises:
            InputError: weights that are not complete or not valid; names the layer.
        """
        try:
            self._pack(layer)
        except Dsv4Error as error:
            raise type(error)(f"{self.plan.name}: {error}") from error
        moe = self.nvfp4_moe
        assert moe is not None
        moe.warmup()
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
            use_monolithic=False,
        )
        self.moe_kernel = mk.FusedMoEKernel(prepare_finalize, Nvfp4Experts(moe, self.moe, self.moe_quant_config))

    def _pack(self, layer: Any) -> None:
        if self.plan.dummy:
            parameters.fill_dummy(layer, self.names)
        weights = parameters.read(layer, self.names)
        mode = parameters.choose_mode(
            self.plan.activations, weights, experts_move=self.moe.moe_parallel_config.enable_eplb
        )
        if self.nvfp4_moe is None:
            self.nvfp4_moe = self._build(layer, weights, mode)
        name, moe = self.plan.name, self.nvfp4_moe
        moe.prepare_weights_from_stacked(
            **weights.arguments,
            l1_input_scale=weights.l1_input_scale if mode.static else None,
            l2_input_scale=weights.l2_input_scale if mode.static else None,
        )
        parameters.replace_packed(layer, self.names, moe.expert_tensors())
        if mode.reason:
            _log.warning("dsv4: %s: %s", name, mode.reason)
        _log.info("dsv4: %s: %d experts, %s, backend %s", name, moe.config.num_experts, mode, moe.backend_name)

    def _build(self, layer: Any, weights: LoadedWeights, mode: Mode) -> Nvfp4MoE:
        codes = weights.arguments["l2_fp4_stacked"]
        experts, hidden, half_inter = codes.shape
        return Nvfp4MoE(
            experts,
            hidden,
            2 * half_inter,
            self.plan.max_num_tokens,
            self.moe.experts_per_token,
            codes.device,
            activation_format=mode.activation_format,
            activation_scale=mode.activation_scale,
            l1_scale_policy=mode.l1_scale_policy,
            swiglu_limit=self.plan.swiglu_limit,
            batch_invariant=self.plan.batch_invariant,
            expert_map=layer.expert_map,
        )


class Dsv4ModelOptNvFp4FusedMoE(_Nvfp4Method, ModelOptNvFp4FusedMoE):
    """ModelOpt's layout; DeepSeek-V4's NVFP4 checkpoints and mixed-precision ones come here too."""

    names = parameters.MODELOPT


class Dsv4CompressedTensorsW4A4Nvfp4MoEMethod(_Nvfp4Method, compressed_tensors.CompressedTensorsW4A4Nvfp4MoEMethod):
    """compressed-tensors' layout."""

    names = parameters.COMPRESSED_TENSORS


METHODS: dict[type, type[_Nvfp4Method]] = {
    ModelOptNvFp4FusedMoE: Dsv4ModelOptNvFp4FusedMoE,
    compressed_tensors.CompressedTensorsW4A4Nvfp4MoEMethod: Dsv4CompressedTensorsW4A4Nvfp4MoEMethod,
}
"""vLLM's method -> ours. Subclasses of vLLM's may compute something else, and are left alone."""
