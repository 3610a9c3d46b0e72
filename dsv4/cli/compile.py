"""``dsv4 compile``: the kernels that a model needs, ahead of time; no GPU is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv4.cli._output import print_json
from dsv4.cli._shapes import SHAPES, LayerShape
from dsv4.config import MoEConfig
from dsv4.errors import ConfigError


def compile_kernels(
    shape: Annotated[str, typer.Option(help=f"Layer shape: {', '.join(SHAPES)}.")] = "v4-flash",
    arch: Annotated[str, typer.Option(help="Architecture to compile for.")] = "sm_90a",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile a model's kernels into the cache ($DSV4_CACHE_DIR), with no GPU.

    sm_90a is Hopper; sm_100a, sm_100f and sm_103a are Blackwell, whose kernels were compiled, never run.
    """
    from dsv4.kernels.blackwell.config import ARCHS
    from dsv4.kernels.hopper.cache import ARCH

    if arch not in (ARCH, *ARCHS):
        raise ConfigError(f"--arch {arch}: kernels are compiled ahead of time for {', '.join((ARCH, *ARCHS))}")
    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape}: no such shape, expected {', '.join(SHAPES)}")
    start = time.perf_counter()
    folder, needed, missing = (_hopper if arch == ARCH else _blackwell)(SHAPES[shape], arch)
    for compile_one in missing:
        compile_one()
    seconds = time.perf_counter() - start
    result = {
        "folder": str(folder),
        "kernels": needed,
        "compiled": len(missing),
        "seconds": round(seconds, 1),
    }
    if json:
        print_json(result)
    else:
        print(f"{needed} kernels in {folder}, {len(missing)} compiled in {seconds:.1f} s")


_Work = tuple[Path, int, list[Callable[[], Any]]]
"""Where kernels are kept, how many are needed, and what is to be called for those that are not there."""


def _config(layer: LayerShape, **modes: Any) -> MoEConfig:
    return MoEConfig(
        layer.num_experts,
        layer.hidden_size,
        layer.intermediate_size,
        top_k=layer.top_k,
        swiglu_limit=layer.swiglu_limit,
        **modes,
    )


def _hopper(layer: LayerShape, arch: str) -> _Work:
    from dsv4.backends import proof
    from dsv4.backends.hopper import kernels
    from dsv4.kernels.hopper import cache

    configs = [*proof.configurations(), *(_config(layer, activation_format=form) for form in ("bf16", "nvfp4"))]
    needed = {kernel for config in configs for kernel in kernels(config)}
    missing: list[Callable[[], Any]] = [
        partial(cache.load, kernel) for kernel in needed if cache.lookup(kernel) is None
    ]
    return cache.folder(), len(needed), missing


def _blackwell(layer: LayerShape, arch: str) -> _Work:
    from dsv4.backends import proof
    from dsv4.backends.blackwell import declines, kernels
    from dsv4.kernels.blackwell.cache import CACHE

    configs = [*proof.configurations(), *(_config(layer, activation_scale=scale) for scale in ("static", "token"))]
    needed = {kernel for config in configs if declines(config) is None for kernel in kernels(config)}
    missing: list[Callable[[], Any]] = [
        partial(CACHE.load, kernel, arch) for kernel in needed if CACHE.lookup(kernel, arch) is None
    ]
    return CACHE.folder(), len(needed), missing
