"""Hopper's compiled kernels on disk."""

from __future__ import annotations

from pathlib import Path

from dsv4.kernels.cutedsl.cache import KernelCache
from dsv4.kernels.hopper.config import HopperConfig

ARCH = "sm_90a"
"""What they are compiled for; nothing else runs them."""

_HERE = Path(__file__).parent


def _compile(config: HopperConfig, arch: str) -> tuple[bytes, str]:
    """Only here is the DSL imported."""
    from dsv4.kernels.hopper.grouped_gemm import compile_kernel

    return compile_kernel(config, arch)[:2]


CACHE = KernelCache(
    "hopper",
    (
        *(_HERE / name for name in ("config.py", "grouped_gemm.py", "layout.py", "main_loops.py", "tile_end.py")),
        *(_HERE.parent / "cutedsl" / name for name in ("compiler.py", "ptx.py", "epilogue.py")),
        _HERE.parent / "triton" / "weight_layout.py",
        _HERE.parent.parent / "ops" / "layouts.py",
    ),
    _compile,
)
"""See :class:`dsv4.kernels.cutedsl.cache.KernelCache`."""
