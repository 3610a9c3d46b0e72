"""What of a conversion is finished, so that one that was interrupted goes on.

While it runs, the target holds ``.dsv4-convert.jsonl``: a first line that says what is converted and how, and a line
for each finished shard. A file is written beside its place and renamed into it, flushed to the disk before that, so
that whatever has its final name is whole; a shard whose line is missing is written again, to the same bytes. At the end
``dsv4_conversion.json`` takes the journal's place, and tells a second run that there is nothing to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.checkpoints.conversion.plan import SourceHeader
from dsv4.errors import CheckpointError, StateError

JOURNAL_NAME = ".dsv4-convert.jsonl"
RECORD_NAME = "dsv4_conversion.json"
_PARTIAL = ".dsv4-partial-"


@dataclass
class Journal:
    """The journal of a conversion under way.

    Attributes:
        path: its file.
        finished: shard name -> what was counted when it was written.
        scales: calibrated input scales as stored, None where the conversion has none.
    """

    path: Path
    finished: dict[str, dict[str, int]] = field(default_factory=dict)
    scales: dict[str, Any] | None = None

    @classmethod
    def create(cls, target: Path, conversion: Mapping[str, Any], scales: dict[str, Any] | None) -> Journal:
        """Begin a conversion in ``target``."""
        path = target / JOURNAL_NAME
        write_file(path, json.dumps({"conversion": conversion, "scales": scales}).encode() + b"\n")
        return cls(path, {}, scales)

    @classmethod
    def resume(cls, target: Path, conversion: Mapping[str, Any]) -> Journal | None:
        """The journal that ``target`` holds, None if it holds none.

        Raises:
            CheckpointError: it belongs to another source, or to other settings.
        """
        path = target / JOURNAL_NAME
        if not path.is_file():
            return None
        lines = path.read_bytes().split(b"\n")
        try:
            begun = json.loads(lines[0])
            found, scales = begun["conversion"], begun["scales"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a journal of dsv4 convert ({error}); remove {target} and start again"
            ) from error
        differing = sorted(key for key in conversion if found.get(key) != conversion[key])
        if differing:
            raise CheckpointError(
                f"{target}: holds an unfinished conversion of another source or with other settings (differing: "
                f"{', '.join(differing)}); repeat the command that began it, or remove the folder"
            )
        journal = cls(path, {}, scales)
        for line in lines[1:]:
            # The last line may be torn; its shard is then written again.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                journal.finished[str(entry["shard"])] = dict(entry["counts"])
        return journal

    def finish(self, shard: str, counts: Mapping[str, int]) -> None:
        """Take note of a shard that has its final name."""
        self.finished[shard] = dict(counts)
        # A newline first: what an earlier run tore off is then a line of its own.
        line = b"\n" + json.dumps({"shard": shard, "counts": self.finished[shard]}).encode() + b"\n"
        with writing(self.path), self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())


def fingerprint(headers: Mapping[Path, SourceHeader], others: Mapping[str, Path], folder: Path) -> tuple[str, str]:
    """Two digests of a source: of names, sizes, headers and times of change; and without the times.

    The first notices whatever happens to a source between two runs. The second is the same for a copy of the source,
    and belongs in the finished checkpoint.
    """
    with_times, without = hashlib.sha256(), hashlib.sha256()
    entries = [(file.relative_to(folder).as_posix(), file, header.digest) for file, header in headers.items()]
    entries += [(name, file, "") for name, file in others.items()]
    for name, file, digest in sorted(entries):
        status = file.stat()
        without.update(json.dumps([name, status.st_size, digest]).encode())
        with_times.update(json.dumps([name, status.st_size, digest, status.st_mtime_ns]).encode())
    return with_times.hexdigest(), without.hexdigest()


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep a second conversion out of ``target``; the lock ends with the process, however that ends.

    Raises:
        StateError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; renaming keeps files whole there too
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{target}: another conversion is writing to this folder; wait or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while ``path`` is written become one that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); what is finished is kept: {advice}, and repeat "
            f"the command to go on"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A file beside ``path``, open for writing, that is flushed and takes its place when the block ends well.

    Raises:
        CheckpointError: it cannot be written; nothing of it is left.
    """
    partial = path.parent / f".{path.name}{_PARTIAL}{os.getpid()}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        try:
            try:
                yield handle
                os.fsync(handle)
            finally:
                os.close(handle)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """All of ``data`` to ``offset``: a disk that fills up takes a part and says so only the next time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, data: bytes) -> None:
    """Write a small file, all of it or nothing; one that has these bytes already is left alone."""
    if path.is_file() and path.read_bytes() == data:
        return
    with replacing(path) as handle:
        write_all(handle, data, 0)


def leftovers(target: Path) -> list[Path]:
    """What interrupted runs left half-written."""
    return [path for path in target.rglob(f".*{_PARTIAL}*") if path.is_file()]


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
