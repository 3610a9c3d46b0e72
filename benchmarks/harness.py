"""The protocol under which layers are timed on a GPU: contenders, graphs, proof, interleaved replays, rates.

R calls with different inputs and routings are captured into one CUDA graph per contender. A contender's graph is
replayed over a poisoned result and compared with the reference: without that proof it has no time. Then graphs are
replayed in turn, without rests; the median replay over R is the time of a layer. Beside it stands the time of a graph
that holds one layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from reference import Activations, reference, relative_error
from torch import Tensor

from dsv4.cli._layer import Call, Weights
from dsv4.cli._measure import NVFP4_BYTES
from dsv4.cli._shapes import LayerShape

READ_GB_PER_S = 4443.0
"""Measured on an H200: a reduction over 4 GiB."""

BF16_TFLOP_PER_S = 772.0
"""Measured on an H200: a dense 8192^3 product."""

REPLAYS = (3, 9)
"""The fewest timed replays of a slow graph, and of any other."""

REPLAY_US = 2e6
"""A graph so slow that its replays together would take longer is replayed less often."""

PROOF_ROWS = 8
"""Tokens of a call that are compared with the reference."""

BF16_TOLERANCE = 2e-2
"""Relative L2 of a contender with bf16 operands: bf16 gate, up and slot rows make under 1e-2, a wrong expert 1."""

NVFP4_TOLERANCE = 8e-2
"""Of one that quantizes activations. Simulated on V4-Flash's sizes: bf16 gate, up and weights, which flip some block
scales, make 3.5e-2; leaving the quantization out altogether makes 1.6e-1."""

Outputs = tuple[Tensor, ...]


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: in tables and files.
        run: number of the call -> the tensors it wrote; capturable.
        activations: what it does to operands, for the reference.
        tolerance: the relative L2 error up to which it has done its work.
        weight_bytes: bytes of one weight.
        result: number of the call and ``run``'s tensors -> ``[T, H]``; not timed.
        context: in which ``run`` is called.
    """

    name: str
    run: Callable[[int], Outputs]
    activations: Activations
    tolerance: float = BF16_TOLERANCE
    weight_bytes: float = NVFP4_BYTES
    result: Callable[[int, Outputs], Tensor] = lambda index, outputs: outputs[0]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Captured:
    """A contender's graphs for one number of tokens.

    Attributes:
        contender: whose.
        graph: all calls.
        outputs: where the last call of ``graph`` writes.
        singles: graphs of one call each.
    """

    contender: Contender
    graph: Graph
    outputs: Outputs
    singles: list[Graph] = field(default_factory=list)


def capture(runs: Sequence[Callable[[], Outputs]], stream: Any, pool: Any = None) -> tuple[Any, Outputs]:
    """All of ``runs`` in one graph, and what the last one wrote. Each must have run on ``stream`` before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, pool=pool):
        for run in runs:
            outputs = run()
    return graph, outputs


def elapsed_us(graph: Graph) -> float:
    """One replay, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def warm(contender: Contender, count: int, stream: Any) -> None:
    """Run every call once on the stream that will be captured: compiles, allocates, tunes."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), contender.context():
        for index in range(count):
            contender.run(index)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture_all(contender: Contender, count: int, stream: Any, singles: int) -> Captured:
    """The graph of all calls, and ``singles`` graphs of one call, in the same memory: they run one after another."""

    def bind(index: int) -> Callable[[], Outputs]:
        return lambda: contender.run(index)

    with contender.context():
        graph, outputs = capture([bind(index) for index in range(count)], stream)
        one = [capture([bind(index)], stream, graph.pool())[0] for index in range(singles)]
    return Captured(contender, graph, outputs, one)


def proof(captured: Captured, calls: Sequence[Call], weights: Weights, limit: float | None) -> float:
    """Relative L2 error of the last call's result after a replay over poisoned outputs."""
    for tensor in captured.outputs:
        tensor.fill_(torch.nan)
    captured.graph.replay()
    call, contender = calls[-1], captured.contender
    tokens = len(call.hidden_states)
    rows = torch.linspace(0, tokens - 1, min(tokens, PROOF_ROWS)).long().to(call.hidden_states.device)
    found = contender.result(len(calls) - 1, captured.outputs)[rows]
    return relative_error(found, reference(weights, call, rows, limit, contender.activations))


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of so many contenders, in which each stands right behind each other one equally often.

    E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments, Australian
    Journal of Scientific Research A 2 (1949): a zigzag through a cycle, shifted; of an odd number also backwards.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    rows = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def interleaved(graphs: Mapping[str, Graph], layers: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median microseconds of one layer for each contender, and how many replays that is of; they take turns.

    A chip at its power limit is faster for a while behind a contender that draws less: orders are balanced, and all of
    them are replayed equally often, but for the last replays of a slow graph.
    """
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    first = {name: (elapsed_us(graph), elapsed_us(graph))[1] for name, graph in graphs.items()}
    names, orders = list(graphs), balanced_orders(len(graphs))
    turns = orders * -(-REPLAYS[1] // max(len(orders), 1))
    replays = {name: max(REPLAYS[0], min(len(turns), int(REPLAY_US / us))) for name, us in first.items()}
    for turn, order in enumerate(turns):
        for name in (names[place] for place in order):
            if turn < replays[name]:
                samples[name].append(elapsed_us(graphs[name]) / layers)
    return {name: round(statistics.median(times), 2) for name, times in samples.items()}, replays


def single_us(graphs: Sequence[Graph], rounds: int = 3) -> float:
    """Median microseconds of a graph that holds one layer; graphs take turns, so that no cache holds the weights."""
    for graph in graphs:
        graph.replay()
    return round(statistics.median([elapsed_us(graph) for _ in range(rounds) for graph in graphs]), 2)


def floor_us(shape: LayerShape, tokens: int, active: float) -> float:
    """The least time the chip's ceilings allow, in microseconds, for NVFP4 weights of ``active`` experts."""
    read = active * shape.expert_parameters * NVFP4_BYTES / READ_GB_PER_S / 1e3
    return max(read, shape.flops(tokens) / BF16_TFLOP_PER_S / 1e6)


def rates(shape: LayerShape, tokens: int, active: float, us: float, weight_bytes: float) -> dict[str, float]:
    """What a time amounts to: arithmetic, reading of the active experts' weights, share of the floor."""
    return {
        "tflop_per_s": round(shape.flops(tokens) / us / 1e6, 1),
        "gb_per_s": round(active * shape.expert_parameters * weight_bytes / us / 1e3, 1),
        "floor_share": round(floor_us(shape, tokens, active) / us, 4),
    }


def speed_ratios(times: Mapping[str, float], ours: Sequence[str]) -> dict[str, dict[str, float]]:
    """How many times a peer's speed ours has: peer -> mode -> ratio."""
    return {
        peer: {mode: round(times[peer] / times[mode], 3) for mode in ours if mode in times}
        for peer in times
        if peer not in ours
    }
