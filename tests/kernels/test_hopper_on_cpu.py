"""The Hopper GEMM of up to eight rows a group, as compiled to PTX, run on the CPU.

Its PTX is translated to C (:mod:`kernels.ptx_on_cpu`): which program takes which tile, the pipeline, decoding, both
epilogues and all stores are the compiled kernel's, in random orders of threads and loads. Programs run one after the
other, so that the first one takes every tile that no other begins with.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from oracle import dequantize, random_weights, relative_l2
from torch import Tensor

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from dsv4.kernels.hopper import launch
from dsv4.kernels.hopper.cache import ARCH
from dsv4.kernels.hopper.config import ROW_UNIT, HopperConfig
from dsv4.kernels.hopper.grouped_gemm import compile_kernel
from dsv4.kernels.hopper.layout import from_image, pack_matrix, to_image
from dsv4.nvfp4 import unpack_nibbles
from kernels import ptx_on_cpu
from kernels.row_groups import expected, filled
from kernels.test_hopper_interpreted import quantized

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

EXPERTS, ROWS, K = 4, 256, 384  # three blocks of K: more than the pipelines hold
FEATURES = ROWS // 2
LOCAL = [0, 2, 2, -1, 3, *[2] * 9, 3, -1, 0, 3]
"""Of each slot: expert 1 is idle, 2 has a whole row tile and a part of another, two slots are dropped."""

TABLES = expected(LOCAL, EXPERTS, ROW_UNIT, ROW_UNIT)
SERVED = torch.tensor(LOCAL) >= 0
"""Of each slot."""

FILLED = torch.tensor(TABLES.row_slot) >= 0
"""Of each row."""

SLOTS = [slot for slot in TABLES.row_slot if slot >= 0]
"""Of each row that is filled."""

DOWN = HopperConfig(((8,),), 1, 1, 2, 1, wide_out=True)
GATED = HopperConfig(((8,),), 2, 1, 2, 1, gated=True, limited=True)
LIMIT = 2.0
PROGRAMS = (1, 2, 100)
"""One that takes all tiles, fewer than tiles, and one for each tile."""


def ptx(config: HopperConfig) -> str:
    return compile_kernel(config, ARCH)[2]


@cache
def kernel_on_cpu(config: HopperConfig, device_index: int) -> ptx_on_cpu.Kernel:
    """In place of :func:`dsv4.kernels.hopper.launch.gemm_kernel`."""
    return ptx_on_cpu.Kernel(ptx(config), config.shared_bytes)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(launch, "gemm_kernel", kernel_on_cpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@cache
def matrices(gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Packed experts, their global scales, and their values, float64 ``[E, ROWS, K]``."""
    if gated:
        weights = random_weights(EXPERTS, K, FEATURES, seed=1, split_gate_up=True)
        fp4, sf, gs = weights.l1_fp4, weights.l1_sf, weights.l1_gs
    else:
        weights = random_weights(EXPERTS, ROWS, K, seed=2)
        fp4, sf, gs = weights.l2_fp4, weights.l2_sf, weights.l2_gs
    codes = unpack_nibbles(fp4)
    packed = torch.stack([pack_matrix(c, s.view(torch.uint8), gated) for c, s in zip(codes, sf, strict=True)])
    of_rows = gs.repeat_interleave(FEATURES, 1) if gated else gs[:, None].expand(EXPERTS, ROWS)
    return packed, gs, torch.from_numpy(dequantize(fp4, sf, of_rows[..., None]))


def tokens() -> Tensor:
    """bf16 ``[R, K]``: a row for each slot, and NaN where none is."""
    x = torch.randn(len(TABLES.row_slot), K, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[~FILLED] = torch.nan
    return x


def multiply(
    config: HopperConfig, programs: int, out: Tensor, row_scale: Tensor | None = None, **operands: Tensor
) -> list[int]:
    """``out`` written by the kernel; how often programs asked for another tile, for each product."""
    packed, gs, _ = matrices(config.gated)
    tiles, groups = filled(TABLES, ROW_UNIT)
    launch.grouped_gemm(
        config, to_image(tokens(), ROW_UNIT).flatten(), row_scale, packed, 0, gs, tiles, groups, out,
        rows=ROWS, k=K, multiprocessors=programs, limit=LIMIT if config.limited else None, **operands,
    )  # fmt: skip
    return groups.taken.tolist()


def asked_for(config: HopperConfig, programs: int) -> int:
    """How often it should be: once a tile, if there are more than programs."""
    tiles = len(TABLES.group_expert) * (ROWS // (64 * config.warpgroups))
    return tiles if tiles > programs else 0


def down(config: HopperConfig, programs: int, **operands: Tensor) -> Tensor:
    """Slot rows ``[S, ROWS]``, poisoned before, of slots that are served."""
    out = torch.full((len(LOCAL), ROWS), torch.nan, dtype=torch.float32 if config.wide_out else torch.bfloat16)
    assert multiply(config, programs, out, **operands) == [0, asked_for(config, programs)]
    assert out[~SERVED].isnan().all()  # nothing of a dropped slot
    return out[SERVED]


def wanted() -> Tensor:
    """Of slots that are served, float64."""
    _, _, values = matrices(gated=False)
    x = tokens().double()
    return torch.stack([values[LOCAL[slot]] @ x[TABLES.slot_row[slot]] for slot in sorted(SLOTS)])


@pytest.mark.parametrize(
    "config", [DOWN, pytest.param(replace(DOWN, warpgroups=2, stages=3), marks=pytest.mark.kernels)], ids=["64", "128"]
)
def test_slot_rows(config):
    """Every slot's row is its token's product, whoever took its tiles, to the bit; bf16 is that, rounded."""
    found = [down(config, programs) for programs in PROGRAMS]
    assert relative_l2(found[0], wanted()) <= 1e-6
    for other in found[1:]:
        assert torch.equal(found[0], other)
    for programs in PROGRAMS[1:]:
        assert torch.equal(down(replace(config, wide_out=False), programs), found[0].bfloat16())


def test_scales_of_rows_and_of_experts():
    """A number for each token, or for each expert, multiplies its results."""
    of_experts = torch.tensor([0.5, 2.0, 0.25, 4.0])
    plain = down(DOWN, 1)
    experts = torch.tensor(LOCAL)[SERVED]
    assert torch.equal(down(DOWN, 1, expert_scale=of_experts), plain * of_experts[experts, None])
    of_rows = 2.0 ** torch.arange(-8, len(TABLES.row_slot) - 8)
    of_slots = of_rows[[row for row in TABLES.slot_row if row >= 0]]
    assert torch.equal(down(DOWN, 2, row_scale=of_rows), plain * of_slots[:, None])


def swiglu_image(config: HopperConfig, programs: int, **operands: Tensor) -> Tensor:
    """bf16 ``[R, FEATURES]``, what the image holds in rows that a slot fills."""
    image = torch.full((len(TABLES.row_slot) * FEATURES,), 7.0, dtype=torch.bfloat16)
    assert multiply(config, programs, image, **operands) == [asked_for(config, programs), 0]
    return from_image(image.view(-1, FEATURES // 64, ROW_UNIT, 64))[FILLED]


@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.kernels)])
def test_swiglu(weighted):
    """The image of the next product: clamped SwiGLU in bf16, times the routing weight if asked for, whoever took its
    tiles, to the bit."""
    config = replace(GATED, weighted=weighted)
    weights = torch.rand(len(LOCAL), generator=torch.Generator().manual_seed(4)) + 0.3
    found = [swiglu_image(config, programs, topk_weights=weights) for programs in PROGRAMS]
    for other in found[1:]:
        assert torch.equal(found[0], other)
    _, _, values = matrices(gated=True)
    x, want = tokens().double(), []
    for slot in SLOTS:
        gate, up = (values[LOCAL[slot]] @ x[TABLES.slot_row[slot]]).view(2, -1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        want.append(torch.nn.functional.silu(gate) * up * (weights[slot].double() if weighted else 1.0))
    assert relative_l2(found[0], torch.stack(want)) <= 3e-3


def test_a_quantized_result():
    """``e2m1 * sf`` under each expert's global scale, bit for bit what quantizing SwiGLU's image gives."""
    ones, scales = torch.ones(len(TABLES.row_slot)), torch.tensor([0.01, 0.02, 0.0003, 0.05])
    config = replace(GATED, row_scale=True)
    plain = swiglu_image(config, 1, row_scale=ones)
    got = [
        swiglu_image(replace(config, requantized=True), programs, row_scale=ones, result_gs=scales)
        for programs in PROGRAMS
    ]
    want = quantized(plain, scales[[LOCAL[slot] for slot in SLOTS]])
    for result in got:
        assert torch.equal(result + 0.0, want + 0.0)  # zeros keep no sign


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        (r"(atom\.global\.add\.u32 .*), 1;", r"\g<1>, 2;", "AssertionError"),
        (r"st\.shared\.b32 \[.*\], -1;", "", "nobody goes on|AssertionError|at shared address|at global address"),
        (r"bar\.warp\.sync.*;", "", "AssertionError|more arrivals"),
    ],
    ids=["a tile left out", "no word of the end", "a warp's signal"],
)
def test_a_broken_kernel_is_found(right, wrong, what, monkeypatch):
    """Tiles that nobody takes; consumers that are not told of the end; a stage that is freed while lanes still read."""
    text, count = re.subn(right, wrong, ptx(DOWN))
    assert count
    kernel = ptx_on_cpu.Kernel(text, DOWN.shared_bytes)
    monkeypatch.setattr(launch, "gemm_kernel", lambda config, device_index: kernel)
    with pytest.raises((RuntimeError, AssertionError)) as error:
        assert torch.equal(down(DOWN, 1), wanted().float())
    assert re.search(what, repr(error.value))
