"""A pytest plugin (``-p kernels.interpreted``): operations on CPU tensors run their Triton kernels, interpreted.

Needs ``TRITON_INTERPRET=1`` in the environment before Triton is imported, hence a process of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from dsv4.kernels.triton import quantize, swizzle
from dsv4.ops import layouts
from dsv4.ops import quantize as public
from kernels.interpreter import mend

LAUNCHES = {
    "quantize": quantize.quantize,
    "amax_quantize": quantize.amax_quantize,
    "quantize_swizzled": quantize.quantize_swizzled,
    "swizzle": swizzle.swizzle,
}
_library = torch.library.Library("nvfp4", "IMPL")
launched: set[str] = set()


def _noted(name: str) -> Any:
    def launch(*arguments: Any) -> None:
        launched.add(name)
        LAUNCHES[name](*arguments)

    return launch


def pytest_configure() -> None:
    mend()
    for name in LAUNCHES:
        _library.impl(name, _noted(name), "CPU")
    for module in (public, layouts):
        module.has_kernel = lambda x: x.device.type == "cpu" and not isinstance(x, FakeTensor)


def pytest_sessionfinish(session: Any) -> None:
    """Tests that pass without having launched every kernel have shown nothing."""
    if missing := sorted(set(LAUNCHES) - launched):
        print(f"never launched: {missing}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
