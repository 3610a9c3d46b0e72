"""``dsv4 inspect``: what is in a checkpoint, and what looks wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.cli._output import check_writable, console, count_of, human_bytes, print_json

_SHOWN = 20  # findings of one severity that are printed; JSON has all


def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or the folder of a checkpoint.")],
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no weights: seconds for any size, but no word on values.")
    ] = False,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, such as 0,3,10-12 (default: all).")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw histograms of scales and codes per layer into this file (.png, ...).")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show a checkpoint's routed experts: format, shapes, bytes, ranges of all scales, and what looks wrong.

    Without --headers-only, every code and scale is read.

    Exit status 0: every expert that was looked at can be loaded.
    1: one cannot, or, with --strict, there are warnings.
    2: a command line that makes no sense.
    """
    if plot is not None and headers_only:
        raise typer.BadParameter("--plot draws values, --headers-only reads none: choose one")
    check_writable(plot)

    from dsv4.checkpoints import open_checkpoint
    from dsv4.cli._figures import check_matplotlib
    from dsv4.cli._inspection import chosen_layers, inspect_checkpoint

    if plot is not None:
        check_matplotlib(plot)
    with open_checkpoint(path) as checkpoint:
        document = inspect_checkpoint(
            checkpoint,
            chosen_layers(checkpoint, layers),
            headers_only=headers_only,
            progress=sys.stdout.isatty() and not json,
        )
    if plot is not None:
        from dsv4.cli._histograms import plot_histograms

        plot_histograms(document, plot)
    if json:
        print_json(document)
    else:
        _print(document)
        if plot is not None:
            print(f"written: {plot}")
    severities = {finding["severity"] for finding in document["findings"]}
    if "problem" in severities or (strict and "warning" in severities):
        raise typer.Exit(1)


def _print(document: dict[str, Any]) -> None:
    screen = console()
    configuration, looked_at = document["configuration"], document["layers"]
    screen.print(f"{document['path']}: {document['format']}", style="bold")
    screen.print(
        f"{count_of(document['files'], 'file')}, {human_bytes(document['bytes'])}; "
        f"{count_of(len(document['moe_layers']), 'layer')} of {document['num_experts']} experts, "
        f"hidden {document['hidden_size']}, intermediate {document['intermediate_size']}"
    )
    stated = [f"{name} {value}" for name, value in configuration.items() if value is not None]
    screen.print(f"configuration: {', '.join(stated) or 'says nothing about the experts'}")
    for title, part in (("routed experts", "expert_tensors"), ("everything else", "other_tensors")):
        dtypes = ", ".join(
            f"{name} {human_bytes(size)}" for name, size in sorted(document[part]["bytes_by_dtype"].items())
        )
        where = f" of {count_of(len(looked_at), 'layer')}" if part == "expert_tensors" else ""
        screen.print(f"{title}{where}: {document[part]['count']} tensors{f' ({dtypes})' if dtypes else ''}")
    if document["recoded"]:
        screen.print("cast from MXFP4: " + ", ".join(f"{name} {n}" for name, n in document["recoded"].items()))
    screen.print(_headers_table(looked_at) if document["headers_only"] else _values_table(looked_at))
    _print_findings(document)


def _headers_table(layers: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Headers alone: no values were read", title_justify="left")
    for column in ("layer", "tensors", "bytes", "experts with input scales (gate, up, down)", "unreadable"):
        table.add_column(column, justify="right")
    for layer in layers:
        present = ", ".join(str(scales["present"]) for scales in layer["input_scales"].values())
        unreadable = len(layer["unreadable_experts"])
        table.add_row(
            f"{layer['layer']}", f"{layer['tensors']}", human_bytes(layer["bytes"]), present, f"{unreadable or ''}"
        )
    return table


def _values_table(layers: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Scales, smallest to largest; shares of blocks of 16", title_justify="left")
    for column in (
        "layer",
        "matrix",
        "block scales",
        "saturated",
        "subnormal",
        "zero",
        "global scales",
        "input scales",
    ):
        table.add_column(column, justify="left" if column == "matrix" else "right", no_wrap=True)
    for layer in layers:
        for number, (name, matrix) in enumerate(layer["projections"].items()):
            blocks = matrix["blocks"] or 1
            table.add_row(
                f"{layer['layer']}" if number == 0 else "",
                name,
                _range(matrix["block_scale_range"]),
                *(f"{matrix[f'{kind}_blocks'] / blocks:.2%}" for kind in ("saturated", "subnormal", "zero")),
                _range(matrix["global_scale_range"]),
                _range(layer["input_scales"][name]["range"]),
                end_section=name == "down",
            )
    return table


def _range(values: Sequence[float] | None) -> str:
    return "-" if values is None else " to ".join(f"{value:.3g}" for value in dict.fromkeys(values))


def _print_findings(document: dict[str, Any]) -> None:
    screen = console()
    if not document["findings"]:
        looked = "headers" if document["headers_only"] else "values"
        screen.print(f"Nothing looks wrong ({looked} of {count_of(len(document['layers']), 'layer')}).", style="green")
    for severity, style in (("problem", "red"), ("warning", "yellow"), ("note", "")):
        found = [finding for finding in document["findings"] if finding["severity"] == severity]
        for finding in found[:_SHOWN]:
            screen.print(f"{severity}: {finding['message']}", style=style)
        if len(found) > _SHOWN:
            screen.print(f"... and {len(found) - _SHOWN} more; --json lists all", style=style)
