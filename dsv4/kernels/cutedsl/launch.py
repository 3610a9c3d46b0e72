"""Launch a cubin through the driver that torch has already loaded: no DSL, no compiler, no other runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Self

import torch

from dsv4.errors import BackendError

_MAX_SHARED, _CARVEOUT = 8, 9  # CUfunction_attribute
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_UINT8, _UINT16 = 0, 1  # CUtensorMapDataType
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_PROMOTION_256 = 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_256B
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


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


def driver() -> Any:
    """The CUDA driver's library."""
    return ctypes.CDLL("libcuda.so.1")


def call(library: Any, name: str, *args: Any) -> None:
    """A function of the driver.

    Raises:
        BackendError: it failed; says with what.
    """
    status = getattr(library, name)(*args)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        raise BackendError(f"{name} failed with {(text.value or b'?').decode()} ({status})")


class TensorMap(ctypes.Structure):
    """What a TMA load knows of a tensor, as the driver encodes it: a kernel argument."""

    _fields_ = [("words", ctypes.c_uint64 * (_MAP_BYTES // 8))]

    @property
    def value(self) -> bytes:
        """Its bytes."""
        return bytes(self)


def tensor_map(
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    element_bytes: int = 1,
    swizzle: int = 0,
) -> TensorMap:
    """Describe a tensor for TMA loads.

    Args:
        address: of the first element, a multiple of 16.
        sizes: of the dimensions, the contiguous one first.
        strides: in bytes, of all dimensions but the first; multiples of 16.
        box: sizes of a load; what lies outside of the tensor is zero.
        element_bytes: 1 or 2.
        swizzle: bytes over which 16-byte chunks trade places: 0, 32, 64 or 128.

    Raises:
        BackendError: the driver refuses.
    """
    memory = bytearray(_MAP_BYTES + _MAP_ALIGNMENT)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    result = TensorMap.from_buffer(memory, -begin % _MAP_ALIGNMENT)
    rank = len(sizes)
    call(
        driver(),
        "cuTensorMapEncodeTiled",
        ctypes.byref(result),
        _UINT8 if element_bytes == 1 else _UINT16,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLES[swizzle],
        _PROMOTION_256,
        0,
    )
    return result


class Kernel:
    """A function of a loaded cubin.

    Args:
        cubin: for the current device.
        entry: name of the function.
        threads: of a program.
        shared_bytes: dynamic shared memory of a program.
        signature: ctypes types of the arguments.
        cluster: programs that run as one cluster.
    """

    def __init__(
        self, cubin: bytes, entry: str, threads: int, shared_bytes: int, signature: Sequence[Any], cluster: int = 1
    ):
        self._driver = driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        call(self._driver, "cuModuleLoadData", ctypes.byref(self._module), cubin)
        call(self._driver, "cuModuleGetFunction", ctypes.byref(self._function), self._module, entry.encode())
        call(self._driver, "cuFuncSetAttribute", self._function, _MAX_SHARED, shared_bytes)
        call(self._driver, "cuFuncSetAttribute", self._function, _CARVEOUT, 100)
        self._threads, self._shared, self._signature = threads, shared_bytes, tuple(signature)
        self._cluster = cluster

    @classmethod
    def on_device(cls, device_index: int, *args: Any, **settings: Any) -> Self:
        """A kernel of a certain device; arguments are the constructor's."""
        with torch.cuda.device(device_index):
            torch.cuda.current_stream().synchronize()  # the primary context exists from here on
            return cls(*args, **settings)

    def __call__(self, grid: int, stream: int, *args: Any, dependent: bool = False) -> None:
        """Launch ``grid`` programs on a CUDA stream handle; ``dependent`` lets it start before its predecessor ends."""
        values = [
            value if kind is TensorMap else kind(value) for kind, value in zip(self._signature, args, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attributes = []
        if dependent:
            attributes.append(_Attribute(id=_PROGRAMMATIC, value=1))
        if self._cluster > 1:
            attributes.append(_Attribute(id=_CLUSTER, value=self._cluster, rest=(1, 1)))
        config = _LaunchConfig(
            (grid, 1, 1), (self._threads, 1, 1), self._shared, stream, (_Attribute * 2)(*attributes), len(attributes)
        )
        call(self._driver, "cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)
