"""vLLM's container of routed experts, replaced by one that puts dsv4 behind NVFP4 weights."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from dsv4.errors import StateError
from dsv4.integrations.vllm.takeover import take_over


class Dsv4RoutedExperts(RoutedExperts):
    """vLLM's layer, whose quantization method goes through :func:`~dsv4.integrations.vllm.takeover.take_over`."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        return take_over(self, prefix, super()._get_quant_method(prefix, quant_config, moe_config))

    def update_expert_map(self) -> None:
        """vLLM's, when it scales the number of ranks (elastic EP).

        Raises:
            StateError: the experts of this rank change, and dsv4 has packed the old ones.
        """
        before = self._expert_map
        super().update_expert_map()
        after = self._expert_map
        same = before is after or (before is not None and after is not None and torch.equal(before, after))
        if not same and getattr(self.quant_method, "nvfp4_moe", None) is not None:
            raise StateError(
                f"{self.layer_name}: the experts of this rank changed, which packed NVFP4 experts cannot follow: "
                f"restart vLLM with the new number of ranks, or with DSV4_VLLM=0"
            )


def install() -> str | None:
    """Register the class with vLLM, once. Returns why not, if another plug-in was first."""
    name = RoutedExperts.__name__
    present = op_registry_oot.get(name)
    if present is None:
        RoutedExperts.register_oot(Dsv4RoutedExperts)
    elif present is not Dsv4RoutedExperts:
        return f"{name} was replaced by another plug-in already ({present.__module__}.{present.__qualname__})"
    return None
