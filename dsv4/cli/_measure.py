"""What ``dsv4 bench`` measures: one layer, in several modes, for several numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsv4.cli._layer import Call, RoutingKind, build_layer, random_call, random_weights
from dsv4.cli._machine import cpu_model, free_memory, versions
from dsv4.cli._modes import MODES
from dsv4.cli._output import human_bytes
from dsv4.cli._shapes import LayerShape
from dsv4.cli._timing import Contender, Timing, compare, graphed
from dsv4.errors import ConfigError
from dsv4.moe import Nvfp4MoE

NVFP4_BYTES = 0.5 + 1 / 16
"""Bytes of a weight: 4 bits, and its share of a block scale."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        shape: of the layer.
        modes: keys of :data:`dsv4.cli._modes.MODES`.
        tokens: numbers of tokens, T.
        routing: how tokens spread over experts.
        device: where.
        backend: ``"auto"`` or a backend's name.
        inputs: how many different calls rotate.
        seconds: to spend on each mode and number of tokens, at least.
    """

    shape: LayerShape
    modes: Sequence[str]
    tokens: Sequence[int]
    routing: RoutingKind
    device: torch.device
    backend: str = "auto"
    inputs: int = 8
    seconds: float = 2.0


def measure(plan: Plan) -> dict[str, Any]:
    """Everything ``plan`` asks for, as one JSON document.

    Raises:
        ConfigError: more memory is needed than there is, or a setting is not allowed.
        BackendError: no backend can run it.
    """
    shape, device = plan.shape, plan.device
    _check_memory(plan)
    weights = random_weights(shape, device)
    layers = {
        name: build_layer(shape, weights, MODES[name], max(plan.tokens), device, plan.backend) for name in plan.modes
    }
    del weights
    points = []
    for tokens in plan.tokens:
        calls = [random_call(shape, tokens, plan.routing, device, seed) for seed in range(plan.inputs)]
        contenders = {name: _contender(layer, calls) for name, layer in layers.items()}
        for name, timing in compare(contenders, plan.inputs, device, plan.seconds).items():
            points.append({"mode": name, "tokens": tokens, **_rates(shape, layers[name], calls, timing)})
    return {
        "shape": asdict(shape),
        "routing": plan.routing,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions(),
        "modes": {name: _mode(shape, layer) for name, layer in layers.items()},
        "results": points,
    }


def _check_memory(plan: Plan) -> None:
    """The weights as drawn, and each layer's packed copy. Running out of memory would end the process, not raise."""
    needed = (1 + len(plan.modes)) * plan.shape.num_experts * plan.shape.expert_parameters * NVFP4_BYTES
    free = free_memory(plan.device)
    if free is not None and needed > free:
        raise ConfigError(
            f"{plan.shape}: {len(plan.modes)} mode(s) need about {human_bytes(needed)} on {plan.device}, which has "
            f"{human_bytes(free)} free: measure fewer modes at a time, or fewer experts (--experts)"
        )


def _contender(layer: Nvfp4MoE, calls: Sequence[Call]) -> Contender:
    def run(index: int) -> torch.Tensor:
        call = calls[index]
        return layer.run(call.hidden_states, call.topk_weights, call.topk_ids)

    return graphed(run, len(calls)) if layer.device.type == "cuda" else run


def _rates(shape: LayerShape, layer: Nvfp4MoE, calls: Sequence[Call], timing: Timing) -> dict[str, float]:
    active = sum(call.active_experts for call in calls) / len(calls)
    seconds = timing.median_us / 1e6
    return {
        **timing.as_dict(),
        "active_experts": round(active, 2),
        "weight_gb_per_s": round(active / shape.num_experts * layer.weight_nbytes / seconds / 1e9, 3),
        "gflop_per_s": round(shape.flops(len(calls[0].topk_ids)) / seconds / 1e9, 3),
    }


def _mode(shape: LayerShape, layer: Nvfp4MoE) -> dict[str, Any]:
    return {
        "backend": layer.backend_name,
        "weight_bytes": layer.weight_nbytes,
        "weight_bytes_bf16": shape.bf16_bytes,
        "workspace_bytes": layer.workspace_nbytes,
    }
