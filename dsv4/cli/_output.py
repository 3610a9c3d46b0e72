"""What all commands share about their output: one JSON document, or text; and files that are never half there."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def dumps(document: Any) -> str:
    """JSON as all files and outputs here have it; NaN and Inf, which JSON does not know, are refused."""
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def print_json(document: Any) -> None:
    """The one JSON document that ``--json`` promises on stdout."""
    sys.stdout.write(dumps(document))
    sys.stdout.flush()


def console() -> Console:
    """stdout, wide enough that a table which is piped into a file is not cut; "[...]" in a text is no markup."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)


def note(text: str) -> None:
    """A line that is not the result, on stderr."""
    print(f"note: {text}", file=sys.stderr)


def quiet_transformers() -> None:
    """Import Transformers without what it and the packages that it imports would say on stderr; errors stay."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path``, with its suffix, to write to; it takes the place of ``path`` when the block ends well.

    Missing folders are made. If the block raises, ``path`` stays as it was and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        # mkstemp makes private files; the result should have the rights of any new file.
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, all of it or nothing."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(path: Path | None) -> None:
    """Fail before a long measurement rather than after it.

    Raises:
        OSError: ``path`` is a folder, or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: cannot write to {folder}")


def human_bytes(count: float) -> str:
    """``3.4 GB``: decimal units, two or three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count_of(number: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {noun}" + "s" * (number != 1)
