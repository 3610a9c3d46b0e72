#!/usr/bin/env python3
"""Draw what ``gpu_layer.py`` measured: time against tokens with floor and peers, and a roofline.

    python benchmarks/plots.py [--results DIR] [--output DIR]

From every ``h200_*.json`` in ``benchmarks/results/`` come ``docs/<name>_time.png`` and ``docs/<name>_roofline.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peers import PEERS, best, peer_of

from dsv4.cli._measure import NVFP4_BYTES
from dsv4.cli._modes import MODES
from dsv4.cli._output import replacing
from dsv4.cli._shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
LEAST_POINTS = 3
"""Fewer numbers of tokens make no line."""


def series(document: Mapping[str, Any]) -> dict[str, tuple[str, str, list[tuple[int, float]]]]:
    """Contender -> label, colour, and (tokens, microseconds); of a peer with several, the faster at each number."""
    lines: dict[str, tuple[str, str, list[tuple[int, float]]]] = {}
    for mode in document["backends"]:
        points = [(row["tokens"], row["us"][mode]) for row in document["results"] if mode in row["us"]]
        lines[mode] = (f"dsv4 {MODES[mode].label}", MODES[mode].color, points)
    for name, entry in PEERS.items():
        times = [(row["tokens"], best(row["us"], name)) for row in document["results"]]
        found = [(tokens, us) for tokens, us in times if us is not None]
        if found:
            lines[name] = (entry.label, entry.color, found)
    return lines


def intensity(document: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Operations for each byte of the active experts' NVFP4 weights."""
    shape = SHAPES[document["shape"]]
    return shape.flops(row["tokens"]) / (row["active_experts"] * shape.expert_parameters * NVFP4_BYTES)


def draw_times(document: Mapping[str, Any], axes: Any) -> None:
    """Time of a layer against tokens, both logarithmic."""
    for name, (label, color, points) in series(document).items():
        style = "o-" if name in MODES else "s--"
        axes.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4, linewidth=1.4)
    rows = document["results"]
    tokens = [row["tokens"] for row in rows]
    axes.plot(tokens, [row["floor_us"] for row in rows], color="black", linewidth=1, label="floor of this chip")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("tokens in a call")
    axes.set_ylabel("time of one layer [µs]")


def draw_roofline(document: Mapping[str, Any], axes: Any) -> None:
    """Arithmetic rate against operations per byte of weights, under the chip's two ceilings."""
    rows = {row["tokens"]: row for row in document["results"]}
    flops = {tokens: SHAPES[document["shape"]].flops(tokens) for tokens in rows}
    x = {tokens: intensity(document, row) for tokens, row in rows.items()}
    for name, (label, color, points) in series(document).items():
        style = "o-" if name in MODES else "s--"
        y = [flops[tokens] / us / 1e6 for tokens, us in points]
        axes.plot([x[t] for t, _ in points], y, style, color=color, label=label, markersize=4, linewidth=1.4)
    ceilings = document["ceilings"]
    peak, slope = ceilings["bf16_tflop_per_s"], ceilings["read_gb_per_s"] / 1e3
    corner = peak / slope
    low, high = min(*x.values(), corner) / 1.5, max(*x.values(), corner) * 1.5
    axes.plot([low, corner, high], [low * slope, peak, peak], color="black", linewidth=1, label="roof of this chip")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte of the active experts' weights")
    axes.set_ylabel("TFLOP/s")


def draw(document: Mapping[str, Any], how: Callable[[Mapping[str, Any], Any], None], path: Path) -> None:
    """One picture, all of it or nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    how(document, axes)
    axes.set_title(f"{document['shape']}, {document['routing']} routing, {document['gpu']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=100)


def render(results: Path, output: Path) -> list[Path]:
    """Both pictures of every file that has enough numbers of tokens; the paths written."""
    written = []
    for file in sorted(results.glob("h200_*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        if len(document.get("results", ())) < LEAST_POINTS:
            continue
        unknown = [n for row in document["results"] for n in row["us"] if n not in MODES and peer_of(n) is None]
        if unknown:
            raise ValueError(
                f"{file}: found times of {', '.join(sorted(set(unknown)))}, expected modes and {list(PEERS)}"
            )
        for kind, how in (("time", draw_times), ("roofline", draw_roofline)):
            path = output / f"{file.stem}_{kind}.png"
            draw(document, how, path)
            written.append(path)
    return written


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    for path in render(args.results, args.output):
        print(path)


if __name__ == "__main__":
    main()
