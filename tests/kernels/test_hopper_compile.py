"""Hopper kernels compiled without a GPU: what instructions they are made of and what they occupy.

Eight configurations in ``make test``, all that V4-Flash and V4-Pro need in ``make test-kernels``.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from dsv4.backends.hopper import TILINGS, kernels
from dsv4.cli._shapes import SHAPES
from dsv4.kernels.hopper.cache import ARCH
from dsv4.kernels.hopper.config import MMA_TOKENS, ROW_UNIT, HopperConfig
from dsv4.kernels.hopper.grouped_gemm import compile_kernel
from dsv4.kernels.hopper.launch import GEMM_SIGNATURE
from kernels.cubin import Instruction, MachineCode, counts, read

SHARED_OF_SM = 228 * 1024
RESERVED = 1024  # of shared memory, for each program
REGISTERS_OF_SM = 64 * 1024


def needed() -> list[HopperConfig]:
    """What the two models may launch, in every mode and with every option."""
    found: dict[HopperConfig, None] = {}
    options = product(("bf16", "nvfp4"), ("static", "token", "calibrated"), ("output", "before_down"), (None, 10.0))
    for (form, scale, weight, limit), name in product(list(options), ("v4-flash", "v4-pro")):
        config = SHAPES[name].config(
            swiglu_limit=limit, activation_format=form, activation_scale=scale, route_weight=weight
        )
        found |= dict.fromkeys(kernels(config))
    return list(found)


def a_selection() -> list[HopperConfig]:
    """Eight at most: GEMM 1 of some lines of the table, every other one quantizing its result, and the last line's
    GEMM 2."""
    known = [c for c in NEEDED if c.row_scale and c.limited and not c.weighted]
    found = [next(c for c in NEEDED if c.wide_out and c.loops == TILINGS[-1].loops)]
    for n, line in enumerate(TILINGS):
        if n not in LEFT_OUT:
            wanted = (line.loops, line.gemm1, n % 2)
            found.append(next(c for c in known if (c.loops, shape(c), c.requantized) == wanted))
    return found


def shape(config: HopperConfig) -> tuple[int, int, int, int]:
    """As the table has it."""
    return config.warpgroups, config.blocks, config.stages, config.programs_per_sm


LEFT_OUT = (0, 1, 5, 8)
"""Lines of the table of which ``make test`` compiles no kernel."""

NEEDED = needed()
ALWAYS = a_selection()


def name(config: HopperConfig) -> str:
    options = (
        "gated", "wide_out", "row_scale", "weighted", "limited", "requantized", "follows_routing",
    )  # fmt: skip
    flags = [f for f in options if getattr(config, f)]
    widths = ".".join("+".join(str(w) for w in loop) for loop in config.loops)
    return "-".join([f"{widths}x{64 * config.warpgroups}x{128 * config.blocks}", *flags])


CONFIGS = pytest.mark.parametrize(
    "config", [pytest.param(c, id=name(c), marks=[] if c in ALWAYS else [pytest.mark.kernels]) for c in NEEDED]
)


@cache
def machine_code(config: HopperConfig) -> MachineCode:
    return read(compile_kernel(config, ARCH)[0])


def test_what_is_always_compiled() -> None:
    """Eight configurations at most, both GEMMs, all numbers of warpgroups and the longest groups of all lines that are
    not left out."""
    assert len(ALWAYS) <= 8
    assert {c.gated for c in ALWAYS} == {c.requantized for c in ALWAYS} == {True, False}
    assert {c.warpgroups for c in ALWAYS} == {line.gemm1[0] for line in TILINGS}
    assert {c.tokens for c in ALWAYS} == {line.tokens for n, line in enumerate(TILINGS) if n not in LEFT_OUT}


def check_decoding(loop: list[Instruction], blocks: int) -> None:
    """For each 64 x 64 tile of weights that a warp decodes, by the decoder's definition:

    1 load of 16 bytes, and 1 of 4 for every two tiles; a multiplication for each two weights and two for the scales; a
    byte permutation; for each of 4 words 2 rotations, 5 masks and a multiplication, and a mask for the scales. A
    rotation may be an IMAD. Beyond that at most six of each for the loop's own counting and addresses.
    """
    count, tiles = counts(loop), 2 * blocks
    assert count["LDS.128"] == tiles
    assert count["LDS"] == blocks
    assert count["HMUL2"] == (16 + 2) * tiles
    assert count["PRMT"] == tiles
    assert 0 <= count["LOP3"] - (4 * 5 + 1) * tiles <= 6
    assert 0 <= count["SHF"] + count["IMAD"] - 4 * (2 + 1) * tiles <= 6


def wide_loops(config: HopperConfig) -> list[tuple[int, ...]]:
    """Widths of the loops that multiply with wgmma."""
    return [loop for loop in config.loops if loop[-1] > MMA_TOKENS]


def fragments_of(loop: list[Instruction]) -> list[str]:
    """The first register of the weights that each wgmma reads, in the order of the code."""
    return [i.operands.split(",")[1].strip() for i in loop if i.kind == "HGMMA"]


def names_of(loop: list[Instruction], kind: str) -> list[str]:
    """The different instructions of a kind."""
    return sorted({i.name for i in loop if i.kind == kind})


@CONFIGS
def test_main_loops_are_made_of_the_instructions_meant(config: HopperConfig) -> None:
    """Of each loop: what decoding takes, once however many widths it has, and for each 64 of K 4 wgmma of each width;
    or, for the width that mma multiplies, 4 of them and 2 loads of four matrices of tokens."""
    code, tiles = machine_code(config), 2 * config.blocks
    wide = wide_loops(config)
    loops, narrow = code.loops("HGMMA"), code.loops("HMMA")
    assert len(loops) == len(wide)
    assert len(narrow) == len(config.loops) - len(wide)
    for loop in loops + narrow:
        check_decoding(loop, config.blocks)
    names = [Counter(i.name for i in loop if i.kind == "HGMMA") for loop in loops]
    for widths in wide:
        assert {f"HGMMA.64x{width}x16.F32.BF16": 4 * tiles for width in widths} in names
    for loop in narrow:
        assert (counts(loop)["HMMA"], counts(loop)["LDSM"]) == (4 * tiles, 2 * tiles)
        assert names_of(loop, "HMMA") == ["HMMA.16816.F32.BF16"]
        assert names_of(loop, "LDSM") == ["LDSM.16.M88.4"]


@CONFIGS
def test_results_are_quantized_by_the_instructions_meant(config: HopperConfig) -> None:
    """Behind each loop, of eight tokens at a time: each warp transposes its pairs once; quantized, it clamps both
    values in one instruction and aligns each, for rounding, in one that adds integers and takes the larger. Of 16
    tokens each warp stores maxima once, and a warp turns them into terms, two times sixteen bytes, eight warps
    together. (The producer stores as many for a tile, of the first one and of any other.) Around that each loop has two
    barriers, beside the one for the rows' slots."""
    code = machine_code(config).instructions
    count = counts(code)
    eights = sum(loop[-1] // 8 for loop in config.loops)
    rounds = sum(-(-loop[-1] // 128) for loop in config.loops)
    assert count["MOVM"] == (eights if config.gated else 0 if config.wide_out else 2 * eights)
    assert count["HMNMX2"] == (eights if config.requantized else 0)
    least = f"{(127 + 22) << 23:#x}"  # what aligns quotients below 2
    rounding = [i for i in code if i.kind == "VIADDMNMX" and least in i.operands]
    assert len(rounding) == (2 * eights if config.requantized else 0)
    assert count["STS.128"] == 2 + (2 * rounds if config.requantized else 0)
    slots = not config.gated or config.row_scale or config.weighted
    assert count["BAR"] == 1 + (slots + 2 * config.requantized) * len(config.loops)


@CONFIGS
def test_a_program_takes_one_tile_after_the_other(config: HopperConfig) -> None:
    """One atomic addition, in none of the main loops."""
    code = machine_code(config)
    assert [i.name for i in code.instructions if i.kind == "ATOMG"] == ["ATOMG.E.ADD.STRONG.GPU"]
    assert not any(counts(loop)["ATOMG"] for loop in code.loops("HGMMA") + code.loops("HMMA"))


@pytest.mark.kernels
@pytest.mark.parametrize("line", [TILINGS[0], TILINGS[4], TILINGS[-1]], ids=lambda line: str(line.rows_per_expert))
def test_each_lane_can_release_a_stage(line) -> None:
    """For racecheck: the same main loops, in which arriving at a barrier does not hang on the lane."""
    plain = HopperConfig(line.loops, *line.gemm2)
    kinds = ("HGMMA", "HMMA", "LDS", "LDSM", "SYNCS", "WARPGROUP")
    found = [machine_code(config) for config in (plain, replace(plain, every_lane_releases=True))]
    loops = [code.loops("HGMMA") + code.loops("HMMA") for code in found]
    assert [[counts(loop)[kind] for kind in kinds] for loop in loops[0]] == [
        [counts(loop)[kind] for kind in kinds] for loop in loops[1]
    ]
    assert all(code.stack == code.local == 0 for code in found)
    assert machine_code(plain).instructions != found[1].instructions


def waits(instructions: list[Instruction]) -> list[int]:
    """How many batches of wgmma may still be under way behind each wait."""
    return [int(i.operands.split(",")[1].strip(" ;"), 16) for i in instructions if i.name == "WARPGROUP.DEPBAR.LE"]


@CONFIGS
def test_tensor_cores_work_while_weights_are_decoded(config: HopperConfig) -> None:
    """ptxas has not waited for every single wgmma, as it silently does where registers are too few: a loop begins a
    batch of 4 of each width once for each 64 of K, and waits there until no more than the latest batch is under way;
    all are awaited once, behind the loop. Batches of the same 64 of K read the same registers whatever their width, and
    those of the next 64 others, since both may be under way."""
    code, tiles = machine_code(config), 2 * config.blocks
    loops = code.loops("HGMMA")
    for loop in loops:
        widths = len(names_of(loop, "HGMMA"))
        assert names_of(loop, "WARPGROUP") == ["WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE"]
        assert sum(i.name == "WARPGROUP.ARRIVE" for i in loop) == tiles * widths
        assert waits(loop) == [1] * tiles
        registers = fragments_of(loop)
        batches = [set(registers[at : at + 4]) for at in range(0, len(registers), 4)]
        halves = batches[::widths]
        assert batches == [half for half in halves for _ in range(widths)]
        assert all(not one & other for one, other in pairwise([*halves, halves[0]]))
    assert sorted(waits(code.instructions)) == [0] * len(loops) + [1] * (tiles * len(loops))


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
        warpgroups = 1 + config.warpgroups
        launched = -(-code.registers // 8) * 8 * warpgroups
        assert config.producer_registers + config.warpgroups * config.consumer_registers <= launched
        assert 128 * launched <= REGISTERS_OF_SM


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


@CONFIGS
def test_a_programs_first_tile_waits_for_memory_once(config: HopperConfig) -> None:
    """All that is looked up for it, four words, is asked for before the first of them is used for a branch."""
    code = machine_code(config).instructions
    kinds = [i.kind for i in code]
    asked, written = kinds.index("LDG"), kinds.index("STS.128")
    assert counts(code[asked:written])["LDG"] == 4
    assert "BRA" not in kinds[asked:written]


@CONFIGS
def test_tables_of_routing_are_read_when_they_are_there(config: HopperConfig) -> None:
    """A kernel behind the launch that writes them waits for that launch, and only then lets the next one begin, which
    reads them without waiting; any other kernel lets the next one begin at once. Weights are on their way before the
    tokens are waited for."""
    kinds = [i.kind for i in machine_code(config).instructions]
    waits, begins = kinds.index("ACQBULK"), kinds.index("PREEXIT")
    assert begins < kinds.index("LDG")
    assert (waits < begins) == config.follows_routing
    assert kinds.index("UBLKCP") < len(kinds) - kinds[::-1].index("ACQBULK")


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: str(t.rows_per_expert))
def test_widths_are_ones_that_there_are(tiling) -> None:
    """Ascending multiples of 8 up to wgmma's 256; the longest group is whole row tiles, and the warpgroups, also the
    fewer ones that the smallest matrix gets, have a thread for each of its rows."""
    widths = [width for loop in tiling.loops for width in loop]
    assert widths == sorted(set(widths))
    assert set(widths) <= set(range(8, 257, 8))
    assert tiling.tokens % ROW_UNIT == 0
    for gemm in (tiling.gemm1, tiling.gemm2):
        config = HopperConfig(tiling.loops, *gemm)
        assert config.tokens <= 128 * config.fitted(rows=128, k=128).warpgroups


def test_small_matrices_take_the_nearest_configuration() -> None:
    """Where whole tiles do not fit, warpgroups and K blocks are halved until they do."""
    fitted = HopperConfig(((8,),), 4, 4, 2, 1).fitted(rows=128, k=384)
    assert (fitted.warpgroups, fitted.blocks) == (2, 1)
