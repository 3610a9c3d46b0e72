"""The whole layer on a GPU beside its peers, under one protocol.

For each number of tokens, R calls with different inputs and routings are captured into one CUDA graph per contender;
graphs are replayed in turn, without rests, and the median replay over R is the time of a layer. Weights are several
times the L2 cache, codes and scales are random. The floor is what the chip's measured ceilings allow: the bytes of the
active experts' weights over the read bandwidth, or the operations over the dense bf16 rate, whichever takes longer.

    python benchmarks/gpu_layer.py --shape v4-flash --output benchmarks/results/h200_v4_flash.json
    python benchmarks/gpu_layer.py --humming DIR      # beside Humming: DIR holds humming_moe.py and vLLM's two files
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4.cli._layer import Call, Weights, build_layer, random_call, random_weights
from dsv4.cli._machine import versions
from dsv4.cli._measure import NVFP4_BYTES
from dsv4.cli._modes import MODES
from dsv4.cli._output import dumps, write_text
from dsv4.cli._shapes import SHAPES, LayerShape
from dsv4.moe import Nvfp4MoE
from dsv4.weights import MoEWeights

READ_GB_PER_S = 4443.0
"""Measured on an H200: a reduction over 4 GiB."""

BF16_TFLOP_PER_S = 772.0
"""Measured on an H200: a dense 8192^3 product."""

REPLAYS = 9

Runner = Callable[[], object]


def capture(calls: list[Runner]) -> torch.cuda.CUDAGraph:
    """All calls in one graph, each run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], layers: int) -> dict[str, float]:
    """Median microseconds of one layer for each contender; replays take turns."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for replay in range(REPLAYS + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 2:
                samples[name].append(start.elapsed_time(end) * 1e3 / layers)
    return {name: round(statistics.median(times), 2) for name, times in samples.items()}


def floor_us(shape: LayerShape, tokens: int, active: float) -> float:
    """The least time the chip's ceilings allow, in microseconds."""
    read = active * shape.expert_parameters * NVFP4_BYTES / READ_GB_PER_S / 1e3
    return max(read, shape.flops(tokens) / BF16_TFLOP_PER_S / 1e6)


def stage_us(layer: Nvfp4MoE, calls: list[Call]) -> float:
    """Time in kernels other than the two products, for one call: the profiler's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for call in calls:
            layer.run(call.hidden_states, call.topk_weights, call.topk_ids)
        torch.cuda.synchronize()
    total = sum(e.device_time_total for e in trace.key_averages() if "_grouped_gemm" not in e.key)
    return round(total / len(calls), 2)


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


class Humming:
    """Humming's W4A16 layer, driven by the script that also measures it alone; skipped where it is not installed."""

    MODES = ("indexed", "grouped")

    def __init__(self, folder: Path, shape_name: str):
        spec = importlib.util.spec_from_file_location("humming_moe", folder / "humming_moe.py")
        assert spec is not None
        assert spec.loader is not None
        self.script = importlib.util.module_from_spec(spec)
        sys.modules["humming_moe"] = self.script
        spec.loader.exec_module(self.script)
        self.script.import_humming()
        glue = self.script.Glue(str(folder))
        self.facts = {"align": glue.align_src, "combine": glue.combine_src}
        self.layer = self.script.Layer({"v4-flash": "V4-Flash", "v4-pro": "V4-Pro"}[shape_name], glue)

    def graphs(self, calls: list[Call]) -> dict[str, torch.cuda.CUDAGraph]:
        """One for each mode whose replay writes what an eager call writes: a peer that did no work has no time."""
        found, wanted = {}, {}
        tokens = len(calls[0].hidden_states)
        # A graph does not keep what it reads and writes alive: ids in the peer's dtype, and its buffers of each mode.
        ids = [call.topk_ids.int() for call in calls]
        self.alive: list[Any] = [ids]
        for mode in self.MODES:
            self.layer.set_mode(mode)
            checked = self.layer.check(tokens, min(tokens, 8))["rel_err"]
            self.layer.prepare(tokens)
            self.alive.append(dict(vars(self.layer)))

            def bind(call: Call, call_ids: torch.Tensor) -> Runner:
                return lambda: self.layer.forward(call.hidden_states, call.topk_weights, call_ids)

            runners = [bind(call, call_ids) for call, call_ids in zip(calls, ids, strict=True)]
            graph = capture(runners)
            runners[-1]()
            wanted[mode] = (self.layer.out, self.layer.out.clone())
            if checked < 2e-2:
                found[f"humming-{mode}"] = graph
        for mode, (out, want) in wanted.items():
            name = f"humming-{mode}"
            if name in found:
                out.fill_(torch.nan)
                found[name].replay()
                error = ((out.float() - want.float()).norm() / want.float().norm()).item()
                if not error < 1e-2:
                    print(f"{name}, {tokens} tokens: left out, its replay is {error:.1e} from an eager call")
                    del found[name]
        return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, as one JSON document."""
    device = torch.device("cuda", torch.cuda.current_device())
    shape = SHAPES[args.shape]
    weights = random_weights(shape, device)
    tokens_list = [int(t) for t in args.tokens.split(",")]
    layers = {
        mode: build_layer(shape, weights, MODES[mode], max(tokens_list), device, args.backend)
        for mode in args.modes.split(",")
    }
    packing = {mode: packing_rate(layer, weights) for mode, layer in list(layers.items())[:1]}
    del weights
    peer = Humming(args.humming, args.shape) if args.humming else None
    rows = []
    for tokens in tokens_list:
        count = 32 if tokens <= 1024 else 8
        calls = [random_call(shape, tokens, args.routing, device, seed) for seed in range(count)]
        out = torch.empty(tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
        graphs = {}
        for mode, layer in layers.items():

            def bind(call: Call, layer: Nvfp4MoE = layer, out: torch.Tensor = out) -> Runner:
                return lambda: layer.run(call.hidden_states, call.topk_weights, call.topk_ids, out=out)

            graphs[mode] = capture([bind(call) for call in calls])
        if peer is not None:
            graphs |= peer.graphs(calls)
        active = sum(call.active_experts for call in calls) / count
        row: dict[str, Any] = {
            "tokens": tokens,
            "routings": count,
            "active_experts": round(active, 1),
            "floor_us": round(floor_us(shape, tokens, active), 1),
            "us": interleaved(graphs, count),
            "stages_us": {mode: stage_us(layer, calls[:4]) for mode, layer in layers.items()},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        del graphs
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit or commit.stdout.strip() or None,
        "versions": versions(),
        "shape": args.shape,
        "routing": args.routing,
        "ceilings": {"read_gb_per_s": READ_GB_PER_S, "bf16_tflop_per_s": BF16_TFLOP_PER_S},
        "backends": {mode: layer.backend_name for mode, layer in layers.items()},
        "workspace_bytes": {mode: layer.workspace_nbytes for mode, layer in layers.items()},
        "packing": packing,
        "peer": peer.facts if peer else None,
        "results": rows,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="v4-flash", choices=list(SHAPES))
    parser.add_argument("--tokens", default="1,2,4,8,16,64,256,1024,2048,4096,8192")
    parser.add_argument("--modes", default="w4a16,w4a4-static,w4a4-token")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--humming", type=Path, help="folder with humming_moe.py and vLLM's align and combine")
    parser.add_argument("--commit", help="of the code measured, where git is not at hand")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    document = measure(args)
    if args.output:
        write_text(args.output, dumps(document))


if __name__ == "__main__":
    main()
