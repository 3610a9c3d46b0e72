"""The whole layer on a GPU beside its peers, under one protocol (``harness.py``).

    python benchmarks/gpu_layer.py --shape v4-flash --output benchmarks/results/h200_v4_flash.json
    python benchmarks/gpu_layer.py --peers humming,vllm-emulation --peer-folder DIR

The floor is what the chip's measured ceilings allow: the bytes of the active experts' weights over the read bandwidth,
or the operations over the dense bf16 rate, whichever takes longer. Peers that cannot run are named with the reason.
The file is written anew after every number of tokens, so that a time limit loses nothing; our stages are added at the
end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import peers
import stages
import torch
from harness import BF16_TOLERANCE, NVFP4_TOLERANCE, Captured, Contender, Outputs
from peers.base import Peer, Setup
from reference import BF16, TOKEN_SCALES, Activations

from dsv4.cli._layer import Call, RoutingKind, Weights, build_layer, random_call, random_weights
from dsv4.cli._machine import versions
from dsv4.cli._modes import MODES
from dsv4.cli._output import check_writable, dumps, write_text
from dsv4.cli._shapes import SHAPES, LayerShape
from dsv4.moe import Nvfp4MoE
from dsv4.weights import MoEWeights

OURS = ("w4a16", "w4a4-static", "w4a4-token")
"""Modes whose reference needs no more than some tokens of a call."""

TOKENS = "1,4,16,64,256,1024,8192"
STAGE_CALLS = 4
"""Calls that are profiled."""

LARGE = 1024
"""Calls of more tokens are captured 8 times instead of 32: they read all experts, many times what the cache holds."""


def packing_rate(layer: Nvfp4MoE, weights: Weights) -> dict[str, float]:
    """Packing again, in place: weight bytes for each second, and the peak of memory above weights and result."""
    l1, l2 = weights.l1, weights.l2
    checked = MoEWeights.checked(layer.config, l1.codes, l1.sf, l1.gs.flatten(), l2.codes, l2.sf, l2.gs.flatten())
    assert layer._packed is not None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    samples = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        layer._backend.pack(checked, layer._packed)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return {
        "gb_per_s": round(layer.weight_nbytes / statistics.median(samples) / 1e9, 1),
        "peak_extra_bytes": torch.cuda.max_memory_allocated() - before,
    }


def our_contender(mode: str, layer: Nvfp4MoE, calls: Sequence[Call]) -> Contender:
    """Our layer; results go to one buffer."""
    hidden = calls[0].hidden_states
    out = torch.empty_like(hidden)

    def run(index: int) -> Outputs:
        call = calls[index]
        return (layer.run(call.hidden_states, call.topk_weights, call.topk_ids, out=out),)

    if mode == "w4a16":
        return Contender(mode, run, BF16, BF16_TOLERANCE)
    scales = layer._input_scales()
    activations = TOKEN_SCALES if scales is None else Activations(True, scales.l1_merged, scales.l2)
    return Contender(mode, run, activations, NVFP4_TOLERANCE)


def captured(
    contenders: Sequence[Contender], calls: Sequence[Call], setup: Setup, stream: Any
) -> tuple[dict[str, Captured], dict[str, float], dict[str, str]]:
    """Graphs of the contenders that have proven their work, their errors, and why the others are left out.

    All run once before any is captured, since some share buffers that grow; all are proven after all are captured.
    """
    count = len(calls)
    singles = min(count, 8 if len(calls[0].hidden_states) <= LARGE else 2)
    ready: list[Contender] = []
    graphs: dict[str, Captured] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for contender in contenders:
        try:
            harness.warm(contender, count, stream)
            ready.append(contender)
        except Exception as error:  # other people's code raises what it likes, and must not cost the others' times
            left_out[contender.name] = f"does not run: {_first_line(error)}"
    for contender in ready:
        try:
            graphs[contender.name] = harness.capture_all(contender, count, stream, singles)
        except Exception as error:
            left_out[contender.name] = f"cannot be captured: {_first_line(error)}"
    for name in list(graphs):
        distance = harness.proof(graphs[name], calls, setup.weights, setup.shape.swiglu_limit)
        tolerance = graphs[name].contender.tolerance
        if distance <= tolerance:
            errors[name] = float(f"{distance:.2e}")
        else:
            left_out[name] = f"its replay is {distance:.1e} from the reference, at most {tolerance}"
            del graphs[name]
    return graphs, errors, left_out


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def calls_of(
    shape: LayerShape, tokens: int, kind: RoutingKind, device: torch.device, count: int | None = None
) -> list[Call]:
    """Different calls of so many tokens: ``count``, or as many as a graph holds of them."""
    count = count or (32 if tokens <= LARGE else 8)
    return [random_call(shape, tokens, kind, device, seed) for seed in range(count)]


def mean_active_experts(calls: Sequence[Call]) -> float:
    """Experts that have a token, of a call on average."""
    return sum(call.active_experts for call in calls) / len(calls)


def measure_row(
    setup: Setup, layers: Mapping[str, Nvfp4MoE], found: Mapping[str, Peer], calls: Sequence[Call], stream: Any
) -> dict[str, Any]:
    """All contenders for one number of tokens."""
    shape, tokens, count = setup.shape, len(calls[0].hidden_states), len(calls)
    contenders = [our_contender(mode, layer, calls) for mode, layer in layers.items()]
    unprepared = {}
    for name, peer in found.items():
        try:
            contenders += peer.contenders(calls)
        except Exception as error:
            unprepared[name] = f"cannot prepare: {_first_line(error)}"
    graphs, errors, left_out = captured(contenders, calls, setup, stream)
    left_out |= unprepared
    for name, reason in left_out.items():
        print(f"{name}, {tokens} tokens: left out, {reason}", flush=True)
    active = mean_active_experts(calls)
    us, replays = harness.interleaved({name: one.graph for name, one in graphs.items()}, count)
    return {
        "tokens": tokens,
        "routings": count,
        "active_experts": round(active, 1),
        "floor_us": round(harness.floor_us(shape, tokens, active), 1),
        "us": us,
        "single_us": {name: harness.single_us(one.singles) for name, one in graphs.items()},
        "replays": replays,
        "errors": errors,
        "rates": {
            name: harness.rates(shape, tokens, active, time, graphs[name].contender.weight_bytes)
            for name, time in us.items()
        },
        "speed_of_peer": harness.speed_ratios(us, list(layers)),
        "left_out": left_out,
    }


def stage_tables(setup: Setup, layers: Mapping[str, Nvfp4MoE], calls: Sequence[Call]) -> dict[str, Any]:
    """What our kernels outside the products take, for one number of tokens.

    After all rows are timed: rows behind a profiled one took 4 us a layer longer than in a process without profiler.
    """
    out = torch.empty_like(calls[0].hidden_states)
    tables = {
        mode: stages.table(stages.kernel_us(layer, calls, out), setup.shape, len(out), mode)
        for mode, layer in layers.items()
    }
    totals = {mode: round(sum(row["us"] or 0.0 for row in table.values()), 2) for mode, table in tables.items()}
    return {"stages": tables, "stages_us": totals}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as one JSON document."""
    device = torch.device(args.device)
    shape = SHAPES[args.shape]
    weights = random_weights(shape, device)
    tokens_list = tuple(int(t) for t in args.tokens.split(","))
    layers = {
        mode: build_layer(shape, weights, MODES[mode], max(tokens_list), device, args.backend)
        for mode in args.modes.split(",")
    }
    packing = {mode: packing_rate(layer, weights) for mode, layer in list(layers.items())[:1]}
    setup = Setup(shape, weights, tokens_list, device, args.peer_folder)
    names = list(peers.PEERS) if args.peers == "all" else [name for name in args.peers.split(",") if name]
    torch.cuda.empty_cache()  # peers look at what is free
    found, skipped = peers.load(names, setup)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit or commit.stdout.strip() or None,
        "versions": versions(),
        "shape": args.shape,
        "routing": args.routing,
        "ceilings": {"read_gb_per_s": harness.READ_GB_PER_S, "bf16_tflop_per_s": harness.BF16_TFLOP_PER_S},
        "backends": {mode: layer.backend_name for mode, layer in layers.items()},
        "workspace_bytes": {mode: layer.workspace_nbytes for mode, layer in layers.items()},
        "packing": packing,
        "peers": {name: peer.facts for name, peer in found.items()},
        "skipped": skipped,
        "results": [],
    }

    def keep(row: Mapping[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if args.output:
            write_text(args.output, dumps(document))

    stream = torch.cuda.Stream()
    for tokens in tokens_list:
        row = measure_row(setup, layers, found, calls_of(shape, tokens, args.routing, device, args.routings), stream)
        document["results"].append(row)
        keep(row)
    for row in document["results"]:
        calls = calls_of(shape, row["tokens"], args.routing, device, STAGE_CALLS)
        found_stages = stage_tables(setup, layers, calls)
        row |= found_stages
        keep({"tokens": row["tokens"], **found_stages})
    return document


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="v4-flash", choices=list(SHAPES))
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--modes", default="w4a16,w4a4-token", help=f"of {','.join(OURS)}")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--routings", type=int, help="calls in a graph; by default 32, above 1024 tokens 8")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peers", default="humming,vllm-emulation", help=f"all, or of {','.join(peers.PEERS)}")
    parser.add_argument("--peer-folder", type=Path, help="unpacked third-party code: Humming's, vLLM's and drivers")
    parser.add_argument("--commit", help="of the code measured, where git is not at hand")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    for given, known, option in ((args.modes, OURS, "--modes"), (args.peers, (*peers.PEERS, "all", ""), "--peers")):
        unknown = [name for name in given.split(",") if name not in known]
        if unknown:
            parser.error(f"{option}: found {', '.join(unknown)}, expected {', '.join(name for name in known if name)}")
    return args


def main() -> None:
    """Measure and write."""
    args = parse()
    check_writable(args.output)
    measure(args)


if __name__ == "__main__":
    main()
