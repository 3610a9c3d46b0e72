"""Conversions that are killed go on, and end with the same bytes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv4.checkpoints.conversion import convert
from dsv4.errors import StateError

from .convert_sources import folder_bytes, write_source

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("interrupted_conversion.py")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("kills", "kind", "seed"),
    [
        (6, "dense", 0),
        pytest.param(60, "dense", 1, marks=pytest.mark.slow),
        pytest.param(40, "modelopt", 2, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_points(kills, kind, seed, tmp_path):
    """After any number of SIGKILLs at random points, the conversion that goes on ends with the uninterrupted bytes."""
    source = write_source(tmp_path / "source", kind, shards=6)
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(source), str(tmp_path), str(kills), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["different"] == []
    assert len(result["shards_at_kill"]) == kills
    if kills >= 40:  # the kills reached all phases: before, between, within and after shards
        assert {0, 1, 2, 3, 4, 5} <= set(result["shards_at_kill"])
        assert result["partial"] > kills // 10


@pytest.mark.parametrize(
    "whole_group", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.slow)]
)
def test_killed_with_worker_processes(whole_group, tmp_path):
    """The command with --jobs 2 is killed, with or without its workers: these end too, and the next run goes on."""
    source = write_source(tmp_path / "source", "dense", shards=6)
    convert(source, tmp_path / "expected", activations="dynamic")
    target = tmp_path / "target"
    command = [sys.executable, "-m", "dsv4.cli", "convert", str(source), str(target), "--activations", "dynamic"]
    running = subprocess.Popen(
        [*command, "--jobs", "2"], env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not list(target.glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        if whole_group:
            os.killpg(running.pid, signal.SIGKILL)
        else:
            running.kill()
        running.wait()
    while _group_lives(running.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(running.pid)
    assert running.returncode == -signal.SIGKILL
    subprocess.run([*command, "--jobs", "2"], env=environment(), check=True, capture_output=True, timeout=120)
    assert folder_bytes(target) == folder_bytes(tmp_path / "expected")


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path):
    """One worker process is killed: one sentence that says so, the others are stopped, and the next run goes on."""
    source = write_source(tmp_path / "source", "dense", shards=6)
    convert(source, tmp_path / "expected", activations="dynamic")
    target = tmp_path / "target"

    def kill_one(verb: str, done: int, total: int) -> None:
        for child in multiprocessing.active_children()[:1]:
            if done > total // 3 and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(StateError, match=r"exit code -9.*what is finished is kept"):
        convert(source, target, activations="dynamic", jobs=2, progress=kill_one)
    assert multiprocessing.active_children() == []
    assert not list(target.glob(".*partial*"))
    assert convert(source, target, activations="dynamic").resumed_shards >= 1
    assert folder_bytes(target) == folder_bytes(tmp_path / "expected")


def _group_lives(group: int) -> bool:
    """Whether any process of a process group is there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


@pytest.mark.parametrize("tail", [b'\n{"shard": "model-00', b"\n\xff\xfe", b"\nnull\n", b'\n{"shard": 1}\n'])
def test_a_torn_journal_line_costs_a_shard_at_most(tail, tmp_path):
    """Whatever a crash left at the end of the journal, the conversion goes on and ends with the same bytes."""
    source = write_source(tmp_path / "source", "modelopt", shards=3)
    convert(source, tmp_path / "expected")
    target = tmp_path / "target"
    with contextlib.suppress(_Stop):
        convert(source, target, progress=_stop_halfway())
    journal = target / ".dsv4-convert.jsonl"
    journal.write_bytes(journal.read_bytes().rstrip(b"\n") + tail)
    convert(source, target)
    assert folder_bytes(target) == folder_bytes(tmp_path / "expected")


def test_a_missing_journal_line_means_the_shard_is_written_again(tmp_path):
    """A shard that has its name but no line in the journal (killed between the two) is not trusted: it is rewritten."""
    source = write_source(tmp_path / "source", "modelopt", shards=3)
    convert(source, tmp_path / "expected")
    target = tmp_path / "target"
    with contextlib.suppress(_Stop):
        convert(source, target, progress=_stop_halfway())
    finished = sorted(target.glob("*.safetensors"))
    assert len(finished) >= 1
    journal = target / ".dsv4-convert.jsonl"
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b"\n")
    finished[0].write_bytes(bytes(finished[0].stat().st_size))
    report = convert(source, target)
    assert report.resumed_shards == 0
    assert folder_bytes(target) == folder_bytes(tmp_path / "expected")


class _Stop(Exception):
    pass


def _stop_halfway():
    """Progress that raises once more than half of the bytes are written."""

    def progress(verb: str, done: int, total: int) -> None:
        if done > total // 2:
            raise _Stop

    return progress
