"""The start-up benchmark, with processes that answer at once."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def startup(benchmarks):
    return importlib.import_module("startup")


@pytest.fixture
def processes(monkeypatch) -> list[list[str]]:
    """Every command is noted and answered: the first start of a layer is slow, the next take 1, 2, 3, ... seconds."""
    commands: list[list[str]] = []

    def run(command, **settings):
        commands.append(command)
        if command[0] == "git":
            return SimpleNamespace(returncode=0, stdout="abc\n")
        if "compile" in command:
            made = {"kernels": 50, "compiled": 42, "jobs": 2, "seconds": 1.5}
            return SimpleNamespace(returncode=0, stdout=json.dumps(made))
        seconds = sum(is_start(c) for c in commands) - 1 or 99
        line = {"seconds": {"first run": seconds}, "backend": "hopper", "loaded": [], "spawned": []}
        return SimpleNamespace(returncode=0, stdout=json.dumps(line))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def is_start(command: list[str]) -> bool:
    return any("startup_process.py" in word for word in command)


def test_document(startup, processes, monkeypatch, tmp_path, capsys):
    """The median is of processes with warm caches alone; the file has what a reader needs to repeat it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    output = tmp_path / "startup.json"
    monkeypatch.setattr(sys, "argv", ["startup.py", "--runs", "3", "--output", str(output)])
    startup.main()
    document = json.loads(output.read_text())
    assert document == json.loads(capsys.readouterr().out)
    assert (document["compile"]["kernels"], document["compile"]["jobs"]) == (42, 2)
    assert document["first_process"]["seconds"] == {"first run": 99}
    assert document["warm_processes"]["median_seconds"] == 2
    assert len(document["warm_processes"]["runs"]) == 3
    assert {"gpu", "cpu", "cores", "date", "commit", "versions", "shape"} <= set(document)


def test_without_a_gpu_only_compiling_is_timed(startup, processes, monkeypatch):
    """And no process is asked to launch anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    document = startup.measure(startup.parse([]))
    assert document["gpu"] is None
    assert "warm_processes" not in document
    assert not any(is_start(command) for command in processes)


def test_kernels_from_elsewhere_are_not_compiled(startup, processes, monkeypatch, tmp_path):
    """A machine without the compiler measures what a filled cache gives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    document = startup.measure(startup.parse(["--kernels", str(tmp_path), "--runs", "1"]))
    assert "compile" not in document
    assert not any("compile" in command for command in processes)
    assert sum(is_start(command) for command in processes) == 2


def test_caches_are_its_own(startup, tmp_path):
    """Nothing that this machine has cached makes a start look warm."""
    environment = startup.in_folder(tmp_path)
    for name in ("DSV4_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(environment[name]).parent == tmp_path


def test_a_failing_process_is_told(startup):
    """With its own words, instead of a time."""
    with pytest.raises(RuntimeError, match="no such luck"):
        startup.run(["-c", "raise SystemExit('no such luck')"], {})
