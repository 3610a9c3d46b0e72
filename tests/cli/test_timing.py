"""How things are timed."""

from __future__ import annotations

import time

import pytest
import torch

from dsv4.cli._timing import Timing, compare

CPU = torch.device("cpu")


def test_contenders_take_turns():
    """Each contender warms up on every input; then all run the same input one after the other, inputs rotating."""
    seen: list[tuple[str, int]] = []
    timings = compare({name: lambda i, name=name: seen.append((name, i)) for name in "ab"}, 3, CPU, seconds=0)
    warm_up = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    turns = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert seen == warm_up + turns
    assert [timing.calls for timing in timings.values()] == [3, 3]


def test_time_is_spent():
    """Calls are repeated until the time is spent."""
    start = time.perf_counter()
    timing = compare({"sleeper": lambda i: time.sleep(0.005)}, 1, CPU, seconds=0.1)["sleeper"]
    assert time.perf_counter() - start >= 0.1
    assert timing.calls > 1
    assert timing.p10_us >= 5000


def test_summary():
    """The median, not the mean; unmoved by a call that was interrupted."""
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert timing.median_us == 3
    assert timing.p10_us == pytest.approx(1.4)
    assert timing.calls == 5
