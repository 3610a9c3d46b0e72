"""torch's own grouped product on bf16 weights: the two products alone, on rows that are sorted already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness import Contender, Outputs
from reference import BF16, relative_error
from torch import Tensor
from torch.nn.functional import silu

from dsv4.cli._layer import Call
from peers.base import Setup, Unavailable


class GroupedMM:
    """Sorting, SwiGLU and combine are done beforehand or afterwards, untimed."""

    def __init__(self, setup: Setup):
        product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if product is None:
            raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
        self._product = product
        self._shape = setup.shape
        self._l1, self._l2 = (w.transpose(1, 2) for w in setup.bf16_weights)
        self.facts: dict[str, Any] = {"timed": "the two products", "weights": "bf16"}

    def contenders(self, calls: Sequence[Call]) -> list[Contender]:
        prepared = [self._prepare(call) for call in calls]

        def run(index: int) -> Outputs:
            rows, ends, activated, _ = prepared[index]
            return self._product(rows, self._l1, offs=ends), self._product(activated, self._l2, offs=ends)

        def result(index: int, outputs: Outputs) -> Tensor:
            _, _, activated, order = prepared[index]
            # The second product was given SwiGLU of an earlier first product: it must be that of this one too.
            if not relative_error(self._swiglu(outputs[0]), activated) < 1e-3:
                return outputs[1].new_full(calls[index].hidden_states.shape, torch.nan)
            weights = calls[index].topk_weights
            slots = torch.empty_like(outputs[1], dtype=torch.float32)
            slots[order] = outputs[1].float()
            return (slots.unflatten(0, weights.shape) * weights.unsqueeze(-1)).sum(dim=1)

        return [Contender("grouped-mm", run, BF16, weight_bytes=2, result=result)]

    def _prepare(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sorted rows, each expert's end, the second product's operand, and the slot of each row."""
        ids, order = call.topk_ids.flatten().sort(stable=True)
        ends = torch.bincount(ids, minlength=self._shape.num_experts).cumsum(0).int()
        rows = call.hidden_states[order // self._shape.top_k]
        return rows, ends, self._swiglu(self._product(rows, self._l1, offs=ends)), order

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        limit = self._shape.swiglu_limit
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (silu(gate) * up).bfloat16()
