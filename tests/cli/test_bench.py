"""``dsv4 bench``: what it reports, and the files that it writes."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from dsv4.cli import _measure, bench
from dsv4.cli._layer import RoutingKind
from dsv4.cli._modes import MODES
from dsv4.cli._shapes import SHAPES
from dsv4.cli.app import app

TINY = ["--experts", "8", "--hidden", "64", "--intermediate", "32", "--top-k", "2", "--seconds", "0", "--inputs", "2"]


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", *TINY, *arguments])


def test_document():
    """One point for each mode and number of tokens; rates follow from times and shapes."""
    document = json.loads(run("--tokens", "1,5", "--mode", ",".join(MODES), "--json").stdout)
    assert [(p["mode"], p["tokens"]) for p in document["results"]] == [(m, t) for t in (1, 5) for m in MODES]
    for point in document["results"]:
        seconds = point["median_us"] / 1e6
        assert point["p10_us"] <= point["median_us"] <= point["p90_us"]
        flops = 2 * point["tokens"] * 2 * (3 * 64 * 32)
        assert point["gflop_per_s"] == pytest.approx(flops / seconds / 1e9, rel=0.01, abs=1e-3)
        assert 2 <= point["active_experts"] <= min(8, 2 * point["tokens"])
        weights = point["active_experts"] / 8 * document["modes"][point["mode"]]["weight_bytes"]
        assert point["weight_gb_per_s"] == pytest.approx(weights / seconds / 1e9, rel=0.01, abs=1e-3)
    for facts in document["modes"].values():
        assert facts["weight_bytes_bf16"] == 8 * 3 * 64 * 32 * 2
        assert 0.28 < facts["weight_bytes"] / facts["weight_bytes_bf16"] < 0.3


def test_table():
    """The table has a row for each point, and says on what and with what it was measured."""
    result = run("--tokens", "3", "--routing", "zipf", "--mode", "w4a4-static")
    assert result.exit_code == 0
    assert all(text in result.stdout for text in ("W4A4 static", "8 experts, 64 x 32, top-2", "zipf", "GFLOP/s"))


def test_threads():
    """--threads is what is measured with, and reported."""
    before = torch.get_num_threads()
    try:
        document = json.loads(run("--tokens", "1", "--threads", "1", "--json").stdout)
    finally:
        torch.set_num_threads(before)
    assert document["threads"] == 1


def test_files(tmp_path):
    """--output holds the document that --json prints; --plot is a picture; nothing else is left."""
    picture, numbers = tmp_path / "made" / "times.png", tmp_path / "made" / "times.json"
    result = run("--tokens", "1,2", "--plot", str(picture), "--output", str(numbers), "--json")
    assert json.loads(numbers.read_text()) == json.loads(result.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.rglob("*.*")) == [numbers, picture]


def test_a_failure_leaves_files_alone(tmp_path, monkeypatch):
    """If measuring or writing fails, what was there before stays, and nothing half-written appears."""
    numbers = tmp_path / "times.json"
    numbers.write_text("before")
    monkeypatch.setattr(_measure, "compare", lambda *a: {"w4a16": None})
    assert run("--tokens", "1", "--mode", "w4a16", "--output", str(numbers)).exit_code != 0
    monkeypatch.undo()
    monkeypatch.setattr(bench, "dumps", lambda document: "\ud800")  # no character that UTF-8 can write
    assert run("--tokens", "1", "--output", str(numbers)).exit_code != 0
    assert numbers.read_text() == "before"
    assert list(tmp_path.iterdir()) == [numbers]


def test_too_little_memory(monkeypatch):
    """A layer that does not fit is refused before anything is allocated: the system would end the process."""
    monkeypatch.setattr(_measure, "free_memory", lambda device: 10_000)
    result = run("--tokens", "1")
    assert result.exit_code == 1
    assert "has 10 kB free" in result.stderr


def test_names_agree():
    """The names that options accept are the names that exist."""
    assert [shape.value for shape in bench.Shape] == list(SHAPES)
    assert tuple(kind.value for kind in bench.Routing) == get_args(RoutingKind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    """On CUDA the calls are captured and replayed, for every mode."""
    arguments = ["bench", "--device", "cuda", *TINY, "--tokens", "1,5", "--mode", ",".join(MODES), "--json"]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert all(point["median_us"] > 0 for point in document["results"])
