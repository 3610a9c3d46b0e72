"""Hopper kernels compiled without a GPU: what instructions they are made of and what they occupy.

Eight configurations in ``make test``, all that V4-Flash and V4-Pro need in ``make test-kernels``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import product

import pytest

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from dsv4.backends.hopper import TILINGS, kernels
from dsv4.cli._shapes import SHAPES
from dsv4.config import MoEConfig
from dsv4.kernels.hopper.config import PRODUCER_REGISTERS, HopperConfig
from dsv4.kernels.hopper.grouped_gemm import compile_kernel
from dsv4.kernels.hopper.launch import GEMM_SIGNATURE
from kernels.cubin import MachineCode, counts, read

SHARED_OF_SM = 228 * 1024
RESERVED = 1024  # of shared memory, for each program
REGISTERS_OF_SM = 64 * 1024


def needed() -> list[HopperConfig]:
    """What the two models may launch, in every mode and with every option."""
    found: dict[HopperConfig, None] = {}
    options = product(("bf16", "nvfp4"), ("static", "calibrated"), ("output", "before_down"), (None, 10.0))
    for (form, scale, weight, limit), name in product(list(options), ("v4-flash", "v4-pro")):
        shape = SHAPES[name]
        config = MoEConfig(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, top_k=shape.top_k, swiglu_limit=limit,
            activation_format=form, activation_scale=scale, route_weight=weight,
        )  # fmt: skip
        found |= dict.fromkeys(kernels(config))
    return list(found)


def a_selection() -> list[HopperConfig]:
    """Eight at most: GEMM 1 of six lines of the table and of the last one, and the last one's GEMM 2."""
    lines = {(c.tokens, c.warpgroups): c for c in NEEDED if c.gated and c.row_scale and c.limited and not c.weighted}
    gated = list(lines.values())
    return [*gated[:-1][:6], gated[-1], next(c for c in NEEDED if c.wide_out and c.tokens == gated[-1].tokens)]


NEEDED = needed()
ALWAYS = a_selection()


def name(config: HopperConfig) -> str:
    flags = [f for f in ("gated", "wide_out", "row_scale", "weighted", "limited") if getattr(config, f)]
    return "-".join([f"{config.tokens}x{64 * config.warpgroups}x{128 * config.blocks}", *flags])


CONFIGS = pytest.mark.parametrize(
    "config", [pytest.param(c, id=name(c), marks=[] if c in ALWAYS else [pytest.mark.kernels]) for c in NEEDED]
)


@cache
def machine_code(config: HopperConfig) -> MachineCode:
    return read(compile_kernel(config)[0])


def test_what_is_always_compiled() -> None:
    """Eight configurations at most, both GEMMs, the smallest and the largest token tile."""
    assert len(ALWAYS) <= 8
    assert {c.gated for c in ALWAYS} == {True, False}
    tiles = {t.gemm1[0] for t in TILINGS}
    assert {min(tiles), max(tiles)} <= {c.tokens for c in ALWAYS}


@CONFIGS
def test_main_loop_is_made_of_the_instructions_meant(config: HopperConfig) -> None:
    """For each 64 x 64 tile of weights that a warp decodes, by the decoder's definition:

    4 wgmma; 1 load of 16 bytes, and 1 of 4 for every two tiles; a multiplication for each two weights and two for the
    scales; 3 byte permutations; for each of 4 words 2 rotations, 5 masks and a multiplication, and a mask and a shift
    for the scales. A shift may be an IMAD. Beyond that at most six of each for the loop's own counting and addresses.
    """
    loops = machine_code(config).loops("HGMMA")
    assert loops
    for loop in loops:
        count, tiles = counts(loop), 2 * config.blocks
        assert count["HGMMA"] == 4 * tiles
        assert count["LDS.128"] == tiles
        assert count["LDS"] == config.blocks
        assert count["HMUL2"] == (16 + 2) * tiles
        assert count["PRMT"] == 3 * tiles
        assert 0 <= count["LOP3"] - (4 * 5 + 1) * tiles <= 6
        assert 0 <= count["SHF"] + count["IMAD"] - (4 * (2 + 1) + 1) * tiles <= 6
        assert {i.name for i in loop if i.kind == "HGMMA"} == {f"HGMMA.64x{config.tokens}x16.F32.BF16"}


@CONFIGS
def test_programs_are_resident_together(config: HopperConfig) -> None:
    """As many as the configuration counts on: registers, threads, shared memory; nothing in local memory."""
    code = machine_code(config)
    assert code.stack == code.local == 0
    assert not {"LDL", "STL"} & {i.name.split(".")[0] for i in code.instructions}
    assert code.threads == config.threads
    # Registers are handed out to warps by 256.
    of_warp = -(-code.registers * 32 // 256) * 256
    warps = -(-config.threads // 32)
    assert config.programs_per_sm * warps * of_warp <= REGISTERS_OF_SM
    assert config.programs_per_sm * config.threads <= 2048
    assert config.programs_per_sm * (config.shared_bytes + RESERVED) <= SHARED_OF_SM
    moved = [i.name for i in code.instructions if i.name.startswith("USETMAXREG")]
    assert len(moved) == (2 if config.producer_group else 0)
    if config.producer_group:
        after = PRODUCER_REGISTERS + config.warpgroups * config.consumer_registers
        assert 128 * after <= 128 * (1 + config.warpgroups) * code.registers // 8 * 8 <= REGISTERS_OF_SM


@CONFIGS
def test_arguments_stand_where_the_launcher_puts_them(config: HopperConfig) -> None:
    """Offset and size of each argument, as compiled, are those of the launcher's C types."""
    end, places = 0, []
    for kind in GEMM_SIGNATURE:
        size = ctypes.sizeof(kind)
        end = -(-end // size) * size
        places.append((end, size))
        end += size
    assert machine_code(config).parameters == places


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: str(t.rows_per_expert))
def test_both_gemms_share_a_token_tile(tiling) -> None:
    """One tile map serves both; wgmma's N is a multiple of 8 up to 256."""
    assert tiling.gemm1[0] == tiling.gemm2[0]
    assert tiling.gemm1[0] in range(8, 257, 8)


def test_small_matrices_take_the_nearest_configuration() -> None:
    """Where whole tiles do not fit, warpgroups and K blocks are halved until they do."""
    fitted = HopperConfig(8, 4, 4, 2, 1).fitted(rows=128, k=384)
    assert (fitted.warpgroups, fitted.blocks) == (2, 1)
