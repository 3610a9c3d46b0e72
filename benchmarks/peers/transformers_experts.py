"""Transformers' ``DeepseekV4Experts`` on bf16 weights, in the implementations that a CUDA graph can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from harness import Contender, Outputs
from reference import BF16

from dsv4.cli._layer import Call
from peers.base import Setup, Unavailable

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
"""``eager`` asks the host which experts have tokens, and the others are downloaded: none of these can be captured."""

GATHER_LIMIT = 4 << 30
"""``batched_mm`` copies an expert's weights for every slot; above this many bytes it is left out."""


class TransformersExperts:
    """One module an implementation, over the same weights."""

    def __init__(self, setup: Setup):
        try:
            from transformers import DeepseekV4Config, __version__
            from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
        except ImportError as error:
            raise Unavailable(f"Transformers has no deepseek_v4: {error}") from error
        shape = self._shape = setup.shape
        gate_up, down = (torch.nn.Parameter(w, requires_grad=False) for w in setup.bf16_weights)
        self._modules = {}
        for implementation in IMPLEMENTATIONS:
            config = DeepseekV4Config(
                hidden_size=shape.hidden_size,
                moe_intermediate_size=shape.intermediate_size,
                n_routed_experts=shape.num_experts,
                num_experts_per_tok=shape.top_k,
                swiglu_limit=math.inf if shape.swiglu_limit is None else shape.swiglu_limit,
            )
            config._experts_implementation = implementation
            with torch.device("meta"):
                experts = DeepseekV4Experts(config)
            experts.gate_up_proj, experts.down_proj = gate_up, down
            self._modules[implementation] = experts.eval()
        self.facts: dict[str, Any] = {"version": __version__, "weights": "bf16", "tried": list(IMPLEMENTATIONS)}

    def contenders(self, calls: Sequence[Call]) -> list[Contender]:
        tokens = len(calls[0].hidden_states)
        shape = self._shape
        gathered = 2 * tokens * shape.top_k * 2 * shape.intermediate_size * shape.hidden_size

        def contender(implementation: str) -> Contender:
            module = self._modules[implementation]

            def run(index: int) -> Outputs:
                call = calls[index]
                with torch.no_grad():
                    return (module(call.hidden_states, call.topk_ids, call.topk_weights),)

            return Contender(f"transformers-{implementation}", run, BF16, weight_bytes=2)

        chosen = [name for name in IMPLEMENTATIONS if name != "batched_mm" or gathered <= GATHER_LIMIT]
        return [contender(name) for name in chosen]
