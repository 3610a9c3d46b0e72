"""What a contender must come near before its time counts: the routed-expert block in fp32, for some tokens of a call.

Weights are decoded expert by expert; gate, up and sums are fp32. The intermediate is rounded to bf16 once, and operands
are quantized where the contender quantizes them, so that what is left between the two is rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from dsv4.cli._layer import Call, Weights
from dsv4.nvfp4 import Nvfp4Tensor, finite_row_amax, global_scale, quantize_blocks


@dataclass(frozen=True)
class Activations:
    """How a contender represents the operands of its two products.

    Attributes:
        quantized: NVFP4; else bf16.
        l1: fp32, one global scale for all tokens; None: each token's own.
        l2: fp32 ``[E]``, one for each expert's rows; None: each row's own.
    """

    quantized: bool = False
    l1: Tensor | None = None
    l2: Tensor | None = None


BF16 = Activations()
TOKEN_SCALES = Activations(quantized=True)


def reference(weights: Weights, call: Call, rows: Tensor, limit: float | None, activations: Activations) -> Tensor:
    """The block's output for tokens ``rows`` of ``call``: fp32 ``[len(rows), H]``."""
    x = call.hidden_states[rows].float()
    ids, routing = call.topk_ids[rows], call.topk_weights[rows]
    if activations.quantized:
        x = _requantized(x, activations.l1)
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ _decoded(weights.l1, expert).T).chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        activated = (silu(gate) * up).bfloat16().float()
        if activations.quantized:
            activated = _requantized(activated, None if activations.l2 is None else activations.l2[expert])
        down = activated @ _decoded(weights.l2, expert).T
        out.index_add_(0, token, down * routing[token, choice, None])
    return out


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``; NaN where ``found`` has one."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _decoded(weights: Nvfp4Tensor, expert: int) -> Tensor:
    return Nvfp4Tensor(weights.codes[expert], weights.sf[expert], weights.gs[expert]).dequantize()


def _requantized(x: Tensor, gs: Tensor | None) -> Tensor:
    scale = (global_scale(finite_row_amax(x)) if gs is None else gs.expand(len(x))).unsqueeze(-1)
    return Nvfp4Tensor(*quantize_blocks(x, scale), scale).dequantize()
