#!/usr/bin/env python3
"""One layer on the CPU, beside Transformers' own experts in bf16.

    python benchmarks/cpu_layer.py [--threads N] [--seconds S] [--output FILE]

The peer is ``DeepseekV4Experts`` with the same weights, decoded to bf16, in each of its implementations that this
machine can run; it is judged by the fastest. All contenders take turns call by call in one process, on the same
rotating inputs and routings. Our results are compared with the peer's before anything is timed. Before a number is
quoted: nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tables import cpu_layer_table
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from dsv4 import Nvfp4MoE
from dsv4.cli._layer import Call, Weights, build_layer, random_call, random_weights
from dsv4.cli._machine import cpu_model, versions
from dsv4.cli._modes import MODES
from dsv4.cli._output import dumps, write_text
from dsv4.cli._shapes import SHAPES, LayerShape
from dsv4.cli._timing import compare

ROOT = Path(__file__).resolve().parent.parent
SHAPE = SHAPES["small"]
OURS = ("w4a16", "w4a4-token")
PEERS = ("eager", "batched_mm", "grouped_mm")
TARGETS = {1: 4.0, 32: 4.0, 512: 3.0}
"""Tokens a call -> the most times as long as the peer that ours may take."""

WEIGHT_TARGET = 0.3
"""The largest share of the peer's weight memory that ours may take."""

GATHER_LIMIT = 2 << 30
"""``batched_mm`` copies an expert's weights for every slot; above this many bytes it is left out."""

INPUTS = 8
CPU = torch.device("cpu")


def peer_experts(shape: LayerShape, weights: Weights) -> dict[str, DeepseekV4Experts]:
    """Transformers' experts, one module an implementation, over the same bf16 weights."""
    gate_up = torch.nn.Parameter(weights.l1.dequantize(torch.bfloat16), requires_grad=False)
    down = torch.nn.Parameter(weights.l2.dequantize(torch.bfloat16), requires_grad=False)
    peers = {}
    for implementation in PEERS:
        config = DeepseekV4Config(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            n_routed_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            swiglu_limit=shape.swiglu_limit or math.inf,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = DeepseekV4Experts(config)
        experts.gate_up_proj, experts.down_proj = gate_up, down
        peers[implementation] = experts.eval()
    return peers


def gathered_bytes(shape: LayerShape, tokens: int) -> int:
    """What ``batched_mm`` copies for its larger product."""
    return 2 * tokens * shape.top_k * 2 * shape.intermediate_size * shape.hidden_size


def our_run(layer: Nvfp4MoE, calls: list[Call]) -> Callable[[int], torch.Tensor]:
    """A contender: our layer."""

    def run(index: int) -> torch.Tensor:
        call = calls[index]
        return layer.run(call.hidden_states, call.topk_weights, call.topk_ids)

    return run


def peer_run(experts: DeepseekV4Experts, calls: list[Call]) -> Callable[[int], torch.Tensor]:
    """A contender: the peer, with routing weights in the model's dtype, as its router gives them."""
    weights = [call.topk_weights.to(torch.bfloat16) for call in calls]

    def run(index: int) -> torch.Tensor:
        result: torch.Tensor = experts(calls[index].hidden_states, calls[index].topk_ids, weights[index])
        return result

    return run


def measure_tokens(
    layers: dict[str, Nvfp4MoE], peers: dict[str, DeepseekV4Experts], tokens: int, seconds: float
) -> dict[str, Any]:
    """All contenders at one number of tokens."""
    calls = [random_call(SHAPE, tokens, "uniform", CPU, seed) for seed in range(INPUTS)]
    running = {
        name: experts
        for name, experts in peers.items()
        if name != "batched_mm" or gathered_bytes(SHAPE, tokens) <= GATHER_LIMIT
    }
    contenders = {name: our_run(layer, calls) for name, layer in layers.items()}
    contenders |= {name: peer_run(experts, calls) for name, experts in running.items()}
    difference = {name: relative_l2(contenders[name](0), contenders["eager"](0)) for name in layers}
    timings = compare(contenders, INPUTS, CPU, seconds)
    best = min(running, key=lambda name: timings[name].median_us)
    return {
        "tokens": tokens,
        "peer": best,
        "times": {name: timing.as_dict() for name, timing in timings.items()},
        "ratios": {name: round(timings[name].median_us / timings[best].median_us, 3) for name in layers},
        "ratio_target": TARGETS[tokens],
        "left_out": sorted(set(peers) - set(running)),
        "relative_l2_to_peer": {name: float(f"{value:.3g}") for name, value in difference.items()},
    }


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|``."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def measure(tokens: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """The whole benchmark as one JSON document."""
    commit = git_commit()  # before the results themselves change the tree
    weights = random_weights(SHAPE, CPU)
    layers = {name: build_layer(SHAPE, weights, MODES[name], max(tokens), CPU) for name in OURS}
    peers = peer_experts(SHAPE, weights)
    peer_bytes = sum(p.numel() * p.element_size() for p in peers["eager"].parameters())
    with torch.inference_mode():
        results = [measure_tokens(layers, peers, count, seconds) for count in tokens]
    return {
        "commit": commit,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "shape": asdict(SHAPE),
        "routing": "uniform",
        "inputs": INPUTS,
        "backend": {name: layer.backend_name for name, layer in layers.items()},
        "weight_bytes": {name: layer.weight_nbytes for name, layer in layers.items()} | {"peer": peer_bytes},
        "weight_target": WEIGHT_TARGET,
        "results": results,
    }


def git_commit() -> str | None:
    """The commit that is checked out, with a ``+`` if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each contender and number of tokens, at least")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_layer.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    document = measure(tuple(args.tokens), args.seconds)
    write_text(args.output, dumps(document))
    print(cpu_layer_table(document))
    print(f"\nwritten: {args.output}; python benchmarks/tables.py puts the table into README.md")


if __name__ == "__main__":
    main()
