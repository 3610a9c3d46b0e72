"""Other lines for the Hopper backend's table: what a layer takes with each of them, and their kernels compiled.

    python benchmarks/tilings.py --shape v4-pro --line 32,48:4,2,3,1 --line 32,40:4,1,7,1 --compile
    python benchmarks/tilings.py --shape v4-pro --line 32,48:4,2,3,1 --line 32,40:4,1,7,1 --tokens 2048

A line is the main loops' widths, then warpgroups, K blocks, stages and programs of a multiprocessor, for both products;
beside the lines asked for stands the table as it is. W4A16, each proven against the reference before its time counts,
replayed in turn in one process. ``--compile`` fills the kernel cache on a machine with the DSL, a GPU is not needed;
whether ptxas waits for every single wgmma, as it does with too many loops, shows in the time alone. Calls of few tiles
take shapes of their own (``ONE_WAVE``, ``FEW_TILES``) and are no use here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import harness
import torch
from gpu_layer import calls_of, captured, mean_active_experts, our_contender
from harness import Contender
from peers.base import Setup

from dsv4.backends import hopper
from dsv4.backends.hopper import Tiling
from dsv4.cli._layer import Call, build_layer, random_weights
from dsv4.cli._modes import MODES
from dsv4.cli._shapes import SHAPES
from dsv4.cli.compile import default_jobs, fill
from dsv4.kernels.hopper.cache import ARCH, CACHE
from dsv4.kernels.hopper.config import HopperConfig
from dsv4.moe import Nvfp4MoE

MODE = "w4a16"
TABLE = "table"
"""The name of the table as it is, among lines."""


def line(text: str) -> Tiling:
    """``loops:warpgroups,blocks,stages,programs`` as a line that serves any number of rows; ``8,16+24,32-48`` are three
    loops, for 8, for 16 and 24, and for 32, 40 and 48."""
    try:
        left, right = text.split(":")
        ranges = [[[int(n) for n in ends.split("-", 1)] for ends in loop.split("+")] for loop in left.split(",")]
        loops = tuple(tuple(n for ends in loop for n in range(ends[0], ends[-1] + 1, 8)) for loop in ranges)
        warpgroups, blocks, stages, programs = (int(n) for n in right.split(","))
        widths = [n for loop in loops for n in loop]
        if widths != sorted({n for n in widths if n > 0 and n % 8 == 0}) or not all(loops):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: expected loops:warpgroups,blocks,stages,programs, widths of loops ascending multiples of 8"
        ) from None
    product = (warpgroups, blocks, stages, programs)
    return Tiling(float("inf"), loops, product, product)


def kernels(shape: str, lines: Sequence[Tiling]) -> list[HopperConfig]:
    """What calls of more than a few tokens launch under these lines."""
    config = SHAPES[shape].config(activation_format="bf16")
    found = []
    for one in lines:
        gemm2 = hopper._gemm2_config(config, one)
        found += [hopper._gemm1_config(config, one, quantize=False), gemm2, replace(gemm2, wide_out=True)]
    return found


@contextmanager
def room_for(lines: Sequence[Tiling]) -> Iterator[None]:
    """Layers that are built meanwhile have scratch for calls under any of these lines."""
    plan = hopper._plan

    def larger(config: Any) -> Any:
        with patch.object(hopper, "TILINGS", (*hopper.TILINGS, *lines)):
            return plan(config)

    with patch.object(hopper, "_plan", larger):
        yield


def contender(name: str, table: Sequence[Tiling], layer: Nvfp4MoE, calls: Sequence[Call]) -> Contender:
    """The layer, run under another table."""
    return replace(
        our_contender(MODE, layer, calls), name=name, context=lambda: patch.object(hopper, "TILINGS", tuple(table))
    )


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens: microseconds by line, best first, and what was left out."""
    shape, device = SHAPES[args.shape], torch.device(args.device)
    tokens_list = [int(n) for n in args.tokens.split(",")]
    weights = random_weights(shape, device)
    with room_for([one for _, one in args.lines]):
        layer = build_layer(shape, weights, MODES[MODE], max(tokens_list), device, "hopper")
    setup = Setup(shape, weights, tuple(tokens_list), device, None)
    stream = torch.cuda.Stream()
    for tokens in tokens_list:
        calls = calls_of(shape, tokens, args.routing, device)
        tables = {TABLE: hopper.TILINGS, **{text: (one,) for text, one in args.lines}}
        contenders = [contender(name, table, layer, calls) for name, table in tables.items()]
        graphs, _, left_out = captured(contenders, calls, setup, stream)
        us, _ = harness.interleaved({name: one.graph for name, one in graphs.items()}, len(calls))
        yield {
            "shape": args.shape,
            "tokens": tokens,
            "routing": args.routing,
            "floor_us": round(harness.floor_us(shape, tokens, mean_active_experts(calls)), 1),
            "us": dict(sorted(us.items(), key=lambda item: item[1])),
            "left_out": left_out,
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``lines`` are pairs of what was written and the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="v4-flash", choices=list(SHAPES))
    parser.add_argument("--line", dest="lines", action="append", default=[], type=lambda text: (text, line(text)))
    parser.add_argument("--tokens", default="1024")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="compile the lines' kernels, measure nothing")
    return parser.parse_args(arguments)


def main() -> None:
    """Compile, or measure and print."""
    args = parse()
    if args.compile:
        wanted = kernels(args.shape, [one for _, one in args.lines])
        fill(CACHE, CACHE.missing(wanted, ARCH), ARCH, default_jobs())
        return
    for row in measure(args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
