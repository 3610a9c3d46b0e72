"""``dsv4 bench``: one layer on this machine."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.cli._modes import MODES, mode_names
from dsv4.cli._output import check_writable, console, count_of, dumps, human_bytes, print_json, write_text
from dsv4.cli._shapes import SHAPES, LayerShape


class Shape(StrEnum):
    """The names of :data:`SHAPES`."""

    SMALL = "small"
    V4_FLASH = "v4-flash"
    V4_PRO = "v4-pro"
    QWEN3_30B = "qwen3-30b"


class Routing(StrEnum):
    """The kinds of :func:`dsv4.cli._layer.random_topk_ids`."""

    UNIFORM = "uniform"
    ZIPF = "zipf"


def bench(
    shape: Annotated[Shape, typer.Option(help="A layer shape; the next four options change it.")] = Shape.SMALL,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts, E.")] = None,
    hidden: Annotated[int | None, typer.Option(min=16, help="Hidden size, H.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=16, help="Intermediate size of an expert, I.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token, k.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens a call, separated by commas.")] = "1,32,512",
    mode: Annotated[str, typer.Option(help=f"Any of {', '.join(MODES)}, separated by commas.")] = "w4a16,w4a4-token",
    routing: Annotated[Routing, typer.Option(help="All experts alike, or some far more popular.")] = Routing.UNIFORM,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")
    ] = None,
    backend: Annotated[str, typer.Option(help="A backend's name; see dsv4 doctor.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Different inputs and routings that take turns.")] = 8,
    seconds: Annotated[float, typer.Option(min=0, help="Time for each mode and number of tokens, at least.")] = 2.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time against tokens into this file (.png, .svg, .pdf).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Measure one layer of random NVFP4 weights: time, bandwidth, memory.

    Modes take turns call by call, inputs rotate, and medians are reported. On CUDA, calls are replayed as graphs.
    """
    changes = {
        "num_experts": experts,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "top_k": top_k,
    }
    layer_shape = replace(SHAPES[shape.value], **{key: value for key, value in changes.items() if value is not None})
    if layer_shape.top_k > layer_shape.num_experts:
        raise typer.BadParameter(f"--top-k {layer_shape.top_k} of {layer_shape.num_experts} experts")
    counts = _token_counts(tokens)
    modes = mode_names(mode, MODES)
    check_writable(plot)
    check_writable(output)

    import torch

    from dsv4.cli._figures import check_matplotlib, plot_times
    from dsv4.cli._machine import torch_device
    from dsv4.cli._measure import Plan, measure

    if plot is not None:
        check_matplotlib(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    document = measure(Plan(layer_shape, modes, counts, routing.value, torch_device(device), backend, inputs, seconds))
    if plot is not None:
        plot_times(document, plot)
    if output is not None:
        write_text(output, dumps(document))
    if json:
        print_json(document)
        return
    _print(document, layer_shape)
    for path in filter(None, (plot, output)):
        print(f"written: {path}")


def _token_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise typer.BadParameter(f"--tokens: expected positive integers separated by commas, found {text!r}")
    return list(dict.fromkeys(counts))


def _print(document: dict[str, Any], shape: LayerShape) -> None:
    from rich.table import Table

    threads = document["threads"]
    where = document["device"] + (f", {count_of(threads, 'thread')}" if threads else "")
    table = Table(title=f"{shape}, {document['routing']} routing\n{where}", title_style="bold")
    for column in ("mode", "backend", "tokens", "us per call", "p10 - p90", "active experts", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("mode", "backend") else "right", no_wrap=True)
    for point in document["results"]:
        table.add_row(
            MODES[point["mode"]].label,
            document["modes"][point["mode"]]["backend"],
            f"{point['tokens']}",
            f"{point['median_us']:,.0f}",
            f"{point['p10_us']:,.0f} - {point['p90_us']:,.0f}",
            f"{point['active_experts']:.1f}",
            f"{point['weight_gb_per_s']:.2f}",
            f"{point['gflop_per_s']:.1f}",
        )
    screen = console()
    screen.print(table)
    screen.print("us per call: median; GB/s: packed weights of the active experts, each read once")
    for name, facts in document["modes"].items():
        share = facts["weight_bytes"] / facts["weight_bytes_bf16"]
        screen.print(
            f"{MODES[name].label}: weights {human_bytes(facts['weight_bytes'])}, {share:.3f} of bf16's "
            f"{human_bytes(facts['weight_bytes_bf16'])}; workspace {human_bytes(facts['workspace_bytes'])}"
        )
