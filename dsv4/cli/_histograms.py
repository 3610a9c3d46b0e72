"""The picture of ``dsv4 inspect``: how scales and codes are distributed in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.cli._output import replacing
from dsv4.nvfp4 import E2M1_VALUES

_COLORS = {"global_scale_range": "#0072B2", "input_scale_range": "#E69F00"}
_LABELS = {"global_scale_range": "weights", "input_scale_range": "activations"}
_BY_VALUE = sorted(range(16), key=lambda code: (E2M1_VALUES[code], -code))
"""Codes from -6 to 6, with -0 (code 8) before 0."""


def plot_histograms(document: Mapping[str, Any], path: Path) -> None:
    """A row of pictures for block scales, for codes and for global scales; a column for each projection.

    A layer is a row of a picture: its colours are its histogram, in percent of its blocks or codes.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    layers = document["layers"]
    projections = list(layers[0]["projections"])
    figure = Figure(figsize=(12, 3.4 + 3 * min(3.2, 1 + 0.09 * len(layers))), layout="constrained")
    figure.suptitle(
        f"{Path(document['path']).resolve().name}: {document['format']}, {len(layers)} layers of "
        f"{document['num_experts']} experts",
        fontsize=12,
    )
    panels = figure.subplots(3, len(projections), squeeze=False)
    powers = [int(power) for power in layers[0]["projections"][projections[0]]["blocks_by_power_of_two"]]
    for column, projection in enumerate(projections):
        matrices = [layer["projections"][projection] for layer in layers]
        scales = [[m["zero_blocks"], *m["blocks_by_power_of_two"].values()] for m in matrices]
        codes = [[m["codes"][code] for code in _BY_VALUE] for m in matrices]
        blocks = _heat(panels[0][column], scales, LogNorm(0.01, 100), ["0", *(f"$2^{{{power}}}$" for power in powers)])
        panels[0][column].set_title(f"{projection}: block scales", fontsize=10)
        panels[0][column].set_xlabel("block scale, from this power of two to the next")
        values = _heat(panels[1][column], codes, Normalize(0, 20), [f"{E2M1_VALUES[code]:g}" for code in _BY_VALUE])
        panels[1][column].set_title(f"{projection}: e2m1 codes", fontsize=10)
        panels[1][column].set_xlabel("value of the code")
        _ranges(panels[2][column], layers, projection)
    bar = figure.colorbar(blocks, ax=panels[0].tolist(), fraction=0.05, pad=0.01, extend="min", format="%g")
    bar.set_label("% of blocks (white: none)", fontsize=8)
    bar = figure.colorbar(values, ax=panels[1].tolist(), fraction=0.05, pad=0.01, extend="max", format="%g")
    bar.set_label("% of codes (white: none)", fontsize=8)
    _share_limits(panels[2])
    for row in panels:
        row[0].set_ylabel("layer")
        for axes in row:
            _layer_ticks(axes, [layer["layer"] for layer in layers])
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)


def _heat(axes: Any, counts: Sequence[Sequence[int]], norm: Any, labels: Sequence[str]) -> Any:
    """Each row of ``counts`` in percent of its sum; what does not occur stays white."""
    percent = [[100 * n / sum(row) if n else float("nan") for n in row] for row in counts]
    image = axes.imshow(percent, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
    step = 1 if len(labels) <= 16 else 3
    axes.set_xticks(range(0, len(labels), step), labels[::step], fontsize=7)
    return image


def _ranges(axes: Any, layers: Sequence[Mapping[str, Any]], projection: str) -> None:
    """From the smallest to the largest global scale and input scale of each layer's experts."""
    for offset, kind in ((-0.15, "global_scale_range"), (0.15, "input_scale_range")):
        spans = [
            (place, span) for place, layer in enumerate(layers) if (span := _span(layer, projection, kind)) is not None
        ]
        if not spans:
            continue
        places = [place + offset for place, _ in spans]
        low, high = [span[0] for _, span in spans], [span[1] for _, span in spans]
        axes.hlines(places, low, high, color=_COLORS[kind], linewidth=2, label=_LABELS[kind])
        axes.plot(low + high, places * 2, "|", color=_COLORS[kind], markersize=6)
    axes.set_xscale("log")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_title(f"{projection}: global scales of experts", fontsize=10)
    axes.set_xlabel("smallest to largest multiplier, amax / 2688")
    axes.grid(visible=True, axis="x", color="0.92", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _share_limits(panels: Sequence[Any]) -> None:
    """One axis for all, from a power of ten to a power of ten, so that it has labels however narrow the ranges are."""
    low = min(axes.get_xlim()[0] for axes in panels)
    high = max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))


def _span(layer: Mapping[str, Any], projection: str, kind: str) -> Sequence[float] | None:
    if kind == "input_scale_range":
        span: Sequence[float] | None = layer["input_scales"][projection]["range"]
        return span
    span = layer["projections"][projection][kind]
    return span


def _layer_ticks(axes: Any, numbers: Sequence[int]) -> None:
    step = max(1, len(numbers) // 12)
    axes.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]], fontsize=8)
