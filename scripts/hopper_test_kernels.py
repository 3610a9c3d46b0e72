#!/usr/bin/env python3
"""Compile the Hopper kernels that tests and benchmarks launch, for a GPU machine that has no CuTe DSL.

    DSV4_CACHE_DIR=folder python scripts/hopper_test_kernels.py [--count]

Takes minutes and no GPU. Then, with the same folder as ``DSV4_CACHE_DIR`` on that machine, the tests of the
``hopper`` backend, of whole layers and of the vLLM plug-in find every kernel, as do ``benchmarks/gpu_layer.py`` for
V4-Flash and V4-Pro and ``benchmarks/vllm_generate.py``. ``dsv4 compile`` does this for one model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from dsv4 import MoEConfig
from dsv4.backends.hopper import kernels
from dsv4.backends.proof import configurations
from dsv4.cli._shapes import SHAPES
from dsv4.cli.compile import default_jobs, fill
from dsv4.config import RouteWeight
from dsv4.kernels.hopper.cache import ARCH, CACHE
from dsv4.kernels.hopper.config import HopperConfig

TEST_SIZES = ((640, 384), (384, 256), (256, 128), (128, 128), (256, 256), (512, 256), (256, 512), (128, 256))
"""``(hidden, intermediate)`` of the layers in ``tests/``. A layer of one expert has the kernels of those of more."""

FORMATS: tuple[dict[str, Any], ...] = (
    {"activation_format": "bf16"},
    *({"activation_format": "nvfp4", "activation_scale": scale} for scale in ("static", "token", "tensor")),
)

PLACES: tuple[RouteWeight, ...] = ("output", "before_down")


def layers() -> Iterator[MoEConfig]:
    """Every layer whose kernels are wanted."""
    yield from configurations()
    for shape, form in product(SHAPES.values(), FORMATS):
        yield shape.config(**form)
    for (hidden, intermediate), form, limit, place in product(TEST_SIZES, FORMATS, (None, 2.0), PLACES):
        yield MoEConfig(1, hidden, intermediate, top_k=1, swiglu_limit=limit, route_weight=place, **form)


def sanitized() -> Iterator[HopperConfig]:
    """Kernels that fill a pipeline more than once, of which compute-sanitizer sees that lanes wait for each other."""
    long = [MoEConfig(1, hidden, intermediate, top_k=1) for hidden, intermediate in ((1536, 128), (128, 1536))]
    several = [MoEConfig(1, 256, 128, top_k=1, swiglu_limit=2.0, **form) for form in FORMATS[:3]]
    for layer in long + several:
        for kernel in kernels(layer):
            yield replace(kernel, every_lane_releases=True)


def main() -> None:
    """Compile what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", action="store_true", help="compile nothing, say how many are missing")
    args = parser.parse_args()
    needed = dict.fromkeys([*(kernel for layer in layers() for kernel in kernels(layer)), *sanitized()])
    missing = CACHE.missing(needed, ARCH)
    print(f"{len(needed)} kernels, {len(missing)} of them not in {CACHE.folder()}", flush=True)
    if not args.count:
        fill(CACHE, missing, ARCH, default_jobs())


if __name__ == "__main__":
    main()
