"""Converts a checkpoint again and again and kills it: run as a program by the tests.

    python interrupted_conversion.py SOURCE FOLDER KILLS SEED

Each conversion is a forked process (so that torch is imported once), and is killed with SIGKILL after a random time of
at most what a whole one takes; then, twice in three, the conversion that goes on is killed too, and so on. Prints one
JSON document: how often a conversion was killed, after how many finished shards, and which targets differ in the end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from dsv4.checkpoints.conversion import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoints.convert_sources import folder_bytes


def start(source: Path, target: Path) -> int:
    """A process that converts; exits with 0 when it is done."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            convert(source, target, activations="dynamic")
            code = 0
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    source, folder, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    began = time.perf_counter()
    assert finish(start(source, folder / "expected")) == 0
    whole = time.perf_counter() - began
    expected = folder_bytes(folder / "expected")
    shards_at_kill: list[int] = []
    partial, different = 0, []
    while len(shards_at_kill) < kills:
        target = folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        while True:
            child = start(source, target)
            time.sleep(rng.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
            if finish(child) == 0:
                break  # it was done before that
            shards_at_kill.append(len(list(target.glob("*.safetensors"))))
            partial += bool(list(target.glob(".*partial*")))
            if rng.random() < 1 / 3 or len(shards_at_kill) == kills:
                break
        if finish(start(source, target)) != 0:
            different.append("a conversion that did not go on")
            break
        found = folder_bytes(target)
        different += [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    print(json.dumps({"shards_at_kill": shards_at_kill, "partial": partial, "different": different, "seconds": whole}))


if __name__ == "__main__":
    main()
