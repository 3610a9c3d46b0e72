"""``dsv4 verify``: layers of a checkpoint through a backend, beside a float64 oracle."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4.cli._modes import MODES, mode_names
from dsv4.cli._output import check_writable, console, count_of, dumps, print_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

_MODES = ("w4a16", "w4a4-static", "w4a4-token")


def verify(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or the folder of a checkpoint.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers, such as 0,3,10-12, or all (default: the first, a middle one, the last).")
    ] = None,
    experts: Annotated[int, typer.Option(min=0, help="Experts of each layer, evenly spread; 0 is all.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a call.")] = 64,
    mode: Annotated[str, typer.Option(help="Any of these, separated by commas. Static needs input scales.")] = ",".join(
        _MODES
    ),
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")
    ] = None,
    backend: Annotated[str, typer.Option(help="A backend's name; see dsv4 doctor.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random tokens and routing.")] = 0,
    report: Annotated[
        Path | None, typer.Option(help="Write a report to send: the text to FILE, its numbers to FILE with .json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Compare a backend, stage by stage, with float64 arithmetic on layers of a checkpoint.

    Both sides have the same quantized weights; the float64 side runs on the CPU.

    Exit status 0: every stage is within 3e-3 (relative L2); a library's own numerics are held to 5e-2.
    1: one is not, or the checkpoint cannot be read.
    2: a command line that makes no sense.
    """
    modes = mode_names(mode, _MODES)
    check_writable(report)
    text_file, json_file = _report_files(report)
    check_writable(text_file)
    check_writable(json_file)

    from dsv4.checkpoints import open_checkpoint
    from dsv4.checkpoints.progress import progress_bar
    from dsv4.cli._inspection import chosen_layers
    from dsv4.cli._machine import torch_device
    from dsv4.cli._verification import Plan, verify_checkpoint

    with open_checkpoint(path) as checkpoint:
        present = checkpoint.moe_layers
        wanted = sorted({present[0], present[len(present) // 2], present[-1]})
        if layers is not None:
            wanted = chosen_layers(checkpoint, None if layers == "all" else layers)
        plan = Plan(wanted, modes, tokens, experts or None, torch_device(device), backend, seed)
        with progress_bar(sys.stdout.isatty() and not json, "verify", len(wanted), "layers") as advance:
            document = verify_checkpoint(checkpoint, plan, advance)
    if text_file is not None and json_file is not None:
        write_text(text_file, _as_text(document))
        write_text(json_file, dumps(document))
    if json:
        print_json(document)
    else:
        _print(document, console())
        if text_file is not None:
            print(f"written: {text_file}, {json_file}")
    if not document["passed"]:
        raise typer.Exit(1)


def _report_files(report: Path | None) -> tuple[Path | None, Path | None]:
    if report is None:
        return None, None
    if report.suffix == ".json":
        return report.with_suffix(".txt"), report
    return report, report.with_suffix(".json")


def _as_text(document: Mapping[str, Any]) -> str:
    """What ``_print`` shows, as plain text."""
    import io

    from rich.console import Console

    screen = Console(file=io.StringIO(), width=120, highlight=False, markup=False, color_system=None)
    _print(document, screen)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


def _print(document: Mapping[str, Any], screen: Console) -> None:
    versions = document["versions"]
    screen.print("  ".join(f"{name} {version}" for name, version in versions.items() if version), style="bold")
    screen.print(f"{document['system']}, {document['device']}: {document['device_name']}")
    for name, reason in document["backends"].items():
        screen.print(f"backend {name}: {reason}")
    limit = document["swiglu_limit"]
    screen.print(
        f"{document['path']}: {document['format']}, {document['num_experts']} experts, hidden "
        f"{document['hidden_size']}, intermediate {document['intermediate_size']}, "
        f"{'no SwiGLU limit' if limit is None else f'SwiGLU limit {limit:g}'}; "
        f"{count_of(document['tokens'], 'token')} a call, seed {document['seed']}"
    )
    screen.print(_table(document))
    for line in _remarks(document):
        screen.print(line)
    verdict = "PASSED" if document["passed"] else "FAILED"
    screen.print(
        f"{verdict}: the bar is a relative L2 of {document['bar']:g} from float64, for every stage"
        f"{_library_bar(document)}",
        style="green" if document["passed"] else "red",
    )


def _library_bar(document: Mapping[str, Any]) -> str:
    bars = {entry["bar"] for entry in document["results"] if "numerics" in entry}
    return "".join(f" ({bar:g} for library numerics)" for bar in bars)


def _table(document: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Relative L2 from float64, the worst of all experts", title_justify="left")
    columns = ("layer", "mode", "backend", "gate", "up", "activation", "codes equal", "down", "output", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("mode", "backend", "") else "right", no_wrap=True)
    for entry in document["results"]:
        label = MODES[entry["mode"]].label
        if "skipped" in entry:
            table.add_row(f"{entry['layer']}", label, "-", *["-"] * 6, "skipped")
            continue
        stages = entry["stages"]
        errors = {name: _error(stage) for name, stage in stages.items()}
        agreement = stages["activation"]["agreement"]
        table.add_row(
            f"{entry['layer']}",
            label,
            entry["backend"],
            errors["gate"],
            errors["up"],
            errors["activation"],
            "-" if agreement is None else f"{agreement:.3%}",
            errors["down"],
            errors["output"],
            "ok" if entry["passed"] else "FAILED",
        )
    return table


def _error(stage: Mapping[str, Any]) -> str:
    text = "raised" if stage["problem"] else "NaN" if stage["error"] is None else f"{stage['error']:.1e}"
    return text if stage["passed"] else f"{text} !"


def _remarks(document: Mapping[str, Any]) -> list[str]:
    """What the table has no room for: where a stage failed, what was skipped, casts."""
    lines = []
    for entry in document["results"]:
        where = f"layer {entry['layer']}, {MODES[entry['mode']].label}"
        if "skipped" in entry:
            lines.append(f"{where}: skipped, {entry['skipped']}")
            continue
        if "numerics" in entry:
            worst = max((stage["error"] or math.inf for stage in entry["stages"].values()), default=math.inf)
            lines.append(
                f"{where}: {entry['backend']} has library numerics: at most {worst:.1e} from float64 in any stage, "
                f"held to {entry['bar']:g}"
            )
        for name, stage in entry["stages"].items():
            if stage["problem"]:
                lines.append(f"{where}, {name}: {stage['problem']}")
            elif not stage["passed"]:
                error = "not finite" if stage["error"] is None else f"{stage['error']:.2e} from float64"
                expert = "" if stage["expert"] is None else f", worst for expert {stage['expert']}"
                lines.append(f"{where}, {name}: {error}{expert}")
    for layer, recoded in {
        entry["layer"]: entry["recoded"] for entry in document["results"] if "recoded" in entry
    }.items():
        lines.append(f"layer {layer}, cast from MXFP4: {', '.join(f'{name} {n}' for name, n in recoded.items())}")
    return lines
