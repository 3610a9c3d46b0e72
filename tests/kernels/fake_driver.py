"""A CUDA driver that only notes what it is asked: launches without a GPU. Imports what every process has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dsv4.kernels.cutedsl import launch


@dataclass(frozen=True)
class Launch:
    """One launch, as the driver sees it."""

    entry: str
    cubin: bytes
    attributes: dict[int, int]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    launch_attributes: list[tuple[int, int]]
    arguments: list[Any]


class FakeDriver:
    """The functions of libcuda that a launch takes; handles are numbers.

    Args:
        signature: how to read the arguments of a launch.
        failing: the function that returns an error.
    """

    def __init__(self, signature: Sequence[Any], failing: str | None = None):
        self.launches: list[Launch] = []
        self._signature, self._failing = signature, failing
        self._cubins: list[bytes] = []
        self._functions: list[tuple[int, str, dict[int, int]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name == self._failing:
            return lambda *_: 700
        return super().__getattribute__(name)

    def cuModuleLoadData(self, module: Any, cubin: bytes) -> int:
        self._cubins.append(cubin)
        module._obj.value = len(self._cubins)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        self._functions.append((module.value - 1, name.decode(), {}))
        function._obj.value = len(self._functions)
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self._functions[function.value - 1][2][attribute] = value
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS"
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:
        module, entry, attributes = self._functions[function.value - 1]
        c = config._obj
        arguments = [
            ctypes.cast(pointer, ctypes.POINTER(kind)).contents.value
            for pointer, kind in zip(pointers, self._signature, strict=True)
        ]
        given = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.num_attributes)]
        self.launches.append(
            Launch(
                entry, self._cubins[module], attributes, tuple(c.grid), tuple(c.block), c.shared, c.stream, given,
                arguments,
            )
        )  # fmt: skip
        return 0


@contextmanager
def installed(driver: FakeDriver, gemm_kernel: Any, stream: int = 0x5EED) -> Iterator[None]:
    """CPU tensors pass for a GPU's: the driver is ``driver``, every device's current stream is ``stream``.

    ``gemm_kernel`` is what keeps kernels loaded: it has none before, and none of this driver's after.
    """
    current = SimpleNamespace(cuda_stream=stream, synchronize=lambda: None)
    gemm_kernel.cache_clear()
    try:
        with (
            mock.patch.object(launch, "driver", return_value=driver),
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "current_stream", return_value=current),
        ):
            yield
    finally:
        gemm_kernel.cache_clear()
