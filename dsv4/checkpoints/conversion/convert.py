"""The whole conversion: what to do, what is done already, doing it, and saying what was done."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv4 import __version__
from dsv4.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsv4.checkpoints.conversion.configuration import target_config, target_index
from dsv4.checkpoints.conversion.journal import (
    JOURNAL_NAME,
    RECORD_NAME,
    Journal,
    fingerprint,
    leftovers,
    locked,
    replacing,
    write_all,
    write_file,
    writing,
)
from dsv4.checkpoints.conversion.plan import ShardPlan, plan_shards, read_header
from dsv4.checkpoints.conversion.scales import Activations, Calibration, LayerScales, choose_activations
from dsv4.checkpoints.conversion.shards import CheckShard, WriteShard
from dsv4.checkpoints.conversion.workers import run_shards
from dsv4.checkpoints.files import INDEX_NAME
from dsv4.checkpoints.modelopt import ModelOptNvfp4
from dsv4.checkpoints.quantization import HF_QUANT_CONFIG
from dsv4.errors import CheckpointError, ConfigError

_CHUNK = 4 << 20
_BYTES_A_PROCESS = 1 << 30

Progress = Callable[[str, int, int], None]
"""Called with what is going on (``"convert"`` or ``"check"``), bytes done and bytes in all."""


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert` did. Counts are of the whole conversion, shards of earlier runs included.

    Attributes:
        source, target: folders.
        format: of the source's experts.
        activations: what the target has: input scales (``"static"``), or what to do without.
        layers, experts: MoE layers, and routed experts in all of them.
        shards: files of the target.
        resumed_shards: how many of them an earlier run had finished.
        expert_source_bytes, expert_bytes: what routed experts take before and after.
        passed_tensors, passed_bytes: other tensors, passed through byte for byte.
        files: other files that were copied.
        left_out: files of the source's folder that were not: links out of it, weights that are not the checkpoint's.
        recoded: for sources that are re-coded rather than quantized, how their blocks fared, by count; else empty.
        seconds: of this run.
        written_bytes: of shards, in this run.
        complete_before: there was nothing left to do.
        checked: the target was read again and compared.
    """

    source: str
    target: str
    format: str
    activations: Activations
    layers: int
    experts: int
    shards: int
    resumed_shards: int
    expert_source_bytes: int
    expert_bytes: int
    passed_tensors: int
    passed_bytes: int
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    recoded: Mapping[str, int]
    seconds: float
    written_bytes: int
    complete_before: bool
    checked: bool


def convert(
    source: str | Path,
    target: str | Path,
    *,
    activations: Activations | None = None,
    calibration: Calibration | None = None,
    four_over_six: bool = False,
    jobs: int | None = None,
    check: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the checkpoint ``source`` to the folder ``target`` with its routed experts in ModelOpt's NVFP4 layout.

    The target has the source's shards, by name; other tensors and files are passed through byte for byte, the index and
    the quantization section of ``config.json`` are rewritten. Memory is that of one expert beyond the mapped pages of
    one shard, in each process. A conversion that was interrupted, at any point and by whatever, goes on when it is
    called again with the same arguments, and ends with the same bytes.

    Args:
        source: anything that :func:`~dsv4.checkpoints.open_checkpoint` opens.
        target: a folder that is new, empty, or holds this conversion, finished or not.
        activations: None keeps the source's input scales, or what it records instead. ``"weight-only"`` and
            ``"dynamic"`` drop them.
        calibration: where input scales come from, instead of the source.
        four_over_six: of a floating-point source: quantize with 4-over-6 block scales (see :mod:`dsv4.nvfp4`).
        jobs: processes; None takes one a core, and no more than one for each GiB that is to be written: starting one
            takes seconds. The result does not depend on it.
        check: afterwards, read the target again and compare it with the source.
        progress: told of progress.

    Raises:
        CheckpointError: the source cannot be read or not be converted, or the target is not empty or not writable.
            Whatever was finished by then stays, and is not done again.
        ConfigError: the source has no input scales, and nothing says what to do about that.
        StateError: another conversion is writing to ``target``, or a worker process was killed.
    """
    started = time.perf_counter()
    target = Path(target)
    with open_checkpoint(source, four_over_six=four_over_six) as checkpoint:
        # By its path on this disk: an id would be looked up again, and might have moved on.
        path = checkpoint.path if checkpoint.path.is_file() else checkpoint.folder
        reopen = partial(open_checkpoint, path, four_over_six=four_over_six)
        conversion = _Conversion(checkpoint, reopen, target, choose_activations(checkpoint, activations, calibration))
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        with locked(target):
            resumed, written, complete = conversion.write(calibration, jobs, progress)
            if check:
                conversion.check(calibration, jobs, progress)
        counts = conversion.counts
        return ConversionReport(
            str(source),
            str(target),
            checkpoint.format.name,
            conversion.activations,
            len(checkpoint.moe_layers),
            counts.pop("experts", 0),
            len(conversion.plans),
            resumed,
            counts.pop("expert_source_bytes", 0),
            counts.pop("expert_bytes", 0),
            counts.pop("passed_tensors", 0),
            counts.pop("passed_bytes", 0),
            tuple(conversion.others),
            conversion.left_out,
            {name.removeprefix("recoded_"): count for name, count in counts.items()},
            time.perf_counter() - started,
            written,
            complete,
            check,
        )


class _Conversion:
    """One conversion; see :func:`convert`."""

    def __init__(
        self, checkpoint: Checkpoint, reopen: partial[Checkpoint], target: Path, activations: Activations
    ) -> None:
        _check_apart(checkpoint.folder, target)
        self.checkpoint = checkpoint
        self._reopen = reopen
        self.target = target
        self.activations = activations
        headers = {file: read_header(file) for file in sorted({info.file for info in checkpoint.source.values()})}
        self.plans: Sequence[ShardPlan] = plan_shards(checkpoint, headers, input_scales=activations == "static")
        self.others, self.left_out = _other_files(checkpoint)
        config = checkpoint.folder / "config.json"
        watched = {**self.others, **({"config.json": config} if config.is_file() else {})}
        self._fingerprints = fingerprint(headers, watched, checkpoint.folder)
        self._config = target_config(checkpoint, activations)
        self._scales: Mapping[int, LayerScales] | None = None
        self.counts: dict[str, int] = {}

    def write(
        self, calibration: Calibration | None, jobs: int | None, progress: Progress | None
    ) -> tuple[int, int, bool]:
        """Write what is not there yet: (shards there before, bytes written, whether all was there before)."""
        self._remove_leftovers()
        settings = {
            "dsv4": __version__,
            "activations": self.activations,
            "four_over_six": self._reopen.keywords["four_over_six"],
            "calibration": calibration.identity if calibration is not None else None,
        }
        with_times, without_times = self._fingerprints
        record = {**settings, "source": without_times}
        journal = Journal.resume(self.target, {**settings, "source": with_times})
        if journal is None:
            if self._is_complete(record):
                return len(self.plans), 0, True
            self._check_space(self.plans)
            scales = _to_json(calibration.run(self.checkpoint.folder)) if calibration is not None else None
            journal = Journal.create(self.target, {**settings, "source": with_times}, scales)
        self._scales = _from_json(journal.scales)
        missing = [plan for plan in self.plans if not (plan.name in journal.finished and self._has(plan))]
        self._check_space(missing)

        def finished(plan: ShardPlan, counts: dict[str, int]) -> None:
            journal.finish(plan.name, counts)

        work = WriteShard(self.target, self.activations, self._scales)
        try:
            self._run(missing, work, jobs, progress, "convert", finished)
        finally:
            self._remove_leftovers()  # of processes that were stopped
        self.counts = _sum(journal.finished[plan.name] for plan in self.plans)
        for name, file in self.others.items():
            _copy(file, self.target / name)
        self._write_json(INDEX_NAME, target_index(self.checkpoint, self.plans))
        self._write_json("config.json", self._config)
        self._write_json(RECORD_NAME, {**record, "format": self.checkpoint.format.name, "counts": self.counts})
        with writing(journal.path):
            journal.path.unlink()
        return len(self.plans) - len(missing), sum(plan.size for plan in missing), False

    def check(self, calibration: Calibration | None, jobs: int | None, progress: Progress | None) -> None:
        """Compare everything that was written with the source."""
        for name, file in self.others.items():
            if not _same(file, self.target / name):
                raise CheckpointError(f"{self.target / name}: differs from {file}")
        for name, expected in (("config.json", self._config), (INDEX_NAME, target_index(self.checkpoint, self.plans))):
            if expected is not None and (self.target / name).read_bytes() != _dumps(expected):
                raise CheckpointError(f"{self.target / name}: differs from what was written")
        work = CheckShard(self.target, self.activations, self._scales, calibration is not None)
        self._run(self.plans, work, jobs, progress, "check", lambda plan, counts: None)

    def _run(
        self,
        plans: Sequence[ShardPlan],
        work: Any,
        jobs: int | None,
        progress: Progress | None,
        verb: str,
        finished: Callable[[ShardPlan, dict[str, int]], None],
    ) -> None:
        total = sum(plan.size for plan in self.plans)
        done = total - sum(plan.size for plan in plans)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(verb, done, total)

        advance(0)
        if jobs is None:
            jobs = min(os.cpu_count() or 1, 1 + sum(plan.size for plan in plans) // _BYTES_A_PROCESS)
        run_shards(self.checkpoint, self._reopen, plans, work, jobs, advance=advance, finished=finished)

    def _is_complete(self, record: Mapping[str, Any]) -> bool:
        """Whether this conversion is finished.

        Raises:
            CheckpointError: the folder holds anything else.
        """
        entries = sorted(path.name for path in self.target.iterdir() if path.name != JOURNAL_NAME)
        if not entries:
            return False
        try:
            found = json.loads((self.target / RECORD_NAME).read_bytes())
            counts = {str(name): int(count) for name, count in found["counts"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{self.target}: expected a new or empty folder, found {entries[:8]}; nothing of it was touched"
            ) from None
        differing = sorted(key for key in record if found.get(key) != record[key])
        if differing:
            raise CheckpointError(
                f"{self.target}: holds the finished conversion of another source or with other settings (differing: "
                f"{', '.join(differing)}); choose another folder"
            )
        damaged = [plan.name for plan in self.plans if not self._has(plan)]
        if damaged:
            raise CheckpointError(
                f"{self.target / damaged[0]}: missing or of another size, in a finished conversion; remove the folder "
                f"and convert again"
            )
        self.counts = counts
        return True

    def _remove_leftovers(self) -> None:
        for path in leftovers(self.target):
            with writing(path):
                path.unlink(missing_ok=True)

    def _has(self, plan: ShardPlan) -> bool:
        file = self.target / plan.name
        return file.is_file() and file.stat().st_size == plan.size

    def _check_space(self, plans: Iterable[ShardPlan]) -> None:
        needed = sum(plan.size for plan in plans) + sum(file.stat().st_size for file in self.others.values())
        free = shutil.disk_usage(self.target).free
        if needed > free:
            raise CheckpointError(
                f"{self.target}: {needed:,} bytes are still to be written, and {free:,} are free; free some space, or "
                f"choose another disk"
            )

    def _write_json(self, name: str, document: dict[str, Any] | None) -> None:
        if document is not None:
            write_file(self.target / name, _dumps(document))


def _dumps(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for entry in counts:
        for name, count in entry.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))


def _to_json(scales: Mapping[int, LayerScales]) -> dict[str, Any]:
    return {str(layer): [list(part) for part in parts] for layer, parts in scales.items()}


def _from_json(scales: Mapping[str, Any] | None) -> dict[int, LayerScales] | None:
    if scales is None:
        return None
    return {int(layer): (tuple(l1), tuple(l2)) for layer, (l1, l2) in scales.items()}


def _check_apart(source: Path, target: Path) -> None:
    """Refuse to write into the source, and to have the source be part of the target."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"{target}: source and target must not lie in each other; the source is {source}")


def _other_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What is beside the shards, by relative name, and what of it is left out.

    Weights in other files (``.safetensors`` that the index does not name) are not this checkpoint's; hidden files are a
    tool's; links out of the folder are not followed.
    """
    folder = checkpoint.folder
    root = folder.resolve()
    # The files of a snapshot in the Hugging Face cache are links to the blobs of its repository.
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    shards = {info.file for info in checkpoint.source.values()}
    written = {INDEX_NAME, "config.json", RECORD_NAME}
    if not isinstance(checkpoint.format, ModelOptNvfp4):
        written.add(HF_QUANT_CONFIG)  # it would contradict config.json
    others: dict[str, Path] = {}
    left_out = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or file in shards or name in written or any(p.startswith(".") for p in name.split("/")):
            continue
        real = Path(os.path.realpath(file))  # which, other than resolve(), does not raise for links in a circle
        if file.suffix == ".safetensors" or not any(real.is_relative_to(parent) for parent in inside):
            left_out.append(name)
        elif file.is_file():
            others[name] = file
    return others, tuple(left_out)


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and filecmp.cmp(source, target, shallow=False)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, all of it or nothing."""
    if _same(source, target):
        return
    with replacing(target) as handle, source.open("rb") as stream:
        offset = 0
        while data := stream.read(_CHUNK):
            write_all(handle, data, offset)
            offset += len(data)
