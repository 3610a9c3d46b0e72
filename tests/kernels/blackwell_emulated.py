"""Configurations and cubins of :mod:`kernels.blackwell_emulation`; needs no DSL where the cache is warm.

Compiled beforehand, on a machine with the DSL, for a GPU machine without it::

    DSV4_CACHE_DIR=folder PYTHONPATH=.:tests python -m kernels.blackwell_emulated
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from dsv4.backends.blackwell import layer_kernels
from dsv4.config import MoEConfig
from dsv4.kernels.blackwell.cache import CACHE as REAL
from dsv4.kernels.blackwell.config import THREADS, BlackwellConfig
from dsv4.kernels.blackwell.launch import SIGNATURE
from dsv4.kernels.cutedsl.cache import KernelCache
from dsv4.kernels.cutedsl.launch import Kernel

ARCH = "sm_90a"


@dataclass(frozen=True)
class EmulatedConfig(BlackwellConfig):
    """With accumulators in shared memory; ``columns`` of them if the two share some."""

    columns: int = 0

    @property
    def overlapped(self) -> bool:
        return self.columns > 0

    @property
    def accumulator_stride(self) -> int:
        return self.columns - self.n if self.columns else self.n

    @property
    def shared_bytes(self) -> int:
        return self.accumulators_at + 128 * 4 * (self.accumulator_stride + self.n)

    @property
    def accumulators_at(self) -> int:
        """Where they begin."""
        return -(-self.layout_bytes // 16) * 16


PLAIN = EmulatedConfig(128, 64, 64, 4)
TILES = {
    "64x64": PLAIN,
    "64x256": EmulatedConfig(128, 64, 256, 2),
    "128x128": EmulatedConfig(128, 128, 128, 2),
    "192x64": EmulatedConfig(128, 192, 64, 2, columns=192 + 32),
    "overlapped": EmulatedConfig(128, 128, 64, 2, columns=128 + 96),
}
_FLAGS = ("gated", "requantize", "wide_out", "row_scale", "weighted", "scattered", "limited")


def layer_configs(config: MoEConfig, fixed_scales: bool) -> tuple[EmulatedConfig, EmulatedConfig]:
    """GEMM 1 and 2 of a layer: the backend's own flags, one small tile."""
    kernels = layer_kernels(config, 64, fixed_scales)
    first, second = (replace(PLAIN, **{flag: getattr(kernel, flag) for flag in _FLAGS}) for kernel in kernels)
    return first, second


def needed() -> list[EmulatedConfig]:
    """All that tests/kernels/test_blackwell_cuda.py launches."""
    found = [replace(config, wide_out=True) for config in TILES.values()]
    found.append(replace(PLAIN, row_scale=True))
    gated = {"gated": True, "row_scale": True}
    found += [
        replace(TILES["128x128"], **gated, interleaved=interleaved, limited=limited)
        for interleaved in (False, True)
        for limited in (False, True)
    ]
    found += [
        replace(TILES[name], **gated, requantize=requantize)
        for name in ("64x64", "overlapped")
        for requantize in (False, True)
    ]
    for place in ("output", "before_down"):
        for fixed in (False, True):
            layer = MoEConfig(64, 256, 128, top_k=2, swiglu_limit=2.0, route_weight=place)  # type: ignore[arg-type]
            first, second = layer_configs(layer, fixed)
            found += [first, second, replace(second, wide_out=True)]
    return list(dict.fromkeys(found))


def _compile(config: EmulatedConfig, arch: str) -> tuple[bytes, str]:
    from kernels.blackwell_emulation import compile_emulated

    return compile_emulated(config, arch)


CACHE = KernelCache(
    "blackwell-emulated", (*REAL.sources, Path(__file__), Path(__file__).with_name("blackwell_emulation.py")), _compile
)


@cache
def emulated_kernel(config: EmulatedConfig, device_index: int) -> Kernel:
    """What a launch takes for its loader."""
    cubin, entry = CACHE.load(config, ARCH)
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()
        return Kernel(cubin, entry, THREADS, config.shared_bytes, SIGNATURE)


if __name__ == "__main__":
    # Under this module's own name, which configurations are pickled and told apart by.
    from kernels import blackwell_emulated

    for kernel in blackwell_emulated.needed():
        blackwell_emulated.CACHE.load(kernel, ARCH)
    print(f"{len(blackwell_emulated.needed())} kernels in {blackwell_emulated.CACHE.folder()}")
