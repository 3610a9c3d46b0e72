"""Blackwell's compiled kernels on disk."""

from __future__ import annotations

from pathlib import Path

from dsv4.kernels.blackwell.config import BlackwellConfig
from dsv4.kernels.cutedsl.cache import KernelCache

_HERE = Path(__file__).parent


def _compile(config: BlackwellConfig, arch: str) -> tuple[bytes, str]:
    """Only here is the DSL imported."""
    from dsv4.kernels.blackwell.grouped_gemm import compile_kernel

    return compile_kernel(config, arch)


CACHE = KernelCache(
    "blackwell",
    (
        *(_HERE / name for name in ("config.py", "grouped_gemm.py", "loads.py", "results.py")),
        *(
            _HERE.parent / "cutedsl" / name
            for name in ("compiler.py", "epilogue.py", "ptx.py", "schedule.py", "sizes.py")
        ),
        _HERE.parent.parent / "ops" / "layouts.py",
    ),
    _compile,
)
"""See :class:`dsv4.kernels.cutedsl.cache.KernelCache`."""
