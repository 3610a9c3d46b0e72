"""One layer with random weights, and random calls to it, for timing.

Weights are drawn in their encoded form: all codes equally likely, block scales spread over two powers of two, global
scales such that an input of order 1 gives outputs of order 1. Zeros, which some hardware multiplies faster, are as
rare as in real weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv4.cli._modes import Mode
from dsv4.cli._shapes import LayerShape
from dsv4.moe import Nvfp4MoE
from dsv4.nvfp4 import BLOCK, Nvfp4Tensor

RoutingKind = Literal["uniform", "zipf"]

_CODE_RMS = 3.4  # root mean square of e2m1 * sf, as drawn here


@dataclass(frozen=True)
class Weights:
    """NVFP4 weights of all experts.

    Attributes:
        l1: ``[E, 2I, H]``, rows of gate, then of up; one global scale an expert, ``[E, 1, 1]``.
        l2: ``[E, H, I]``, likewise.
    """

    l1: Nvfp4Tensor
    l2: Nvfp4Tensor


def random_weights(shape: LayerShape, device: torch.device, seed: int = 0) -> Weights:
    """Weights for ``shape``."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> Nvfp4Tensor:
        def random_bytes(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high, size, dtype=torch.uint8, device=device, generator=generator)

        experts = shape.num_experts
        codes = random_bytes(0, 256, experts, rows, columns // 2)
        sf = random_bytes(0x30, 0x41, experts, rows, columns // BLOCK).view(torch.float8_e4m3fn)  # 0.5 to 2
        gs = torch.full((experts, 1, 1), 1 / (_CODE_RMS * columns**0.5), device=device)
        return Nvfp4Tensor(codes, sf, gs)

    return Weights(
        draw(2 * shape.intermediate_size, shape.hidden_size), draw(shape.hidden_size, shape.intermediate_size)
    )


@dataclass(frozen=True)
class Call:
    """The arguments of one ``Nvfp4MoE.run``.

    Attributes:
        hidden_states: bf16 ``[T, H]``.
        topk_weights: fp32 ``[T, k]``.
        topk_ids: int64 ``[T, k]``, distinct in a row.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    @property
    def active_experts(self) -> int:
        """How many experts any token goes to."""
        return int(self.topk_ids.unique().numel())


def random_call(shape: LayerShape, tokens: int, kind: RoutingKind, device: torch.device, seed: int) -> Call:
    """Normal hidden states, and a routing of ``kind`` whose weights sum to 1.5 for each token, as V4-Flash's do."""
    generator = torch.Generator().manual_seed(seed)
    ids = random_topk_ids(tokens, shape.num_experts, shape.top_k, kind, generator)
    scores = torch.rand(tokens, shape.top_k, generator=generator) + 0.1
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator)
    return Call(
        hidden.to(device, torch.bfloat16),
        (1.5 * scores / scores.sum(dim=1, keepdim=True)).to(device),
        ids.to(device),
    )


def random_topk_ids(tokens: int, num_experts: int, top_k: int, kind: RoutingKind, generator: torch.Generator) -> Tensor:
    """Distinct experts for each token: int64 ``[T, k]``.

    ``"uniform"``: all experts are equally popular. ``"zipf"``: the n-th most popular expert is drawn with probability
    proportional to 1/n, which is about as skewed as routing in trained models gets; which expert is the n-th is random.
    """
    popularity = torch.ones(num_experts)
    if kind == "zipf":
        popularity = 1 / torch.arange(1, num_experts + 1)[torch.randperm(num_experts, generator=generator)]
    # The k largest of log p + Gumbel noise are a draw of k without replacement.
    uniform = torch.rand(tokens, num_experts, generator=generator).clamp_(min=1e-20)
    return (popularity.log() - (-uniform.log()).log()).topk(top_k, dim=1).indices


def build_layer(
    shape: LayerShape, weights: Weights, mode: Mode, max_tokens: int, device: torch.device, backend: str = "auto"
) -> Nvfp4MoE:
    """A warmed-up layer in ``mode``. Static activation scales are calibrated on one random call."""
    layer = Nvfp4MoE(
        shape.num_experts,
        shape.hidden_size,
        shape.intermediate_size,
        max_tokens,
        shape.top_k,
        device,
        backend=backend,
        activation_format=mode.activation_format,
        activation_scale=mode.activation_scale,
        swiglu_limit=shape.swiglu_limit,
    )
    layer.prepare_weights_from_stacked(
        weights.l1.codes,
        weights.l1.sf,
        weights.l1.gs.flatten(),
        weights.l2.codes,
        weights.l2.sf,
        weights.l2.gs.flatten(),
    )
    if mode.activation_format == "nvfp4" and mode.activation_scale == "static":
        sample = random_call(shape, min(max_tokens, 64), "uniform", device, seed=1 << 20)
        layer.compute_activation_global_scales(sample.hidden_states, sample.topk_weights, sample.topk_ids)
    layer.warmup()
    return layer
