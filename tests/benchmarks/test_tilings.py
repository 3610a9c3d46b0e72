"""The benchmark of other lines for the Hopper backend's table, without a GPU."""

from __future__ import annotations

import argparse
import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dsv4.backends import hopper
from dsv4.cli._shapes import SHAPES


@pytest.fixture
def tilings(benchmarks):
    return importlib.import_module("tilings")


ILL = [f"{loops}:4,2,3,1" for loops in ("48,32", "9", "0", "16-8", "8-16-32", "8,8", "16+24,24-40", "8,32-16")]
"""Widths that no kernel has, in this order."""


def test_a_line_as_it_is_written(tilings):
    """Loops of widths, and one shape for both products."""
    line = tilings.line("8,16+32,40-56+72:4,2,3,1")
    loops = ((8,), (16, 32), (40, 48, 56, 72))
    assert line == hopper.Tiling(float("inf"), loops, (4, 2, 3, 1), (4, 2, 3, 1))
    for wrong in ("32,48", "32:4,2,3", "32:4,2,3,1,1", "a:4,2,3,1", "8+:4,2,3,1", "-8:4,2,3,1", "32:4,2,3,1:1", *ILL):
        with pytest.raises(argparse.ArgumentTypeError, match="expected loops:warpgroups"):
            tilings.line(wrong)


def test_scratch_for_every_line(tilings):
    """Groups of 8 rows are more than any of the table's: a layer that is built for them has room, and others are as
    they were."""
    config = SHAPES["v4-flash"].config(activation_format="bf16", max_num_tokens=8192)
    before = hopper._plan(config).nbytes
    with tilings.room_for([tilings.line("8:2,2,5,2")]):
        assert hopper._plan(config).nbytes > before
    assert hopper._plan(config).nbytes == before


def test_each_contender_runs_under_its_table(tilings):
    """And leaves the backend's table alone."""
    seen = []
    layer = SimpleNamespace(run=lambda *args, out: seen.append(hopper.TILINGS) or out)
    call = SimpleNamespace(hidden_states=torch.zeros(4, 8), topk_weights=None, topk_ids=None)
    line, table = tilings.line("16:1,1,2,1"), hopper.TILINGS
    for one in ((line,), table):
        contender = tilings.contender("", one, layer, [call])
        with contender.context():
            contender.run(0)
    assert seen == [(line,), table]
    assert hopper.TILINGS is table


def test_what_is_compiled_is_what_is_launched(tilings, monkeypatch):
    """The kernels of a line are those of a layer whose table has that line alone, but the shapes for few tiles."""
    line = tilings.line("24,40:4,2,3,1")
    found = set(tilings.kernels("v4-flash", [line]))
    monkeypatch.setattr(hopper, "TILINGS", (hopper.TILINGS[0], line))
    launched = hopper.kernels(SHAPES["v4-flash"].config(activation_format="bf16"))
    assert found == {kernel for kernel in launched if kernel.loops == line.loops}
