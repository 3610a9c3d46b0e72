"""Blackwell kernels compiled without the chip: what instructions they are made of and what they occupy.

A few configurations in ``make test``; every tile, and all that V4-Flash and V4-Pro need, for every architecture in
``make test-kernels``. The disassembler at hand knows no sm_103: there PTX is counted.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pytest

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from dsv4.backends.blackwell import kernels
from dsv4.cli._shapes import SHAPES
from dsv4.errors import ConfigError
from dsv4.kernels.blackwell.config import ARCHS, SHARED_BYTES, SUBTILE, THREADS, BlackwellConfig, deepest
from dsv4.kernels.blackwell.grouped_gemm import GroupedGemm, compile_class, compile_kernel
from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS
from kernels.cubin import MachineCode, counts, read

FLAGS = ("gated", "interleaved", "requantize", "wide_out", "row_scale", "weighted", "scattered", "limited")


def tiles() -> list[BlackwellConfig]:
    """Every tile, plain and with the longest epilogue."""
    epilogues = ({}, {"gated": True, "requantize": True, "row_scale": True, "weighted": True, "limited": True})
    sizes = product((128, 256), (64, 128, 192, 256), (64, 128, 256))
    return [deepest(*size, **flags) for size, flags in product(sizes, epilogues)]


def needed() -> list[BlackwellConfig]:
    """What the two models may launch, in every mode and with every option."""
    found: dict[BlackwellConfig, None] = {}
    options = product(("static", "token"), ("output", "before_down"), (None, 10.0), ("v4-flash", "v4-pro"))
    for scale, weight, limit, name in options:
        config = SHAPES[name].config(swiglu_limit=limit, activation_scale=scale, route_weight=weight)
        found |= dict.fromkeys(kernels(config))
    return list(found)


ALL = list(dict.fromkeys([*tiles(), *needed(), deepest(128, 64, 256, gated=True, interleaved=True)]))
ALWAYS = [
    (deepest(128, 64, 64), "sm_100a"),
    (deepest(128, 192, 64, wide_out=True, scattered=True), "sm_100f"),
    (deepest(128, 256, 256, gated=True, requantize=True, row_scale=True, limited=True), "sm_100a"),
    (deepest(256, 256, 256, gated=True, row_scale=True, weighted=True, limited=True), "sm_100f"),
    (deepest(256, 128, 256), "sm_103a"),
]


def name(config: BlackwellConfig) -> str:
    return "-".join([f"{config.m}x{config.n}x{config.k}", *(f for f in FLAGS if getattr(config, f))])


EVERY = [
    *ALWAYS,
    *(
        pytest.param(config, arch, marks=pytest.mark.kernels, id=f"{name(config)}-{arch}")
        for config, arch in product(ALL, ARCHS)
        if (config, arch) not in ALWAYS
    ),
]
CONFIGS = pytest.mark.parametrize(("config", "arch"), EVERY)
DISASSEMBLED = pytest.mark.parametrize(
    ("config", "arch"),
    [p for p in EVERY if (p[1] if isinstance(p, tuple) and len(p) == 2 else p.values[1]) != "sm_103a"],
)


@cache
def machine_code(config: BlackwellConfig, arch: str) -> MachineCode:
    return read(compile_kernel(config, arch)[0])


@cache
def ptx(config: BlackwellConfig, arch: str) -> str:
    cubin, _, text = compile_class(GroupedGemm(config), arch)
    assert cubin.startswith(b"\x7fELF")
    return text


@DISASSEMBLED
def test_loops_are_made_of_the_instructions_meant(config: BlackwellConfig, arch: str) -> None:
    """A stage is 4 TMA loads; one tensor-core instruction for each 64 of K, one copy of scales for each 128 rows of A
    or columns of B by 64 of K, and one signal that it is free. A tile's accumulators are n / 32 loads, in a loop."""
    code = machine_code(config, arch)
    (products,) = code.loops("UTCOMMA")
    count = counts(products)
    assert count["UTCOMMA"] == config.k // 64
    assert count["UTCCP"] == config.k // 64 * (1 + -(-config.n // 128))
    assert count["UTCBAR"] == 1
    (loads,) = code.loops("UTMALDG")
    assert counts(loads)["UTMALDG"] == 4
    (results,) = code.loops("LDTM")
    assert counts(results)["LDTM"] == 1
    whole = counts(code.instructions)
    assert [whole[kind] for kind in ("UTCOMMA", "UTCCP", "UTMALDG", "LDTM", "UTCBAR")] == [
        count["UTCOMMA"], count["UTCCP"], 4, 1, 2,
    ]  # fmt: skip
    group = ".2CTA" if config.m == 256 else ""
    assert all((".2CTA" in i.name) == bool(group) for i in products if i.kind in ("UTCOMMA", "UTCCP"))


@DISASSEMBLED
def test_stores_are_whole_sectors(config: BlackwellConfig, arch: str) -> None:
    """A thread writes its row's results of 32 columns in as few stores as 32 bytes each allow."""
    stores = [i for i in machine_code(config, arch).instructions if i.kind.startswith("STG")]
    if config.requantize:
        want = 2 + 3  # 16 codes, and their scale; zeros behind the last scale of a row
    elif config.interleaved:
        want = 4  # 4 results for each 4 gates
    else:
        want = config.out_columns * (4 if config.wide_out else 2) // 32
    assert len(stores) == want


@DISASSEMBLED
def test_loads_of_numbers(config: BlackwellConfig, arch: str) -> None:
    """A lane of the schedule reads the ends of its 16 experts and the one before them, an epilogue thread a tile's
    global scales and what its flags ask for of its row."""
    loads = [i for i in machine_code(config, arch).instructions if i.kind == "LDG"]
    of_rows = config.row_scale + (config.weighted or config.scattered) + config.weighted + config.requantize
    assert len(loads) == MAX_EXPERTS // 32 + 1 + 3 + of_rows


@DISASSEMBLED
def test_a_program_has_a_multiprocessor_to_itself(config: BlackwellConfig, arch: str) -> None:
    """Threads, registers, shared memory; nothing in local memory. 512 columns of tensor memory allow one program."""
    code = machine_code(config, arch)
    assert code.stack == code.local == 0
    assert not {"LDL", "STL"} & {i.name.split(".")[0] for i in code.instructions}
    assert code.threads == THREADS
    assert code.registers * THREADS <= 64 * 1024
    assert 2 * config.shared_bytes > SHARED_BYTES >= config.shared_bytes


@DISASSEMBLED
def test_arguments_stand_where_the_launcher_puts_them(config: BlackwellConfig, arch: str) -> None:
    """Four tensor maps of 128 bytes, nine addresses, four integers, a float."""
    want = [(128 * i, 128) for i in range(4)]
    want += [(512 + 8 * i, 8) for i in range(9)] + [(584 + 4 * i, 4) for i in range(5)]
    assert machine_code(config, arch).parameters == want


@CONFIGS
def test_ptx_is_made_of_the_instructions_meant(config: BlackwellConfig, arch: str) -> None:
    """The same counts where there is no disassembler; pairs of CTAs load, copy, multiply and signal as pairs."""
    text = ptx(config, arch)
    assert f".target {arch}" in text
    group = f"cta_group::{config.m // 128}"
    assert len(re.findall(rf"tcgen05\.mma\.{group}\.kind::mxf4nvf4\.block_scale\.block16", text)) == config.k // 64
    copies = config.k // 64 * (1 + -(-config.n // 128))
    assert len(re.findall(rf"tcgen05\.cp\.{group}\.32x128b\.warpx4", text)) == copies
    assert len(re.findall(rf"tcgen05\.ld\.sync\.aligned\.32x32b\.x{SUBTILE}\.b32", text)) == 1
    loads = re.findall(r"cp\.async\.bulk\.tensor\.(\w+)\.\S+", text)
    assert sorted(loads) == ["3d", "3d", "4d", "4d"]
    assert len(re.findall(r"cp\.async\.bulk\.tensor\S*cta_group::2", text)) == (4 if config.m == 256 else 0)
    assert len(re.findall(rf"tcgen05\.commit\.{group}\S*multicast", text)) == (2 if config.m == 256 else 0)
    assert ".local" not in text


@CONFIGS
def test_coordinates_are_in_the_order_of_the_tensor_maps(config: BlackwellConfig, arch: str) -> None:
    """CuTe orders a box's coordinates by its own rule, the launch describes tensors by ``b_scale_order``: codes have
    bytes, rows, expert; scales a place within the tile, the tile along K (the same register for A and B), that of rows,
    expert."""
    found = re.findall(r"cp\.async\.bulk\.tensor\.\S+ \[[^\]{]*\], \[%\w+, \{([^}]*)\}", ptx(config, arch))
    a, b, a_scales, b_scales = (each.split(", ") for each in found)
    b_scales = [b_scales[config.b_scale_order.index(i)] for i in range(4)]
    assert a[0] == b[0]
    assert a_scales[1] == b_scales[1]
    assert b[2] == b_scales[3]
    assert len({a[1], b[1], b[2], a[0], a_scales[1], a_scales[2], b_scales[2]}) == 7


@pytest.mark.parametrize(
    ("sizes", "flags", "what"),
    [
        ((128, 96, 256, 4), {}, "tiles are"),
        ((64, 128, 256, 4), {}, "tiles are"),
        ((128, 256, 256, 8), {}, "shared memory"),
        ((128, 128, 256, 1), {}, "stages"),
        ((128, 128, 256, 2), {"requantize": True}, "belong to SwiGLU"),
        ((128, 128, 256, 2), {"gated": True, "wide_out": True}, "bf16"),
        ((128, 128, 256, 2), {"gated": True, "requantize": True, "scattered": True}, "order of rows"),
    ],
)
def test_impossible_configurations_are_refused(sizes, flags, what) -> None:
    """Before anything is compiled, with the reason."""
    with pytest.raises(ConfigError, match=what):
        GroupedGemm(BlackwellConfig(*sizes, **flags))


@pytest.mark.kernels
def test_the_emulated_kernels_compile() -> None:
    """What tests/kernels/test_blackwell_cuda.py runs on a GPU: the same code with its tensor cores replaced."""
    from kernels.blackwell_emulated import ARCH, needed
    from kernels.blackwell_emulation import compile_emulated

    for config in needed():
        code = read(compile_emulated(config, ARCH)[0])
        whole = counts(code.instructions)
        assert whole["UTMALDG"] == 4
        assert config.shared_bytes <= SHARED_BYTES
