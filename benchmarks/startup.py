#!/usr/bin/env python3
"""How long a new process takes to its first launch, and how long the kernels take to compile beforehand.

    python benchmarks/startup.py [--shape v4-flash] [--backend hopper] [--runs 7] [--kernels DIR] [--output FILE]

In empty cache directories: first ``dsv4 compile`` of all that the model needs, which takes no GPU (and is left out
where ``--kernels`` names a $DSV4_CACHE_DIR that was filled elsewhere). Then, where there is
one, processes that build a layer and run one token: the first also lets Triton compile its stages and does the
backend's self-check, those after it find everything on disk, and their median is the time to quote. Seconds count from
the moment when torch was imported (``startup_process.py``). Before a number is quoted: nothing else may run on the
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dsv4.cli._machine import cpu_model, usable_cores, versions
from dsv4.cli._output import dumps, write_text
from dsv4.cli._shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """The JSON document that a Python process prints, and the seconds that it took from start to end.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout), time.perf_counter() - start


def in_folder(folder: Path) -> dict[str, str]:
    """An environment whose caches, of kernels, of Triton and of self-checks, are in ``folder``."""
    caches = {"DSV4_CACHE_DIR": "kernels", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "user"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {name: str(folder / part) for name, part in caches.items()} | {"PYTHONPATH": path}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON document."""
    shape = SHAPES[args.shape]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit or commit.stdout.strip() or None,
        "versions": versions(),
        "shape": args.shape,
    }
    with tempfile.TemporaryDirectory(prefix="dsv4-startup-") as folder:
        environment = in_folder(Path(folder))
        if args.kernels:
            environment["DSV4_CACHE_DIR"] = str(args.kernels)
        else:
            compiled, seconds = run(["-m", "dsv4.cli", "compile", "--shape", args.shape, "--json"], environment)
            document["compile"] = {
                "kernels": compiled["compiled"],
                "jobs": compiled["jobs"],
                "seconds": compiled["seconds"],
                "process_seconds": round(seconds, 1),
            }
        if document["gpu"] is not None:
            sizes = [str(n) for n in (shape.hidden_size, shape.intermediate_size, shape.top_k)]
            process = [str(Path(__file__).with_name("startup_process.py")), *sizes, args.backend]
            document["first_process"] = run(process, environment)[0]
            warm = [run(process, environment)[0] for _ in range(args.runs)]
            totals = [one["seconds"]["first run"] for one in warm]
            document["warm_processes"] = {"median_seconds": statistics.median(totals), "runs": warm}
    return document


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="v4-flash", choices=list(SHAPES))
    parser.add_argument("--backend", default="hopper")
    parser.add_argument("--runs", type=int, default=7, help="processes with warm caches")
    parser.add_argument("--kernels", type=Path, help="compiled elsewhere, by dsv4 compile with this DSV4_CACHE_DIR")
    parser.add_argument("--commit", help="of the code measured, where git is not at hand")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, and write where asked to."""
    args = parse()
    document = dumps(measure(args))
    print(document, end="")
    if args.output:
        write_text(args.output, document)


if __name__ == "__main__":
    main()
