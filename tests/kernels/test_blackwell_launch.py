"""What a launch of the Blackwell kernel hands to the driver, without one: arguments, tensor maps, refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from dsv4.config import capacity
from dsv4.errors import BackendError, InputError
from dsv4.kernels.blackwell import launch
from dsv4.kernels.blackwell.config import deepest
from dsv4.kernels.blackwell.launch import SIGNATURE, Operands, Requantized, grouped_gemm
from dsv4.kernels.cutedsl.cache import KernelCache
from kernels.fake_driver import FakeDriver
from kernels.fake_driver import installed as on_paper

E, ROWS, N, K = 5, 300, 160, 352
SCALE_COLUMNS = 24  # K / 16, padded
MULTIPROCESSORS = 148


@dataclass(frozen=True)
class Map:
    """What one tensor map was asked to describe."""

    element: int
    address: int
    sizes: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int
    place: int


class Driver(FakeDriver):
    """One that encodes tensor maps as their numbers."""

    def __init__(self, failing: str | None = None):
        super().__init__(SIGNATURE, failing)
        self.maps: list[Map] = []

    def cuTensorMapEncodeTiled(
        self, result: Any, element: int, rank: int, address: Any, sizes: Any, strides: Any, box: Any, steps: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        assert list(steps) == [1] * rank
        assert (interleave, fill) == (0, 0)
        self.maps.append(
            Map(
                element,
                address.value,
                list(sizes),
                list(strides),
                list(box),
                swizzle,
                ctypes.addressof(result._obj) % 64,
            )
        )
        result._obj.words[0] = len(self.maps)
        return 0


@contextmanager
def installed(driver: Driver) -> Iterator[None]:
    """CPU tensors pass for a B200's; cubins are their architectures' names."""
    with (
        on_paper(driver, launch.gemm_kernel),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(10, 0)),
        mock.patch.object(KernelCache, "load", lambda self, config, arch: (f"{arch} cubin".encode(), "entry")),
    ):
        yield


def aligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros at a multiple of 64 bytes."""
    size = int(torch.tensor(shape).prod()) * dtype.itemsize
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 :][:size].view(dtype).view(shape)


def operands() -> Operands:
    """Weights are rows of a larger buffer, as a backend packs them."""
    scale_bytes = 256 * SCALE_COLUMNS
    packed = aligned(E, N * K // 2 + scale_bytes + 128, dtype=torch.uint8)
    return Operands(
        aligned(ROWS, K // 2, dtype=torch.uint8),
        aligned(capacity(ROWS, E, 128) * SCALE_COLUMNS, dtype=torch.uint8),
        packed[:, : N * K // 2].unflatten(1, (N, K // 2)),
        packed[:, N * K // 2 :][:, :scale_bytes],
        torch.zeros(E, dtype=torch.int32),
        torch.zeros(E),
        torch.zeros(E, 2),
        row_scale=torch.zeros(ROWS),
        row_slot=torch.zeros(ROWS, dtype=torch.int32),
        topk_weights=torch.zeros(ROWS),
    )


@pytest.mark.parametrize("m", [128, 256])
def test_arguments(m):
    """Maps describe the whole operands, and boxes what one CTA loads; addresses and sizes in the kernel's order;
    clusters of as many CTAs as share a tile, and no more of them than tiles or multiprocessors."""
    o, out = operands(), aligned(ROWS, N, dtype=torch.bfloat16)
    config, driver = deepest(m, 64, 256, row_scale=True), Driver()
    o = replace(o, gs_b=torch.zeros(E))
    with installed(driver):
        grouped_gemm(config, o, out, multiprocessors=MULTIPROCESSORS)
    a, b, sfa, sfb = driver.maps
    expert = o.mat_b.stride(0)
    b_rows = 64 * 128 // m
    assert all(encoded.place == 0 for encoded in driver.maps)
    assert a == Map(0, o.mat_a.data_ptr(), [K // 2, ROWS, 1], [K // 2, ROWS * K // 2], [128, 128, 1], 3, 0)
    assert b == Map(0, o.mat_b.data_ptr(), [K // 2, N, E], [K // 2, expert], [128, b_rows, 1], 3, 0)
    tiles, row = capacity(ROWS, E, 128) // 128, 512 * SCALE_COLUMNS // 4
    assert sfa == Map(
        1, o.scale_a.data_ptr(), [256, SCALE_COLUMNS // 4, tiles, 1], [512, row, tiles * row], [256, 4, 1, 1], 0, 0
    )
    assert sfb == Map(
        1, o.scale_b.data_ptr(), [256, SCALE_COLUMNS // 4, 2, E], [512, row, expert], [256, 4, 1, 1], 0, 0
    )
    (made,) = driver.launches
    assert (made.cubin, made.entry) == (b"sm_100a cubin", "entry")
    assert [value[0] for value in made.arguments[:4]] == [1, 2, 3, 4]
    assert made.arguments[4:] == [
        o.ends.data_ptr(), o.gs_a.data_ptr(), o.gs_b.data_ptr(), o.row_scale.data_ptr(), o.row_slot.data_ptr(),
        o.topk_weights.data_ptr(), out.data_ptr(), 0, 0, E, N, K, 1, 0.0,
    ]  # fmt: skip
    row_tiles = capacity(ROWS, E, m) // m
    clusters = min(MULTIPROCESSORS // (m // 128), row_tiles * 3)
    assert made.grid == (clusters * m // 128, 1, 1)
    assert made.block == (192, 1, 1)
    assert made.shared == config.shared_bytes == made.attributes[8]
    assert made.launch_attributes == ([(4, 2)] if m == 256 else [])
    assert made.stream == 0x5EED


def test_coordinates_of_two_tiles_of_scales():
    """One step of K, two tiles of rows: CuTe has the coordinate along K behind that along rows."""
    o, driver = replace(operands(), gs_b=torch.zeros(E)), Driver()
    with installed(driver):
        grouped_gemm(deepest(128, 192, 64), o, aligned(ROWS, N, dtype=torch.bfloat16), multiprocessors=2)
    row = 512 * SCALE_COLUMNS // 4
    assert driver.maps[3] == Map(
        1, o.scale_b.data_ptr(), [256, 2, SCALE_COLUMNS // 4, E], [row, 512, o.mat_b.stride(0)], [256, 2, 1, 1], 0, 0
    )


def test_requantized_arguments():
    """Codes, scales and the scale that they are quantized under."""
    o, driver = operands(), Driver()
    out, scales = aligned(ROWS, N // 4, dtype=torch.uint8), aligned(capacity(ROWS, E, 128) * 8, dtype=torch.uint8)
    gs = torch.ones(E)
    config = deepest(128, 128, 64, gated=True, requantize=True, limited=True)
    with installed(driver):
        grouped_gemm(config, o, out, multiprocessors=2, limit=7.0, requantized=Requantized(scales, gs))
    (made,) = driver.launches
    assert made.arguments[10:] == [out.data_ptr(), scales.data_ptr(), gs.data_ptr(), E, N, K, 2, 7.0]
    assert made.grid == (2, 1, 1)
    assert [encoded.swizzle for encoded in driver.maps] == [1, 1, 0, 0]


def test_no_rows_launch_nothing():
    """And describe nothing: a tensor map has no empty dimension."""
    o, driver = operands(), Driver()
    o = replace(o, mat_a=o.mat_a[:0], gs_b=torch.zeros(E))
    with installed(driver):
        grouped_gemm(deepest(128, 64, 64), o, aligned(0, N, dtype=torch.bfloat16), multiprocessors=4)
    assert not driver.launches
    assert not driver.maps


@pytest.mark.parametrize("failing", ["cuTensorMapEncodeTiled", "cuModuleLoadData", "cuLaunchKernelEx"])
def test_a_driver_that_fails_is_an_error(failing):
    """Named, with the driver's own word."""
    o = replace(operands(), gs_b=torch.zeros(E))
    with installed(Driver(failing)), pytest.raises(BackendError, match=f"{failing}.*ILLEGAL_ADDRESS"):
        grouped_gemm(deepest(128, 64, 64), o, aligned(ROWS, N, dtype=torch.bfloat16), multiprocessors=4)


PLAIN = deepest(128, 64, 64)
FULL = deepest(128, 64, 64, row_scale=True, scattered=True)
GATED = deepest(128, 64, 64, gated=True, weighted=True, limited=True)


@pytest.mark.parametrize(
    ("config", "change", "what"),
    [
        (PLAIN, {"mat_a": aligned(ROWS, K // 2 - 8, dtype=torch.uint8)}, "mat_a, mat_b"),
        (PLAIN, {"mat_a": aligned(ROWS, K // 2, dtype=torch.int8)}, "^mat_a: "),
        (PLAIN, {"mat_a": aligned(ROWS + 1, K // 2, dtype=torch.uint8).flatten()[8 : 8 + ROWS * K // 2].view(ROWS, -1)},
         "^mat_a: .*multiples of 16"),
        (PLAIN, {"mat_b": aligned(E, K // 2, N, dtype=torch.uint8).transpose(1, 2)}, "^mat_b"),
        (PLAIN, {"mat_b": aligned(E, N + 8, K // 2, dtype=torch.uint8)}, "N of 32"),
        (PLAIN, {"scale_a": aligned(128 * SCALE_COLUMNS + 4, dtype=torch.uint8)}, "scale_a"),
        (PLAIN, {"scale_a": aligned(128 * SCALE_COLUMNS, dtype=torch.float32)}, "scale_a"),
        (PLAIN, {"scale_b": aligned(E, 128 * SCALE_COLUMNS, dtype=torch.uint8)}, "scale_b"),
        (PLAIN, {"ends": torch.zeros(E, dtype=torch.int64)}, "ends"),
        (PLAIN, {"ends": torch.zeros(E + 1, dtype=torch.int32)}, "ends"),
        (PLAIN, {"gs_a": torch.zeros(E, dtype=torch.float64)}, "gs_a"),
        (PLAIN, {"gs_b": torch.zeros(E + 1)}, "gs_b"),
        (PLAIN, {"gs_b": torch.zeros(E, 2)}, "N of 64"),
        (FULL, {"row_scale": None}, "row_scale"),
        (FULL, {"row_slot": torch.zeros(ROWS - 1, dtype=torch.int32)}, "row_slot"),
        (GATED, {"topk_weights": None}, "topk_weights"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(config, change, what):
    """By name, before anything reaches the driver. N is 160: its halves are not whole subtiles."""
    driver = Driver()
    o = replace(operands(), **{"gs_b": torch.zeros(E)} | change)
    width = N // 2 if config.gated else N
    with installed(driver), pytest.raises(InputError, match=what):
        grouped_gemm(
            config, o, aligned(ROWS, width, dtype=torch.bfloat16), multiprocessors=4,
            limit=1.0 if config.limited else None,
        )  # fmt: skip
    assert not driver.launches


@pytest.mark.parametrize(
    ("config", "out", "more", "what"),
    [
        (PLAIN, aligned(ROWS, N, dtype=torch.float32), {}, "out"),
        (PLAIN, aligned(ROWS, N // 2, dtype=torch.bfloat16), {}, "out"),
        (PLAIN, aligned(ROWS, 2 * N, dtype=torch.bfloat16)[:, :N], {}, "out"),
        (PLAIN, aligned(ROWS + 1, N, dtype=torch.bfloat16).flatten()[8 : 8 + ROWS * N].view(ROWS, N), {}, "out"),
        (PLAIN, aligned(ROWS, N, dtype=torch.bfloat16), {"limit": 1.0}, "limit"),
        (GATED, aligned(ROWS, N // 2, dtype=torch.bfloat16), {}, "limit"),
        (replace(GATED, requantize=True), aligned(ROWS, N // 4, dtype=torch.uint8), {"limit": 1.0}, "requantized"),
        (
            replace(GATED, requantize=True),
            aligned(ROWS, N // 4, dtype=torch.uint8),
            {"limit": 1.0, "requantized": Requantized(aligned(128 * 8, dtype=torch.uint8), torch.ones(E))},
            "requantized.scales",
        ),
    ],
)
def test_results_that_do_not_fit_are_refused(config, out, more, what):
    """By name, before anything reaches the driver."""
    driver = Driver()
    o = replace(operands(), gs_b=torch.zeros(E))
    with installed(driver), pytest.raises(InputError, match=what):
        grouped_gemm(config, o, out, multiprocessors=4, **more)
    assert not driver.launches


def test_too_many_experts_are_refused():
    """The schedule's table has an end."""
    o = operands()
    many = {"mat_b": o.mat_b[:1].expand(513, -1, -1), "scale_b": o.scale_b[:1].expand(513, -1)}
    with installed(Driver()), pytest.raises(InputError, match="512 experts"):
        grouped_gemm(PLAIN, replace(o, **many, gs_b=torch.zeros(513)), torch.zeros(1), multiprocessors=4)
