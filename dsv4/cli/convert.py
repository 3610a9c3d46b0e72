"""``dsv4 convert``: any readable checkpoint into ModelOpt's NVFP4 layout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4.cli._output import console, count_of, human_bytes, note, print_json

if TYPE_CHECKING:
    from dsv4.checkpoints.conversion import ConversionReport


class Activations(StrEnum):
    """The values of :data:`dsv4.checkpoints.conversion.Activations`."""

    STATIC = "static"
    WEIGHT_ONLY = "weight-only"
    DYNAMIC = "dynamic"


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint in any format that can be read.")],
    target: Annotated[Path, typer.Argument(help="A folder: new, empty, or with this conversion, finished or not.")],
    calibrate: Annotated[
        Path | None, typer.Option(help="Observe input scales on this text file, through Transformers.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of it, at most.")] = 32768,
    activations: Annotated[
        Activations | None,
        typer.Option(
            help="Without calibration: keep the source's input scales (static), or none: W4A16 (weight-only), or W4A4 "
            "with a scale a token (dynamic). Default: static where the source has them."
        ),
    ] = None,
    four_over_six: Annotated[
        bool, typer.Option("--four-over-six", help="Of bf16, fp16 or fp32: choose each block's scale between two.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes, a shard at a time each (default: by cores and size).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read the result again, compare it with the source.")] = False,
    device: Annotated[
        str | None, typer.Option(help="For calibration: cpu, cuda, ... (default: cuda where there is one).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Convert a checkpoint's routed experts to NVFP4 in ModelOpt's layout; all else passes through byte for byte.

    A conversion that was interrupted goes on when the same command is given again.
    """
    from dsv4.checkpoints import conversion
    from dsv4.cli._calibration import calibration

    observed = None
    if calibrate is not None:
        observed = calibration(calibrate, calibration_tokens, device, four_over_six=four_over_six)
    with _progress(sys.stderr.isatty() and not json) as progress:
        report = conversion.convert(
            source,
            target,
            activations=activations.value if activations is not None else None,
            calibration=observed,
            four_over_six=four_over_six,
            jobs=jobs,
            check=check,
            progress=progress,
        )
    if json:
        print_json(asdict(report))
    else:
        _print(report)
    if report.left_out:
        names = ", ".join(report.left_out[:4]) + (", ..." if len(report.left_out) > 4 else "")
        note(f"{count_of(len(report.left_out), 'file')} not copied (not of this checkpoint, or links): {names}")
    if report.activations != "static":
        note(
            f"no input scales: the configuration says {report.activations!r}, which dsv4 follows; engines with "
            f"static W4A4 scales need a conversion with --calibrate"
        )


@contextmanager
def _progress(enabled: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with rate and time left on stderr."""
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, tuple[object, int]] = {}

        def update(verb: str, done: int, total: int) -> None:
            if verb not in tasks:
                # What an earlier run did is no part of the rate: the bar starts where this run does.
                tasks[verb] = (bar.add_task(verb, total=total - done), done)
            task, start = tasks[verb]
            bar.update(task, completed=done - start)  # type: ignore[arg-type]

        yield update


def _print(report: ConversionReport) -> None:
    screen = console()
    if report.complete_before:
        screen.print(f"{report.target}: converted already, nothing to do")
    resumed = f", {report.resumed_shards} of them by an earlier run" if report.resumed_shards else ""
    share = report.expert_bytes / report.expert_source_bytes if report.expert_source_bytes else 0.0
    lines = [
        ("source", f"{report.source} ({report.format})"),
        ("target", f"{report.target}: {count_of(report.shards, 'shard')}{resumed}"),
        (
            "experts",
            f"{report.experts} in {count_of(report.layers, 'layer')}, {human_bytes(report.expert_source_bytes)} to "
            f"{human_bytes(report.expert_bytes)} ({share:.3f})",
        ),
        ("activations", report.activations),
        (
            "passed through",
            f"{count_of(report.passed_tensors, 'tensor')}, {human_bytes(report.passed_bytes)}; "
            f"{count_of(len(report.files), 'other file')}",
        ),
    ]
    if report.recoded:
        lines.append(("blocks", ", ".join(f"{count:,} {name}" for name, count in report.recoded.items())))
    if report.written_bytes:
        rate = report.written_bytes / report.seconds
        lines.append(
            ("written", f"{human_bytes(report.written_bytes)} in {report.seconds:.1f} s, {human_bytes(rate)}/s")
        )
    if report.checked:
        lines.append(("checked", "equal to the source, tensor by tensor and expert by expert"))
    for name, text in lines:
        screen.print(f"{name:15}{text}")
