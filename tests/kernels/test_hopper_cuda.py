"""Every line of the Hopper backend's table on a GPU: numbers, graphs, packing; a few calls for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_cases import BAR, MODES, build, inputs, largest_call, on, poisoned
from oracle import OracleWeights, nearest_reference, random_weights, relative_l2

from dsv4.backends import hopper, proof
from dsv4.backends.base import Verdict
from dsv4.backends.hopper import ONE_WAVE, TILINGS, Tiling, _gemm1_config, _gemm2_config
from dsv4.config import MoEConfig
from dsv4.kernels.hopper.config import FEW_SLOTS, ROW_UNIT
from dsv4.kernels.hopper.layout import matrix_bytes
from dsv4.moe import Nvfp4MoE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

H, INTER, K = 384, 256, 2  # K blocks of GEMM 1 in ones, of GEMM 2 in twos
LONG = 1536  # more K blocks than any pipeline holds
SCALES: dict[str, Any] = {"l1_input_scale": 0.002, "l2_input_scale": 0.01}
EVERY_MODE: dict[str, dict[str, Any]] = MODES | {
    "w4a4-calibrated": {"activation_format": "nvfp4", "activation_scale": "calibrated"},
    "w4a4-per-expert": MODES["w4a4-static"] | {"l1_scale_policy": "per_expert"},
}


def of_lines(lines: Sequence[Tiling]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("line", lines, ids=lambda line: f"up-to-{line.rows_per_expert:g}")


LINES = of_lines(TILINGS)
TILES = pytest.mark.parametrize("several", [False, True], ids=["a-tile-each", "several-tiles-each"])
"""Of a program. Layers as small as these have fewer tiles than a GPU has places for programs."""


def target() -> tuple[str, torch.device]:
    return "hopper", torch.device("cuda", torch.cuda.current_device())


def input_scales(mode: str, experts: int) -> dict[str, Any]:
    """One for all, or, for the mode that keeps them apart, different ones."""
    if mode != "w4a4-per-expert":
        return SCALES
    return {
        "l1_input_scale": torch.linspace(0.001, 0.007, experts),
        "l2_input_scale": torch.linspace(0.03, 0.005, experts),
    }


def with_few_programs(moe: Nvfp4MoE) -> None:
    """Launch from now on as for a GPU of one multiprocessor: programs take one tile after the other."""
    moe._backend._multiprocessors = 1


def taken(moe: Nvfp4MoE) -> list[int]:
    """How often programs have asked for another tile in the last call, for each product."""
    return moe._backend._plan.views(moe._scratch)["taken"].tolist()


@TILES
@LINES
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_line_matches_the_oracle(line, mode, several):
    """The largest call of each line, with dropped ids, a skewed expert and an idle one, is within the bar."""
    tokens, experts = largest_call(TILINGS, line, K)
    weights, scales = random_weights(experts, H, INTER, seed=1, split_gate_up=True), input_scales(mode, experts)
    x, w, ids = inputs(tokens, H, K, experts, seed=tokens)
    ids[ids == 3] = 5
    ids[1::7, 0] = -1
    settings = EVERY_MODE[mode] | {"swiglu_limit": 2.0}
    moe = build(target(), weights, top_k=K, max_num_tokens=max(tokens, 16), **scales, **settings)
    if several:
        with_few_programs(moe)
    args = on(target()[1], x, w, ids)
    if mode == "w4a4-calibrated":
        l1, l2 = moe.compute_activation_global_scales(*args)
        scales = {"l1_input_scale": l1, "l2_input_scale": l2}
        settings |= {"activation_scale": "static"}
    out = poisoned(tokens, H, target()[1])
    moe.run(*args, out=out)
    assert (min(taken(moe)) > 0) == several
    want = nearest_reference(out.cpu(), x, w, ids, weights, **scales, **({"activation_scale": "static"} | settings))
    assert relative_l2(out.cpu(), want) <= BAR


@LINES
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
def test_every_line_replays_and_keeps_a_tokens_bits(line, mode):
    """A graph of each line's largest call, whose programs take one tile after the other, gives the bits of a call whose
    programs have one each, for fresh routings; each token of it those that it has alone, with ``batch_invariant``."""
    tokens, experts = largest_call(TILINGS, line, K)
    moe = build(
        target(), random_weights(experts, H, INTER, seed=1), top_k=K, max_num_tokens=tokens, batch_invariant=True,
        route_weight="before_down", **SCALES, **MODES[mode],
    )  # fmt: skip
    args = on(target()[1], *inputs(tokens, H, K, experts))
    out = poisoned(tokens, H, target()[1], torch.float32)
    multiprocessors = moe._backend._multiprocessors
    with_few_programs(moe)
    moe.warmup((1, tokens))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.run(*args, out=out)
    moe._backend._multiprocessors = multiprocessors
    for seed in (1, 2, 3):
        for old, new in zip(args, inputs(tokens, H, K, experts, seed=seed), strict=True):
            old.copy_(new)
        if seed == 2:
            args[2].fill_(experts - 1)
        if seed == 3:
            args[2][::2] = -1
        out.fill_(torch.nan)
        graph.replay()
        assert min(taken(moe)) > 0 or seed == 3
        assert torch.equal(out, moe.run(*args, out_dtype=torch.float32)), seed
    for t in {0, tokens // 2, tokens - 1}:
        alone = moe.run(*(a[t : t + 1] for a in args), out_dtype=torch.float32)
        assert torch.equal(alone[0], out[t])


@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
@of_lines([line for line in TILINGS if line.tokens > ROW_UNIT])
def test_every_width_of_every_line_matches_the_oracle(line, mode, monkeypatch):
    """An expert for each number of row tiles up to the longest group, and none is full: all widths of all loops, and
    what each does with fewer rows, in one call; of GEMM 1 on more K than a stage of any line has."""
    hidden = 512
    experts = line.tokens // ROW_UNIT
    rows = torch.arange(experts) * ROW_UNIT + 1 + torch.arange(experts) % (ROW_UNIT - 1)
    tokens = int(rows.sum())
    # Few slots are routed otherwise, which most lines never are.
    fewest = replace(TILINGS[0], rows_per_expert=FEW_SLOTS / experts if tokens > FEW_SLOTS else 0.0)
    monkeypatch.setattr(hopper, "TILINGS", (fewest, replace(line, rows_per_expert=float("inf"))))
    x, w, _ = inputs(tokens, hidden, 1, experts, seed=line.tokens)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(experts).repeat_interleave(rows)[order, None]
    weights = random_weights(experts, hidden, INTER, seed=1, split_gate_up=True)
    settings = MODES[mode] | {"swiglu_limit": 2.0}
    moe = build(target(), weights, top_k=1, max_num_tokens=max(tokens, 16), **SCALES, **settings)
    out = poisoned(tokens, hidden, target()[1])
    moe.run(*on(target()[1], x, w, ids), out=out)
    settings = {"activation_scale": "static"} | settings
    want = nearest_reference(out.cpu(), x, w, ids, weights, **SCALES, **settings)
    got = out.cpu().double().numpy()
    for expert in range(experts):
        served = (ids[:, 0] == expert).numpy()
        assert relative_l2(got[served], want[served]) <= BAR, expert


@pytest.fixture
def no_self_check(monkeypatch) -> Iterator[None]:
    """It would be most of what a tool that follows every access has to follow."""
    monkeypatch.setattr(proof, "known", lambda backend, device: Verdict(True, "not asked here"))
    proof.prove.cache_clear()
    yield
    proof.prove.cache_clear()


def every_lane_releases(monkeypatch) -> None:
    """Every lane says for itself that it has read a stage: racecheck does not see that one says it for a warp that is
    together, and takes what the others have read for unordered as soon as the stage is filled again."""
    from dsv4.kernels.hopper import launch

    load = launch.gemm_kernel
    monkeypatch.setattr(
        launch, "gemm_kernel", lambda config, device: load(replace(config, every_lane_releases=True), device)
    )


@pytest.mark.usefixtures("no_self_check")
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-token", "w4a4-static"])
@LINES
@TILES
def test_sanitize(line, mode, several, monkeypatch):
    """One call of every line and format, a small one, writes all of its result: for compute-sanitizer. Programs that
    take several tiles fill their pipelines more than once: see ``every_lane_releases``."""
    top_k = 1
    tokens, experts = largest_call(TILINGS, line, top_k)
    weights = random_weights(experts, 256, 128, seed=1)
    moe = build(target(), weights, top_k=top_k, max_num_tokens=tokens, swiglu_limit=2.0, **SCALES, **MODES[mode])
    if several:
        every_lane_releases(monkeypatch)
        with_few_programs(moe)
    out = poisoned(tokens, 256, target()[1])
    moe.run(*on(target()[1], *inputs(tokens, 256, top_k, experts)), out=out)
    assert out.isfinite().all()
    assert (min(taken(moe)) > 0) == several


@pytest.mark.usefixtures("no_self_check")
@pytest.mark.parametrize(("hidden", "inter"), [(LONG, 128), (128, LONG)])
@LINES
@TILES
def test_sanitize_long_k(line, hidden, inter, several, monkeypatch):
    """One expert, few tiles, and a K for which each pipeline is filled more than once, in either product, of which the
    one with the short K takes several tiles a program where it is asked to."""
    every_lane_releases(monkeypatch)
    tokens = largest_call(TILINGS, line, 1)[0] // 8
    weights = random_weights(1, hidden, inter, seed=1)
    moe = build(target(), weights, top_k=1, max_num_tokens=max(tokens, 1), **SCALES, **MODES["w4a4-static"])
    if several:
        with_few_programs(moe)
    out = poisoned(max(tokens, 1), hidden, target()[1])
    moe.run(*on(target()[1], *inputs(max(tokens, 1), hidden, 1, 1)), out=out)
    assert out.isfinite().all()
    assert (max(taken(moe)) > 0) == several


@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
@pytest.mark.parametrize("shape", ONE_WAVE, ids=str)
def test_every_shape_for_few_tiles_matches_the_oracle(shape, mode, monkeypatch):
    """Each shape that a small call may take, routed in one launch and in two, with a K longer than its pipeline."""
    monkeypatch.setattr(hopper, "ONE_WAVE", (shape,))
    monkeypatch.setattr(hopper.HopperBackend, "_at_once", lambda self, shape: 1 << 20)
    weights = random_weights(8, LONG, LONG, seed=1)
    moe = build(target(), weights, top_k=K, max_num_tokens=40, swiglu_limit=2.0, **SCALES, **MODES[mode])
    for tokens in (1, 7, 40):
        x, w, ids = inputs(tokens, LONG, K, 8, seed=tokens)
        out = poisoned(tokens, LONG, target()[1])
        moe.run(*on(target()[1], x, w, ids), out=out)
        settings = {"activation_scale": "static", "swiglu_limit": 2.0} | MODES[mode]
        want = nearest_reference(out.cpu(), x, w, ids, weights, **SCALES, **settings)
        assert relative_l2(out.cpu(), want) <= BAR


@TILES
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
def test_layers_behind_one_another(mode, several):
    """A graph of calls of few slots on one workspace, each launched before the one before has ended, gives the bits of
    calls that wait for each other, with fresh inputs and routings in every replay."""
    moe = build(
        target(), random_weights(16, H, INTER, seed=1), top_k=K, max_num_tokens=32, swiglu_limit=2.0, **SCALES,
        **MODES[mode],
    )  # fmt: skip
    if several:
        with_few_programs(moe)
    sizes = (1, 2, 10, 1, 32, 8, 1)
    calls = [on(target()[1], *inputs(tokens, H, K, 16, seed=i)) for i, tokens in enumerate(sizes)]
    outs = [poisoned(tokens, H, target()[1]) for tokens in sizes]
    moe.warmup()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, out in zip(calls, outs, strict=True):
            moe.run(*call, out=out)
    for replay in range(20):
        for i, (call, out) in enumerate(zip(calls, outs, strict=True)):
            for old, new in zip(call, inputs(len(out), H, K, 16, seed=100 * replay + i), strict=True):
                old.copy_(new)
            out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for call, out in zip(calls, outs, strict=True):
            want = moe.run(*call)
            torch.cuda.synchronize()
            assert torch.equal(out, want), replay


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (512, 4096)])
def test_the_pack_kernel_is_its_twin(n, k, gated):
    """Every byte of two experts stands where the torch twin puts it, and bytes around the matrix are left alone."""
    from dsv4.kernels.hopper.layout import pack_matrix
    from dsv4.kernels.hopper.packing import pack
    from dsv4.nvfp4 import unpack_nibbles

    generator = torch.Generator("cuda").manual_seed(0)
    codes = torch.randint(0, 256, (2, n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randint(0, 0x7F, (2, n, k // 16), dtype=torch.uint8, device="cuda", generator=generator)
    size = matrix_bytes(n, k)
    experts = torch.full((2, 256 + size + 16), 0xA5, dtype=torch.uint8, device="cuda")
    pack(codes, scales, experts, 256, gated)
    for e in range(2):
        assert torch.equal(experts[e, 256:-16], pack_matrix(unpack_nibbles(codes[e]), scales[e], gated))
    assert bool((experts[:, :256] == 0xA5).all())
    assert bool((experts[:, -16:] == 0xA5).all())


@LINES
def test_scattered_and_gathered_rows_are_an_image(line):
    """Through a call's own routing: every token stands in the image in the row of each of its slots, as plain torch
    puts it there, and its scale beside it, gathered by programs of different parts of K, too; what no slot fills is
    left alone."""
    from dsv4.kernels.hopper.layout import to_image
    from dsv4.kernels.hopper.stages import gather_rows, scatter_rows
    from dsv4.kernels.triton.routing import route
    from dsv4.kernels.triton.stages import ScaleSource
    from kernels.row_groups import expected, poisoned_buffers

    unit, most, experts, tokens, k = ROW_UNIT, line.tokens, 5, 3 * line.tokens + 5, 1152
    ids = torch.randint(-1, experts, (tokens, K), device="cuda")
    ids[::3] = 1  # a busy expert,
    ids[ids == 2] = 3  # and an idle one
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    tables = poisoned_buffers(tokens * K, experts, unit, most, "cuda")
    route(ids, experts, unit, tables)
    want = expected(ids.flatten().tolist(), experts, unit, most)
    row_slot = torch.tensor(want.row_slot, device="cuda")
    rows, served = row_slot.numel(), row_slot >= 0
    image = torch.full((tables.tiles.row_slot.numel() * k,), 7.0, dtype=torch.bfloat16, device="cuda")
    row_scale = torch.full((tables.tiles.row_slot.numel(),), 7.0, device="cuda")
    scatter_rows(x, image, row_scale, tables.groups, tables.local_ids, unit, K, source=ScaleSource.NONE)
    plain = torch.where(served[:, None], x[row_slot.clamp(min=0) // K], 7.0)
    images = [to_image(plain[g.start : g.stop], len(g)).flatten() for g in want.groups()]
    assert torch.equal(image[: rows * k], torch.cat(images))
    assert bool((image[rows * k :] == 7.0).all())
    assert bool((row_scale == 7.0).all())
    for blocks in (4, 8):
        gathered, of_token = torch.full_like(image, 7.0), torch.rand(tokens, device="cuda")
        row_scale.fill_(7.0)
        gather_rows(x, of_token, gathered, row_scale, tables.tiles, tables.groups, unit, K, blocks=blocks)
        assert torch.equal(gathered, image)
        assert torch.equal(row_scale[:rows], torch.where(served, of_token[row_slot.clamp(min=0) // K], 7.0))
    scale = torch.rand(experts, device="cuda")
    scatter_rows(x, image, row_scale, tables.groups, tables.local_ids, unit, K, source=ScaleSource.EXPERT, scale=scale)
    of_row = scale[ids.flatten()[row_slot.clamp(min=0)].clamp(min=0)]
    assert torch.equal(row_scale[:rows], torch.where(served, of_row, 7.0))
    assert bool((image[rows * k :] == 7.0).all())


@pytest.mark.parametrize("k", [256, 4096, 7168])
@pytest.mark.parametrize("source", ["NONE", "ROW", "GIVEN", "EXPERT"])
@pytest.mark.parametrize("slots", [1, 16, 17, 32, 48, FEW_SLOTS])
def test_few_slots_are_routed_and_scattered(slots, source, k):
    """In one launch the tables and the image that routing and scattering make one after the other, to the bit."""
    from dsv4.kernels.hopper.few_slots import route_and_scatter
    from dsv4.kernels.hopper.stages import scatter_rows
    from dsv4.kernels.triton.routing import route
    from dsv4.kernels.triton.stages import ScaleSource
    from kernels.row_groups import poisoned_buffers

    experts, most = 7, 2 * ROW_UNIT
    ids = torch.randint(-1, experts, (slots, 1), device="cuda")
    ids[slots // 2 :] = 1  # more than a group of one expert
    x = inputs(slots, k, 1, experts)[0].cuda()
    scale = torch.rand(experts, device="cuda") + 0.01
    made = []
    for together in (True, False):
        tables = poisoned_buffers(slots, experts, ROW_UNIT, most, "cuda")
        rows = tables.tiles.row_slot.numel()
        image = torch.full((rows * k,), 7.0, dtype=torch.bfloat16, device="cuda")
        row_scale = torch.full((rows,), 7.0, device="cuda")
        how: dict[str, Any] = {"source": ScaleSource[source], "scale": scale}
        if together:
            route_and_scatter(ids, x, tables, image, row_scale, experts, ROW_UNIT, **how)
        else:
            route(ids, experts, ROW_UNIT, tables)
            scatter_rows(x, image, row_scale, tables.groups, tables.local_ids, ROW_UNIT, 1, **how)
        groups = tables.groups
        used, tiles = groups.num_groups.item(), tables.tiles.num_tiles.item()
        made.append(
            (
                image, row_scale, tables.local_ids, tables.tiles.row_slot, tables.tiles.tile_expert, groups.slot_row,
                groups.tile_start[:tiles], groups.tile_rows[:tiles], groups.group_row[: used + 1],
                groups.group_expert[:used], groups.taken,
            )
        )  # fmt: skip
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [64, 128, 192, 512, 1024, 2048, 2112, 7168])
@pytest.mark.parametrize("source", ["ROW", "BATCH", "EXPERT"])
@LINES
def test_quantized_images_are_quantized_rows(line, source, k):
    """Tokens quantized on their way and images quantized in place are the numbers that stage_rows makes of rows
    (tests/kernels/test_stages_cuda.py compares those with plain torch); a maximum leaves rows with NaN or Inf out."""
    from dsv4.kernels.hopper.stages import image_amax, quantize_image, scatter_rows
    from dsv4.kernels.triton.routing import route
    from dsv4.kernels.triton.stages import ScaleSource, stage_rows
    from kernels.row_groups import poisoned_buffers

    unit, most, experts, tokens = ROW_UNIT, line.tokens, 5, 2 * line.tokens + 5
    ids = torch.randint(-1, experts, (tokens, 1), device="cuda")
    ids[3:5] = 1
    x = inputs(tokens, k, 1, experts)[0].cuda()
    x[3, 7], x[4, 0] = torch.nan, torch.inf
    tables = poisoned_buffers(tokens, experts, unit, most, "cuda")
    route(ids, experts, unit, tables)
    tiles, groups, local = tables.tiles, tables.groups, tables.local_ids
    rows = tiles.row_slot.numel()

    def scattered(values: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.full((rows * k,), 7.0, dtype=torch.bfloat16, device="cuda")
        row_scale = torch.full((rows,), 7.0, device="cuda")
        scatter_rows(values, image, row_scale, groups, local, unit, 1, **how)
        return image, row_scale

    image, _ = scattered(x, source=ScaleSource.NONE)
    amax = torch.zeros(1, device="cuda")
    image_amax(image, tiles, groups, unit, k, amax, of_batch=True)
    of_rows = x[local >= 0].abs().amax(1).float()
    assert amax.item() == of_rows[of_rows < torch.inf].amax().item()
    scale = {"ROW": None, "BATCH": amax, "EXPERT": torch.rand(experts, device="cuda") + 0.01}[source]
    staged, gs = torch.full_like(x, 7.0), torch.full((tokens,), 7.0, device="cuda")
    by_expert = local if source == "EXPERT" else None
    stage_rows(x, staged, gs, source=ScaleSource[source], scale=scale, local_ids=by_expert)
    want, _ = scattered(staged, source=ScaleSource.NONE)
    on_the_way, scales = scattered(x, source=ScaleSource[source], scale=scale)
    in_place = torch.full_like(scales, 7.0)
    quantize_image(image, in_place, tiles, groups, unit, k, ScaleSource[source], scale)
    for got in (on_the_way, image):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    of_row = torch.where(tiles.row_slot >= 0, gs[tiles.row_slot.clamp(min=0)], 7.0)
    assert torch.equal(scales, of_row)
    assert torch.equal(in_place, of_row)


@TILES
@pytest.mark.parametrize("weight", ["output", "before_down"])
@LINES
def test_results_quantized_on_the_way_are_quantized_results(line, weight, several):
    """GEMM 1 that quantizes its result gives, in every row that a slot fills, the bits that GEMM 1 and quantizing its
    image give, rows with NaN, Inf and zeros among them; and GEMM 2 makes the same of both, its scales by expert or by
    row."""
    from dsv4.kernels.hopper.launch import grouped_gemm
    from dsv4.kernels.hopper.layout import from_image
    from dsv4.kernels.hopper.stages import quantize_image, scatter_rows
    from dsv4.kernels.triton.routing import route
    from dsv4.kernels.triton.stages import ScaleSource
    from kernels.row_groups import expected, poisoned_buffers

    device = target()[1]
    tokens, experts = largest_call(TILINGS, line, 1)
    x, w, ids = (t.to(device) for t in inputs(tokens, H, 1, experts, seed=tokens))
    ids[ids == 2] = 3
    ids[::5] = 1
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0)):
        if row < tokens:
            x[-1 - row, row] = value
    x[tokens // 2] = 0
    settings: dict[str, Any] = {"route_weight": weight, "swiglu_limit": 2.0}
    moe = build(target(), random_weights(experts, H, INTER, seed=1), top_k=1, **SCALES, **settings)
    packed, offset = moe._packed, matrix_bytes(2 * INTER, H)
    tables = poisoned_buffers(tokens, experts, ROW_UNIT, line.tokens, "cuda")
    route(ids, experts, ROW_UNIT, tables)
    tiles, groups, rows = tables.tiles, tables.groups, tables.tiles.row_slot.numel()
    image, row_scale = torch.zeros(rows * H, dtype=torch.bfloat16, device=device), torch.ones(rows, device=device)
    scatter_rows(x, image, row_scale, groups, tables.local_ids, ROW_UNIT, 1, source=ScaleSource.ROW)
    scales = torch.linspace(0.03, 0.0005, experts, device=device)
    shared: dict[str, Any] = {"multiprocessors": 1 if several else 132, "topk_weights": w, "limit": 2.0}
    found = []
    for requantized in (True, False):
        config = MoEConfig(
            experts, H, INTER, top_k=1, activation_scale="static" if requantized else "token", **settings
        )
        gemm1 = _gemm1_config(config, line, quantize=True)
        assert gemm1.requantized == requantized
        gemm2 = replace(_gemm2_config(config, line), wide_out=True)
        act = torch.full((rows * INTER,), 7.0, dtype=torch.bfloat16, device=device)
        groups.taken.zero_()
        grouped_gemm(
            gemm1, image, row_scale, packed.experts, 0, packed.l1_gs, tiles, groups, act, rows=2 * INTER, k=H,
            result_gs=scales, **shared,
        )  # fmt: skip
        of_rows = None
        if not requantized:
            of_rows = torch.ones(rows, device=device)
            quantize_image(act, of_rows, tiles, groups, ROW_UNIT, INTER, ScaleSource.EXPERT, scales)
        out = torch.full((tokens, H), 7.0, device=device)
        grouped_gemm(
            gemm2, act, of_rows, packed.experts, offset, packed.l2_gs, tiles, groups, out, rows=H, k=INTER,
            expert_scale=scales if requantized else None, **shared,
        )  # fmt: skip
        found.append((act, out))
        assert (min(groups.taken.tolist()) > 0) == several
    want = expected(ids.flatten().tolist(), experts, ROW_UNIT, line.tokens)
    for group in want.groups():
        served = torch.tensor(want.row_slot[group.start : group.stop], device=device) >= 0
        got, unfused = (
            from_image(act[group.start * INTER : group.stop * INTER].view(1, INTER // 64, len(group), 64))[served]
            for act, _ in found
        )
        torch.testing.assert_close(got, unfused, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0, equal_nan=True)
    assert found[0][1].isnan().any() or tokens < 4
    assert found[0][1].isfinite().any()


def test_weights_are_those_that_were_packed():
    """Unpacking gives back every code and scale, of an odd number of blocks too."""
    weights: OracleWeights = random_weights(3, 640, 384, seed=1, split_gate_up=True)
    moe = build(target(), weights, top_k=K, **SCALES)
    unpacked = moe._backend.unpack(moe._packed)
    for name, want in vars(weights).items():
        assert torch.equal(getattr(unpacked, name).cpu().view(torch.uint8), want.view(torch.uint8)), name
