"""A progress bar for loading, drawn by rich where it is asked for and not imported otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv4.errors import ConfigError


@contextmanager
def progress_bar(enabled: bool, description: str, total: int, unit: str = "experts") -> Iterator[Callable[[], None]]:
    """A context that yields ``advance()``, to be called ``total`` times; without ``enabled`` it does nothing.

    Raises:
        ConfigError: a bar is asked for and rich is not installed.
    """
    if not enabled:
        yield lambda: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ConfigError(
            "progress=True needs the package 'rich'; install dsv4[cli], or pass progress=False"
        ) from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)
