"""What the Hopper kernels are launched with, against a driver that only takes notes; no GPU, no compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dsv4.errors import BackendError, InputError
from dsv4.kernels.cutedsl.cache import KernelCache
from dsv4.kernels.hopper import launch
from dsv4.kernels.hopper.config import ROW_UNIT, HopperConfig
from dsv4.kernels.hopper.layout import matrix_bytes
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.routing import RowGroups
from kernels.fake_driver import FakeDriver, installed

STREAM = 0x5EED
E, S, TILES, GROUPS, OFFSET = 3, 40, 7, 5, 4608
GATED = HopperConfig(
    ((8,), (24,)), 2, 1, 4, 2, gated=True, row_scale=True, weighted=True, limited=True, requantized=True
)
PLAIN = HopperConfig(((16, 32),), 1, 2, 3, 1, wide_out=True)
ROWS, DEPTH, MULTIPROCESSORS = 256, 512, 132


def operands(config: HopperConfig) -> dict[str, Any]:
    """Arguments that fit ``config``."""
    rows = TILES * ROW_UNIT
    if config.gated:
        out = torch.zeros(rows * ROWS // 2, dtype=torch.bfloat16)
    else:
        out = torch.zeros(S, ROWS, dtype=torch.float32 if config.wide_out else torch.bfloat16)

    def table(n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.int32)

    return {
        "image": torch.zeros(rows * DEPTH, dtype=torch.bfloat16),
        "row_scale": torch.zeros(rows),
        "experts": torch.zeros(E, OFFSET + matrix_bytes(ROWS, DEPTH), dtype=torch.uint8),
        "offset": OFFSET,
        "gs": torch.zeros(E, 2) if config.gated else torch.zeros(E),
        "tiles": TileMap(table(rows), table(TILES), table(1)),
        "groups": RowGroups(
            config.tokens,
            slot_row=table(S),
            tile_start=table(TILES),
            tile_rows=table(TILES),
            group_row=table(GROUPS + 1),
            group_expert=table(GROUPS),
            num_groups=table(1),
            taken=table(2),
        ),
        "out": out,
        "rows": ROWS,
        "k": DEPTH,
        "multiprocessors": MULTIPROCESSORS,
        "limit": 2.5,
        "topk_weights": torch.zeros(S // 2, 2),
        "result_gs": torch.zeros(E),
    }


def cubin(config: HopperConfig, arch: str = "sm_90a") -> bytes:
    return f"{arch} {config!r}".encode()


@pytest.fixture
def driver(monkeypatch) -> Iterator[FakeDriver]:
    monkeypatch.setattr(
        KernelCache, "load", lambda _, config, arch: (cubin(config, arch), f"entry_{config.warpgroups}")
    )
    driver = FakeDriver(launch.GEMM_SIGNATURE)
    with installed(driver, launch.gemm_kernel, STREAM):
        yield driver


@pytest.mark.parametrize("config", [GATED, PLAIN], ids=["gated", "plain"])
def test_every_argument_of_a_launch(driver, config):
    """The configuration's cubin, threads and shared memory, torch's stream, each pointer and number in its place."""
    o = operands(config)
    launch.grouped_gemm(config, **o)
    (got,) = driver.launches
    assert (got.cubin, got.entry, got.stream) == (cubin(config), f"entry_{config.warpgroups}", STREAM)
    tiles_along_n = ROWS // (64 * config.warpgroups)
    assert got.grid == (GROUPS * tiles_along_n, 1, 1)
    assert got.block == (config.warpgroups * 128 + 32, 1, 1)
    most = config.tokens
    # Weights and tokens, two barriers and the tile that begins there.
    ring = config.stages * (config.blocks * (config.warpgroups * 4608 + most * 256) + 2 * 8 + 16)
    tables = 2 * most * 8  # slots and factors of a group's rows, of this one and the next
    if config.requantized:
        tables += -(-most // 16) * 16 * 4 * 16  # 16 bytes for each scale group of 64 of the result, by 16 rows
    assert ring + tables <= got.shared <= ring + tables + 1024  # the start is rounded up to 1024
    assert got.attributes == {8: got.shared, 9: 100}  # CUfunction_attribute: the most shared memory, carve-out
    assert got.launch_attributes == []
    pointers = [
        o["experts"].data_ptr() + OFFSET,
        o["image"].data_ptr(),
        o["gs"].data_ptr(),
        o["tiles"].row_slot.data_ptr(),
        o["groups"].group_expert.data_ptr(),
        o["groups"].group_row.data_ptr(),
        o["groups"].num_groups.data_ptr(),
        o["groups"].taken.data_ptr() + (0 if config.gated else 4),
        o["row_scale"].data_ptr(),
        0,
        o["topk_weights"].data_ptr(),
        o["out"].data_ptr(),
    ]
    assert got.arguments == [
        *pointers,
        o["experts"].stride(0),
        DEPTH // 128,
        tiles_along_n,
        2.5,
        o["result_gs"].data_ptr(),
    ]


def test_the_grid_is_no_more_than_is_resident(driver):
    """Programs are persistent: as many as the device holds, however many tiles there may be."""
    launch.grouped_gemm(GATED, **operands(GATED) | {"multiprocessors": 3})
    assert driver.launches[0].grid == (6, 1, 1)


def test_what_is_not_given_is_null(driver):
    """Operands that the configuration does not need may be missing; no limit is zero."""
    launch.grouped_gemm(PLAIN, **operands(PLAIN) | dict.fromkeys(("row_scale", "topk_weights", "limit", "result_gs")))
    arguments = driver.launches[0].arguments
    assert (*arguments[8:11], arguments[15], arguments[16]) == (0, 0, 0, 0.0, 0)


def test_scales_of_experts_are_as_many_as_experts(driver):
    """A product whose operand was quantized under scales of experts takes those, one for each."""
    scales = torch.zeros(E)
    launch.grouped_gemm(PLAIN, **operands(PLAIN) | {"row_scale": None, "expert_scale": scales})
    assert driver.launches[0].arguments[8:10] == [0, scales.data_ptr()]


def test_programmatic_dependent_launch(driver):
    """``dependent`` sets CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION (6) to 1."""
    launch.grouped_gemm(PLAIN, **operands(PLAIN), dependent=True)
    assert driver.launches[0].launch_attributes == [(6, 1)]


def test_a_kernel_is_loaded_once(driver):
    """Two launches of one configuration share a module; another configuration has its own."""
    for config in (GATED, GATED, PLAIN):
        launch.grouped_gemm(config, **operands(config))
    assert len(driver._cubins) == 2
    assert [one.cubin for one in driver.launches] == [cubin(c) for c in (GATED, GATED, PLAIN)]


def shorter(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()[:-1]


def tables(name: str, **changes: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """Changes attributes of an operand made of several tensors."""

    def change(o: dict[str, Any]) -> None:
        o[name] = replace(o[name], **{key: new(getattr(o[name], key)) for key, new in changes.items()})

    return change


@pytest.mark.parametrize(
    ("config", "name", "change"),
    [
        (GATED, "matrix", lambda o: o.update(rows=192)),
        (GATED, "matrix", lambda o: o.update(k=448)),
        (PLAIN, "matrix", lambda o: o.update(k=384)),
        (HopperConfig(((16,),), 1, 1, 3, 1, gated=True), "rows", lambda o: o.update(rows=192)),
        (GATED, "experts", lambda o: o.update(experts=o["experts"].to(torch.int8))),
        (GATED, "experts", lambda o: o.update(experts=o["experts"][:, 16:])),
        (GATED, "experts", lambda o: o.update(experts=o["experts"][:, ::2])),
        (GATED, "experts", lambda o: o.update(offset=8)),
        (GATED, "image", lambda o: o.update(image=shorter(o["image"]))),
        (GATED, "image", lambda o: o.update(image=o["image"].float())),
        (GATED, "gs", lambda o: o.update(gs=o["gs"][:, 0])),
        (PLAIN, "gs", lambda o: o.update(gs=shorter(o["gs"]))),
        (GATED, "row_slot", tables("tiles", row_slot=shorter)),
        (GATED, "group_expert", tables("groups", group_expert=lambda t: t.long())),
        (GATED, "group_expert", tables("groups", group_expert=lambda t: t[::2])),
        (GATED, "groups", tables("groups", rows=lambda rows: 16)),
        (GATED, "groups", tables("groups", rows=lambda rows: 48)),
        (GATED, "group_row", tables("groups", group_row=lambda t: t[:1])),
        (GATED, "group_row", tables("groups", group_row=lambda t: t[::2])),
        (PLAIN, "num_groups", tables("groups", num_groups=lambda t: t.long())),
        (PLAIN, "num_groups", tables("groups", num_groups=lambda t: t[:0])),
        (GATED, "taken", tables("groups", taken=lambda t: t.long())),
        (GATED, "taken", tables("groups", taken=lambda t: t[:1])),
        (GATED, "row_scale", lambda o: o.update(row_scale=None)),
        (GATED, "row_scale", lambda o: o.update(row_scale=shorter(o["row_scale"]))),
        (replace(GATED, row_scale=False), "row_scale", lambda o: None),
        (PLAIN, "row_scale", lambda o: o.update(row_scale=shorter(o["row_scale"]))),
        (PLAIN, "expert_scale", lambda o: o.update(row_scale=None, expert_scale=torch.zeros(E - 1))),
        (PLAIN, "expert_scale", lambda o: o.update(expert_scale=torch.zeros(E))),
        (GATED, "expert_scale", lambda o: o.update(expert_scale=torch.zeros(E))),
        (replace(GATED, row_scale=False), "expert_scale", lambda o: o.update(row_scale=None, expert_scale=o["gs"])),
        (GATED, "result_gs", lambda o: o.update(result_gs=None)),
        (GATED, "result_gs", lambda o: o.update(result_gs=shorter(o["result_gs"]))),
        (replace(GATED, warpgroups=1), "warpgroups", lambda o: None),
        (replace(PLAIN, warpgroups=2, requantized=True), "gated", lambda o: None),
        (GATED, "topk_weights", lambda o: o.update(topk_weights=None)),
        (GATED, "topk_weights", lambda o: o.update(topk_weights=o["topk_weights"].double())),
        (GATED, "out", lambda o: o.update(out=shorter(o["out"]))),
        (PLAIN, "out", lambda o: o.update(out=o["out"][:, :-1])),
        (PLAIN, "out", lambda o: o.update(out=o["out"].bfloat16())),
        (PLAIN, "out", lambda o: o.update(out=o["out"].flatten())),
    ],
)
def test_what_does_not_fit_is_refused(driver, config, name, change):
    """A wrong size, dtype, stride or place, or a missing operand, is an InputError by name; nothing is launched."""
    o = operands(config)
    change(o)
    with pytest.raises(InputError, match=name):
        launch.grouped_gemm(config, **o)
    assert not driver.launches


@pytest.mark.parametrize(
    "failing", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx"]
)
def test_a_failing_driver_is_named(monkeypatch, failing):
    """What failed, and the driver's word for it."""
    monkeypatch.setattr(KernelCache, "load", lambda self, config, arch: (b"cubin", "entry"))
    with (
        installed(FakeDriver(launch.GEMM_SIGNATURE, failing), launch.gemm_kernel),
        pytest.raises(BackendError, match=f"{failing} failed with CUDA_ERROR_ILLEGAL_ADDRESS"),
    ):
        launch.grouped_gemm(PLAIN, **operands(PLAIN))
