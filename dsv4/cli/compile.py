"""``dsv4 compile``: the kernels that a model needs, ahead of time; no GPU is used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4.cli._machine import usable_cores
from dsv4.cli._output import print_json
from dsv4.cli._shapes import SHAPES, LayerShape
from dsv4.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from dsv4.kernels.blackwell.config import BlackwellConfig
    from dsv4.kernels.cutedsl.cache import KernelCache
    from dsv4.kernels.hopper.config import HopperConfig

_MOST_JOBS = 8


def compile_kernels(
    shape: Annotated[str, typer.Option(help=f"Layer shape: {', '.join(SHAPES)}.")] = "v4-flash",
    arch: Annotated[str, typer.Option(help="Architecture to compile for.")] = "sm_90a",
    experts: Annotated[int | None, typer.Option(help="Local experts of a rank; by default all of the model's.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help=f"Compilers at once; by default one a processor, {_MOST_JOBS} at most.")
    ] = None,
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
    layer = SHAPES[shape] if experts is None else replace(SHAPES[shape], num_experts=experts)
    cache, needed = (_hopper if arch == ARCH else _blackwell)(layer)
    missing = [kernel for kernel in needed if cache.lookup(kernel, arch) is None]
    jobs = jobs or default_jobs()
    fill(cache, missing, arch, jobs)
    seconds = time.perf_counter() - start
    result = {
        "folder": str(cache.folder()),
        "kernels": len(needed),
        "compiled": len(missing),
        "jobs": jobs,
        "seconds": round(seconds, 1),
    }
    if json:
        print_json(result)
    else:
        print(f"{len(needed)} kernels in {cache.folder()}, {len(missing)} compiled in {seconds:.1f} s")


def default_jobs() -> int:
    """Compilers at once where nobody says how many."""
    return min(usable_cores(), _MOST_JOBS)


def fill(cache: KernelCache, missing: Sequence[Any], arch: str, jobs: int) -> None:
    """Compile kernels into their cache, by ``jobs`` processes.

    Raises:
        BackendError: there is no compiler, or one of the processes was ended.
    """
    load = partial(cache.load, arch=arch)
    if min(jobs, len(missing)) < 2:
        for kernel in missing:
            load(kernel)
        return
    # A compiler that has threads is not forked.
    try:
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=get_context("spawn")) as pool:
            for _ in pool.map(load, missing):
                pass
    except BrokenProcessPool:
        raise BackendError(
            f"one of {jobs} compilers ended without a result, as they do where memory is short: try --jobs 1"
        ) from None


def _hopper(layer: LayerShape) -> tuple[KernelCache, set[HopperConfig]]:
    """Where kernels are kept, and which a layer and the self-check before it need."""
    from dsv4.backends import proof
    from dsv4.backends.hopper import kernels
    from dsv4.kernels.hopper.cache import CACHE

    layers = [layer.config(activation_scale=scale) for scale in ("static", "token")]
    configs = [*proof.configurations(), *layers, layer.config(activation_format="bf16")]
    return CACHE, {kernel for config in configs for kernel in kernels(config)}


def _blackwell(layer: LayerShape) -> tuple[KernelCache, set[BlackwellConfig]]:
    """The same."""
    from dsv4.backends import proof
    from dsv4.backends.blackwell import declines, kernels
    from dsv4.kernels.blackwell.cache import CACHE

    configs = [*proof.configurations(), *(layer.config(activation_scale=scale) for scale in ("static", "token"))]
    return CACHE, {kernel for config in configs if declines(config) is None for kernel in kernels(config)}
