"""The benchmark beside Transformers, on a layer small enough for a test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dsv4.cli._shapes import LayerShape

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def cpu_layer(monkeypatch):
    """The script as a module, with a tiny layer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("cpu_layer", FOLDER / "cpu_layer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", LayerShape(8, 128, 64, 3, 10.0))
    yield module
    sys.modules.pop("tables", None)


def test_document(cpu_layer, tmp_path, monkeypatch, capsys):
    """The file has times and ratios of all contenders; ours computes what the peer computes; the table is printed."""
    output = tmp_path / "cpu_layer.json"
    arguments = ["--tokens", "1", "32", "--seconds", "0", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["cpu_layer.py", *arguments])
    cpu_layer.main()
    document = json.loads(output.read_text())
    assert [result["tokens"] for result in document["results"]] == [1, 32]
    for result in document["results"]:
        times = {name: timing["median_us"] for name, timing in result["times"].items()}
        assert set(times) == {*cpu_layer.OURS, *cpu_layer.PEERS}
        assert times[result["peer"]] == min(times[name] for name in cpu_layer.PEERS)
        for name in cpu_layer.OURS:
            assert result["ratios"][name] == pytest.approx(times[name] / times[result["peer"]], rel=1e-3, abs=1e-3)
        # bf16 rounds every operation of the peer; W4A4 moreover quantizes activations to 4 bits.
        assert result["relative_l2_to_peer"]["w4a16"] < 0.02
        assert result["relative_l2_to_peer"]["w4a4-token"] < 0.25
    weights = document["weight_bytes"]
    assert weights["peer"] == 8 * 3 * 128 * 64 * 2
    assert weights["w4a16"] <= document["weight_target"] * weights["peer"]
    assert {"cpu", "threads", "versions", "commit", "shape", "routing", "inputs"} <= set(document)
    assert "| 32 |" in capsys.readouterr().out


def test_large_gathers_are_left_out(cpu_layer, monkeypatch):
    """A peer that would copy more weights than memory holds does not run, and the file says so."""
    monkeypatch.setattr(cpu_layer, "GATHER_LIMIT", cpu_layer.gathered_bytes(cpu_layer.SHAPE, 1))
    results = cpu_layer.measure((1, 32), seconds=0)["results"]
    assert [result["left_out"] for result in results] == [[], ["batched_mm"]]
    assert "batched_mm" not in results[1]["times"]
