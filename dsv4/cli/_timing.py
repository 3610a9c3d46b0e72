"""How anything here is timed: contenders take turns, inputs rotate, medians are reported.

Load on a machine comes and goes. Contenders that run in turn, call by call, in one process, see the same of it, so
their *ratio* is steadier than either time. Inputs rotate, so that no contender finds its weights and tokens in a cache
where serving would not have them. The median forgives the calls that were interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

Contender = Callable[[int], object]
"""Runs one call with the input of that number."""

_MAX_CALLS = 1000


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median_us: the time to quote.
        p10_us: a tenth of the calls were faster.
        p90_us: a tenth of the calls were slower.
        calls: how many were timed.
    """

    median_us: float
    p10_us: float
    p90_us: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Summarise times in microseconds."""
        low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        )
        return cls(round(middle.item(), 2), round(low.item(), 2), round(high.item(), 2), len(samples))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def compare(
    contenders: Mapping[str, Contender], inputs: int, device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Time ``contenders`` in turn.

    Every contender first runs every input once, untimed: that compiles, allocates and fills caches.

    Args:
        contenders: by name.
        inputs: how many inputs there are; call n gets input ``n % inputs``.
        device: where they compute. On CUDA times are the device's own, between events.
        seconds: time to spend on each contender, at least; every input is timed at least once.
    """
    for contender in contenders.values():
        for index in range(inputs):
            contender(index)
    once = _cuda_us if device.type == "cuda" else _cpu_us
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds * len(contenders)
    for call in range(_MAX_CALLS):
        if call >= inputs and time.perf_counter() > deadline:
            break
        for name, contender in contenders.items():
            samples[name].append(once(contender, call % inputs))
    return {name: Timing.of(times) for name, times in samples.items()}


def _cpu_us(contender: Contender, index: int) -> float:
    start = time.perf_counter_ns()
    contender(index)
    return (time.perf_counter_ns() - start) / 1e3


def _cuda_us(contender: Contender, index: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    contender(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def graphed(contender: Contender, inputs: int) -> Contender:
    """``contender`` as CUDA graphs, one for each input: what serving replays, without the cost of launching."""
    graphs = []
    for index in range(inputs):
        contender(index)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            contender(index)
        graphs.append(graph)
    return lambda index: graphs[index].replay()
