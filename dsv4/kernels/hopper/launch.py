"""Launch a cubin through the driver that torch has already loaded: no DSL, no compiler, no other runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from dsv4.errors import Dsv4Error

_MAX_SHARED, _CARVEOUT = 8, 9  # CUfunction_attribute
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(driver: Any, status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        raise Dsv4Error(f"{what} failed with {(name.value or b'?').decode()} ({status})")


class Kernel:
    """A function of a loaded cubin.

    Args:
        cubin: for the current device.
        entry: name of the function.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        signature: ctypes types of the arguments.
    """

    def __init__(self, cubin: bytes, entry: str, threads: int, shared_bytes: int, signature: Sequence[Any]):
        self._driver = _driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, entry.encode())
        self._call("cuFuncSetAttribute", self._function, _MAX_SHARED, shared_bytes)
        self._call("cuFuncSetAttribute", self._function, _CARVEOUT, 100)
        self._threads, self._shared, self._signature = threads, shared_bytes, tuple(signature)

    def _call(self, name: str, *args: Any) -> None:
        _check(self._driver, getattr(self._driver, name)(*args), name)

    def __call__(self, grid: int, stream: int, *args: Any, dependent: bool = False) -> None:
        """Launch ``grid`` programs on a CUDA stream handle; ``dependent`` lets it start before its predecessor ends."""
        values = [kind(value) for kind, value in zip(self._signature, args, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attribute = _Attribute(id=_PROGRAMMATIC, value=1)
        config = _LaunchConfig(
            (grid, 1, 1), (self._threads, 1, 1), self._shared, stream, ctypes.pointer(attribute), int(dependent)
        )
        self._call("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)


GEMM_SIGNATURE = (ctypes.c_int64,) * 10 + (ctypes.c_int32, ctypes.c_int32, ctypes.c_float)
"""Arguments of :class:`dsv4.kernels.hopper.grouped_gemm.GroupedGemm`, without the grid."""
