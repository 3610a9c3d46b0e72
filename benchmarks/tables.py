#!/usr/bin/env python3
"""Write the tables in README.md from the JSON files in ``benchmarks/results/``, or check that they agree.

    python benchmarks/tables.py [--check]

A table stands between two comments, ``<!-- bench:cpu_layer -->`` and ``<!-- /bench -->``; everything between them is
generated. Where there is no JSON file yet, there is nothing between them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers import PEERS, best, peer_of
from vllm_generate import SETTINGS

from dsv4.cli._modes import MODES
from dsv4.cli._output import count_of, write_text

ROOT = Path(__file__).resolve().parent.parent


def cpu_layer_table(document: dict[str, Any]) -> str:
    """Markdown of ``cpu_layer.json``."""
    ours = list(document["backend"])
    weights = document["weight_bytes"]
    rows = [["tokens a call", "Transformers, bf16", *(f"dsv4 {MODES[name].label}" for name in ours), "target"]]
    for result in document["results"]:
        times, peer = result["times"], result["peer"]
        rows.append(
            [
                str(result["tokens"]),
                f"{_milliseconds(times[peer])} (`{peer}`)",
                *(f"{_milliseconds(times[name])} (**{result['ratios'][name]:.2f}x**)" for name in ours),
                f"{result['ratio_target']:g}x",
            ]
        )
    rows.append(
        [
            "weights",
            f"{weights['peer'] / 1e6:.1f} MB",
            *(f"{weights[name] / 1e6:.1f} MB (**{weights[name] / weights['peer']:.3f}x**)" for name in ours),
            f"{document['weight_target']:g}x",
        ]
    )
    versions = document["versions"]
    calls = min(timing["calls"] for result in document["results"] for timing in result["times"].values())
    source = (
        f"Medians of at least {calls} calls over {document['inputs']} rotating inputs; {document['cpu']}, "
        f"{count_of(document['threads'], 'thread')}, torch {versions['torch']}, Transformers "
        f"{versions['transformers']}, commit {document['commit']}. Targets are the most that is allowed."
    )
    return f"{_markdown(rows)}\n\n{source}"


def demo_table(document: dict[str, Any]) -> str:
    """Markdown of ``demo.json``."""
    rows = [["routed experts", "perplexity", "KL to bf16 [nats/token]", "same first choice", "bytes"]]
    base = document["rows"][0]
    for row in document["rows"]:
        reference = row is base
        change = "" if reference else f" ({row['perplexity'] / base['perplexity'] - 1:+.2%})"
        rows.append(
            [
                MODES[row["mode"]].label if row["mode"] in MODES else row["mode"],
                f"{row['perplexity']:.3f}{change}",
                "-" if reference else f"{row['kl']:.5f}",
                "-" if reference else f"{row['agreement']:.1%}",
                f"{row['expert_bytes'] / 1e6:.2f} MB",
            ]
        )
    return f"{_markdown(rows)}\n\n{document['tokens']:,} held-out tokens, in windows of {document['window']}."


def gpu_layer_table(document: dict[str, Any]) -> str:
    """Markdown of what ``gpu_layer.py`` writes.

    A peer has a column where it has a time in any row, with our speed beside it in the mode that computes the same:
    W4A4 for a peer that quantizes activations, W4A16 for the others.
    """
    ours = list(document["backends"])
    results = document["results"]
    found = [name for name in PEERS if any(best(result["us"], name) for result in results)]
    head = ["tokens a call", "floor", *(f"dsv4 {MODES[name].label}" for name in ours)]
    rows = [head + [_peer_head(name, results) for name in found]]
    for result in results:
        times = result["us"]
        row = [str(result["tokens"]), f"{result['floor_us']:,.0f}"]
        row += [
            f"{times[name]:,.0f} ({result['floor_us'] / times[name]:.0%})" if name in times else "-" for name in ours
        ]
        row += [_peer_cell(times, name, ours) for name in found]
        rows.append(row)
    versions = document["versions"]
    source = (
        f"Microseconds of one layer (share of the floor), {document['shape']}, {document['routing']} routing; "
        f"{document['gpu']}, torch {versions['torch']}, Triton {versions['triton']}, backend "
        f"{document['backends'][ours[0]]}, commit {document['commit']}."
    )
    return f"{_markdown(rows)}\n\n{source}"


def _peer_head(peer: str, results: Sequence[dict[str, Any]]) -> str:
    several = len({name for result in results for name in result["us"] if peer_of(name) == peer}) > 1
    return PEERS[peer].label + (", faster mode" if several else "")


def _peer_cell(times: dict[str, float], peer: str, ours: Sequence[str]) -> str:
    us = best(times, peer)
    if us is None:
        return "-"
    same = [name for name in ours if name in times and PEERS[peer].quantizes == (name != "w4a16")]
    if not same:
        return f"{us:,.0f}"
    return f"{us:,.0f} (dsv4 {us / min(times[name] for name in same):.2f}x its speed)"


def vllm_layers_table(document: dict[str, Any]) -> str:
    """Markdown of ``gpu_layer.py`` with vLLM's layers: its own kernels, and ours in their place with our speed beside
    the faster of these."""
    theirs = [name for name in ("vllm-marlin", "vllm-humming") if name in document["peers"]]
    ours = [name for name in document["peers"] if name not in theirs]
    rows = [["tokens a call", "floor", *(PEERS[name].label for name in (*theirs, *ours))]]
    for result in document["results"]:
        times = result["us"]
        row = [str(result["tokens"]), f"{result['floor_us']:,.0f}"]
        row += [f"{times[name]:,.0f}" if name in times else "-" for name in theirs]
        fastest = min((times[name] for name in theirs if name in times), default=None)
        for name in ours:
            ratio = f" ({fastest / times[name]:.2f}x)" if fastest and name in times else ""
            row.append(f"{times[name]:,.0f}{ratio}" if name in times else "-")
        rows.append(row)
    versions = document["versions"]
    source = (
        f"Microseconds of one layer (speed against the faster of vLLM's own), {document['shape']}, "
        f"{document['routing']} routing; {document['gpu']}, vLLM {versions['vllm']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, {document['peers'][ours[0]]['kernel']}, commit {document['commit']}."
    )
    return f"{_markdown(rows)}\n\n{source}"


def vllm_generate_table(document: dict[str, Any]) -> str:
    """Markdown of ``vllm_generate.py``: decoding and prefill of each setting, beside the first one."""
    runs = document["runs"]
    base = next(iter(runs))
    labels = {name: f"{SETTINGS[name].label} ({', '.join(run['experts'])})" for name, run in runs.items()}
    rows = [["sequences", *(f"{label}: decode, prefill" for label in labels.values())]]
    for row, first in enumerate(runs[base]["results"]):
        cells = [str(first["batch"])]
        for name, run in runs.items():
            parts = []
            for kind in ("decode_tokens_per_s", "prefill_tokens_per_s"):
                speed = run["results"][row][kind]
                ratio = "" if name == base else f" ({speed / first[kind]:.2f}x)"
                parts.append(f"{speed:,.0f}{ratio}")
            cells.append(", ".join(parts))
        rows.append(cells)
    model = document["model"]
    source = (
        f"Tokens per second, {document['prompt']} in and {document['tokens']} out; a Qwen3-MoE model of "
        f"{model['layers']} layers with random weights ({model['experts']} experts, {model['hidden']} x "
        f"{model['intermediate']}, top-{model['top_k']}), {document['attention']}; {runs[base]['gpu']}, vLLM "
        f"{runs[base]['vllm']}, torch {runs[base]['torch']}, commit {document['commit']}."
    )
    return f"{_markdown(rows)}\n\n{source}"


_SOURCES = {"dense": "bf16", "mxfp4": "MXFP4"}


def convert_table(document: dict[str, Any]) -> str:
    """Markdown of ``convert.json``."""
    rows = [["source", "converter", "MB/s of the source", "memory of its own"]]
    for result in document["results"]:
        size = f"{_SOURCES[result['kind']]}, {result['source']['bytes'] / 1e9:.1f} GB"
        for run in result["runs"]:
            name = "ModelOpt's functions" if run["name"] == "modelopt" else run["name"]
            if "shards" in run:
                name += f" ({run['shards']} of {result['source']['shards']} shards)"
            rows.append([size, name, f"{run['source_mb_per_s']:.0f}", f"{run['peak_anonymous_bytes'] / 1e6:.0f} MB"])
    source = (
        f"Experts of V4-Flash's shape, the source in the page cache; {document['cpu']}, "
        f"{count_of(document['cores'], 'core')}, torch {document['versions']['torch']}, commit {document['commit']}."
    )
    return f"{_markdown(rows)}\n\n{source}"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "bench:cpu_layer": ("cpu_layer.json", cpu_layer_table),
    "bench:cpu_layer_1_thread": ("cpu_layer_1_thread.json", cpu_layer_table),
    "bench:h200_v4_flash": ("h200_v4_flash.json", gpu_layer_table),
    "bench:h200_v4_flash_hopper": ("h200_v4_flash_hopper.json", gpu_layer_table),
    "bench:h200_v4_flash_hopper_zipf": ("h200_v4_flash_hopper_zipf.json", gpu_layer_table),
    "bench:h200_v4_pro_hopper": ("h200_v4_pro_hopper.json", gpu_layer_table),
    "bench:h200_v4_pro_hopper_8192": ("h200_v4_pro_hopper_8192.json", gpu_layer_table),
    "bench:h200_v4_pro_hopper_zipf": ("h200_v4_pro_hopper_zipf.json", gpu_layer_table),
    "bench:h200_vllm_layers": ("h200_vllm_layers.json", vllm_layers_table),
    "bench:h200_vllm_generate": ("h200_vllm_generate.json", vllm_generate_table),
    "bench:convert": ("convert.json", convert_table),
    "demo": ("demo.json", demo_table),
}
"""Name in the opening comment -> JSON file, and what makes the table."""


def render(readme: str, results: Path) -> str:
    """``readme`` with every table made anew.

    Raises:
        ValueError: the comments of a table that has results are missing.
    """
    for name, (file, table) in TABLES.items():
        path = results / file
        content = f"{table(json.loads(path.read_text(encoding='utf-8')))}\n" if path.is_file() else ""
        start, end = f"<!-- {name} -->", f"<!-- /{name.partition(':')[0]} -->"
        block = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
        if content and not block.search(readme):
            raise ValueError(f"no {start} ... {end}, each on a line of its own, for the table of {path}")
        readme = block.sub(partial(_fill, content), readme, count=1)
    return readme


def _fill(content: str, match: re.Match[str]) -> str:
    return f"{match[1]}{content}{match[2]}"


def _milliseconds(timing: dict[str, float]) -> str:
    milliseconds = timing["median_us"] / 1e3
    return f"{milliseconds:.0f} ms" if milliseconds >= 99.5 else f"{milliseconds:.3g} ms"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables are not up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    before = args.readme.read_text(encoding="utf-8")
    after = render(before, args.results)
    if args.check and before != after:
        sys.exit(f"{args.readme} does not agree with {args.results}: run python benchmarks/tables.py")
    if not args.check:
        write_text(args.readme, after)


if __name__ == "__main__":
    main()
