"""Feeds hostile checkpoints to dsv4 and holds it to ``hostile_oracle``; ``python -m checkpoints.fuzz --help``.

Of every case: it is refused with an exception of ``dsv4.errors`` that names the folder's file (and the tensor, where a
single one is at fault), or it is accepted and decodes to the oracle's values; what must be refused is refused, what is
beyond doubt is accepted; it takes less than ten seconds and, in a process of its own, no memory to speak of; nothing
in or around the folder changes.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from dsv4.checkpoints import Checkpoint, open_checkpoint
from dsv4.errors import CheckpointError, Dsv4Error

from .hostile import Hostile, hostile
from .hostile_folder import MODELOPT, Folder, build, write
from .hostile_formats import ORACLES
from .hostile_oracle import FormatOracle, Judgement, judge

SECONDS = 10
CHUNK, PATIENCE = 200, 600  # cases of one task, and seconds after which its process is ended
MEMORY = 256 << 20
LONGEST_MESSAGE = 3000
BLIND = ("flip_bits", "overwrite")  # mutations that may break several tensors at once


class Hang(BaseException):
    """A case that takes longer than :data:`SECONDS`."""


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        accepted, refused: cases with that outcome, by mutation where a case had only one.
        failures: seed -> what is wrong.
    """

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Cases."""
        return self.accepted.total() + self.refused.total()

    def add(self, other: Tally) -> None:
        self.accepted += other.accepted
        self.refused += other.refused
        self.failures |= other.failures


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raises :class:`Hang` in the block."""

    def ring(signum: int, frame: object) -> None:
        raise Hang(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path) -> str:
    """Open a checkpoint and load everything in it; returns its format's name."""
    with open_checkpoint(path) as checkpoint:
        for _ in checkpoint.iter_layers(on_missing_input_scale="dynamic"):
            pass
        return checkpoint.format.name


def problem(
    folder: Folder, path: Path, outside: Path, oracle: FormatOracle, *, single: bool = False
) -> tuple[bool, str]:
    """Write ``folder`` to ``path`` and read it: (accepted, what is wrong with that).

    ``single``: there is one thing wrong at most, so that a message has to name the tensor that the oracle names.
    """
    write(folder, path, outside)
    before = _listing(path)
    try:
        with time_limit():
            name = read(path)
    except Dsv4Error as error:
        # Where two formats could be meant the maker's decides; a reader that takes it for another may say so.
        wrong = _check_refusal(error, path, judge(folder, oracle), single)
        accepted = False
    except (Exception, Hang):
        return False, traceback.format_exc()
    else:
        verdict = judge(folder, ORACLES.get(name, oracle))
        wrong = f"accepted as {name}, but {verdict.refuse}" if verdict.refuse else _check_values(path, verdict)
        accepted = True
    if not wrong and _listing(path) != before:
        wrong = "the folder has changed"
    return accepted, wrong


def run(seeds: Sequence[int], root: Path) -> Tally:
    """All these seeds, one after the other, in folders below ``root``."""
    outside = root / "outside"
    if not outside.exists():
        outside.mkdir()
        write(build(MODELOPT, Random(0)), outside / "model", outside)
        shutil.copy(next((outside / "model").glob("*.safetensors")), outside / "model.safetensors")
        (outside / "config.json").write_text("{}")
    tally = Tally()
    path = root / "case"
    around = sorted(os.listdir(root))
    for seed in seeds:
        case = hostile(seed)
        accepted, wrong = problem(
            case.folder,
            path,
            outside,
            ORACLES[case.maker.name],
            single=len(case.steps) == 1 and case.steps[0] not in BLIND,
        )
        shutil.rmtree(path)
        if sorted(os.listdir(root)) != around:
            wrong = wrong or f"something was written beside the folder: {sorted(os.listdir(root))}"
        label = case.steps[0] if len(case.steps) == 1 else "several"
        (tally.accepted if accepted else tally.refused)[label] += 1
        if wrong:
            tally.failures[seed] = f"{describe(case)}: {wrong}"
    return tally


def describe(case: Hostile) -> str:
    """One line about a case."""
    return f"seed {case.seed} ({case.maker.name}: {', '.join(case.steps)})"


def _check_refusal(error: Dsv4Error, path: Path, verdict: Judgement, single: bool) -> str:
    text = str(error)
    if not verdict.refuse and not verdict.doubt:
        return f"refused a legal checkpoint: {text}"
    if not isinstance(error, CheckpointError) or str(path) not in text:
        return f"the message does not name the folder or file: {text}"
    if len(text) > LONGEST_MESSAGE or not text.replace("\n", " ").isprintable():
        return f"a message of {len(text)} characters, or with control characters: {text[:LONGEST_MESSAGE]!r}"
    if single and verdict.tensor and repr(verdict.tensor)[:200] not in text:
        return f"{verdict.refuse}: the message does not name tensor {verdict.tensor!r}: {text}"
    return ""


def _check_values(path: Path, verdict: Judgement) -> str:
    assert verdict.layers is not None
    assert verdict.tensors is not None
    with open_checkpoint(path) as checkpoint:
        oracle = ORACLES.get(checkpoint.format.name)
        if set(checkpoint.moe_layers) != set(verdict.layers):
            return f"accepted with layers {checkpoint.moe_layers}, expected {sorted(verdict.layers)}"
        if oracle is None:
            return ""
        for layer, experts in verdict.layers.items():
            for expert, names in experts.items():
                for projection in ("gate", "up", "down"):
                    found = _decoded(checkpoint, layer, expert, projection)
                    expected = oracle.decode(names, verdict.tensors, projection)
                    exact = expected.values.astype(np.float32)
                    if not np.all(np.abs(found.astype(np.float64) - exact) <= expected.tolerance):
                        return f"accepted with wrong values: layer {layer}, expert {expert}, {projection}"
    return ""


def _decoded(checkpoint: Checkpoint, layer: int, expert: int, projection: str) -> np.ndarray:
    values: np.ndarray = checkpoint.read_expert(layer, expert).projection(projection).dequantize().numpy()
    return values


def _listing(path: Path) -> list[tuple[str, int, int]]:
    found = ((entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path))
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in found)


def _limited(seeds: Sequence[int]) -> Tally:
    """:func:`run` in a process of its own that may take :data:`MEMORY` more than it has."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    logging.getLogger("dsv4").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # For code that does not come back to Python to hear the alarm of a single case.
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    with tempfile.TemporaryDirectory() as root:
        tally = run(seeds, Path(root))
    faulthandler.cancel_dump_traceback_later()
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.fuzz", description="Fuzz the reading of checkpoints.")
    parser.add_argument("--count", type=int, default=100_000, help="cases to run (default: 100000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed; case N is the same on every machine")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    parser.add_argument("--seconds", type=float, help="begin nothing after this long (default: no limit)")
    parser.add_argument("--keep", type=Path, help="write the first seed's folder here, and do nothing else")
    options = parser.parse_args(arguments)
    if options.keep is not None:
        case = hostile(options.first)
        write(case.folder, options.keep, options.keep.parent)
        print(describe(case))
        return 0
    start = time.perf_counter()
    tally = Tally()
    seeds = range(options.first, options.first + options.count)
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(options.jobs) as pool:
        pending = {pool.submit(_limited, chunk): chunk for chunk in chunks}
        for future in as_completed(pending):
            try:
                tally.add(future.result())
            except Exception as error:  # a crash: every chunk that was running is suspect, and named
                tally.failures[pending[future][0]] = f"seeds {pending[future]}: the process ended ({error!r})"
            seconds = time.perf_counter() - start
            print(
                f"\r{tally.total} of {len(seeds)}, {tally.total / seconds:.0f}/s", end="", file=sys.stderr, flush=True
            )
            if options.seconds and seconds > options.seconds:
                pool.shutdown(wait=True, cancel_futures=True)
                break
    print(file=sys.stderr)
    for text in tally.failures.values():
        print(text, file=sys.stderr)
    for name in sorted(tally.accepted.keys() | tally.refused.keys()):
        print(f"{name:20} refused {tally.refused[name]:7}  accepted {tally.accepted[name]:7}")
    print(
        f"{tally.total} hostile checkpoints in {time.perf_counter() - start:.0f} s: {tally.refused.total()} refused, "
        f"{tally.accepted.total()} accepted and equal to the oracle, {len(tally.failures)} failures"
    )
    return 1 if tally.failures or (tally.total != len(seeds) and not options.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
