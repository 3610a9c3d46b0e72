"""``dsv4 compile``: the kernels that a model needs, ahead of time; no GPU is used."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from dsv4.cli._output import print_json
from dsv4.cli._shapes import SHAPES
from dsv4.config import MoEConfig
from dsv4.errors import ConfigError


def compile_kernels(
    shape: Annotated[str, typer.Option(help=f"Layer shape: {', '.join(SHAPES)}.")] = "v4-flash",
    arch: Annotated[str, typer.Option(help="Architecture to compile for.")] = "sm_90a",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile a model's kernels into the cache ($DSV4_CACHE_DIR), with no GPU."""
    from dsv4.backends import proof
    from dsv4.backends.hopper import kernels
    from dsv4.kernels.hopper import cache

    if arch != cache.ARCH:
        raise ConfigError(f"--arch {arch}: only {cache.ARCH} has kernels to compile ahead of time")
    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape}: no such shape, expected {', '.join(SHAPES)}")
    layer, start = SHAPES[shape], time.perf_counter()
    configs = proof.configurations()
    forms: tuple[Literal["bf16", "nvfp4"], ...] = ("bf16", "nvfp4")
    for form in forms:
        config = MoEConfig(
            layer.num_experts,
            layer.hidden_size,
            layer.intermediate_size,
            top_k=layer.top_k,
            activation_format=form,
            swiglu_limit=layer.swiglu_limit,
        )
        configs.append(config)
    needed = {kernel for config in configs for kernel in kernels(config)}
    missing = [kernel for kernel in needed if cache.lookup(kernel) is None]
    for kernel in missing:
        cache.load(kernel)
    seconds = time.perf_counter() - start
    result = {
        "folder": str(cache.folder()),
        "kernels": len(needed),
        "compiled": len(missing),
        "seconds": round(seconds, 1),
    }
    if json:
        print_json(result)
    else:
        print(f"{len(needed)} kernels in {cache.folder()}, {len(missing)} compiled in {seconds:.1f} s")
