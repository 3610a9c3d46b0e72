"""Every line of the Hopper backend's table on a GPU: numbers, graphs, packing; a few calls for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layer_cases import BAR, MODES, build, inputs, largest_call, on, poisoned
from oracle import OracleWeights, nearest_reference, random_weights, relative_l2

from dsv4.backends import proof
from dsv4.backends.base import Verdict
from dsv4.backends.hopper import TILINGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

H, INTER, K = 384, 256, 2  # K blocks of GEMM 1 in ones, of GEMM 2 in twos
SCALES: dict[str, Any] = {"l1_input_scale": 0.002, "l2_input_scale": 0.01}
EVERY_MODE: dict[str, dict[str, Any]] = MODES | {
    "w4a4-calibrated": {"activation_format": "nvfp4", "activation_scale": "calibrated"},
    "w4a4-per-expert": MODES["w4a4-static"] | {"l1_scale_policy": "per_expert"},
}
LINES = pytest.mark.parametrize("line", TILINGS, ids=lambda line: f"up-to-{line.rows_per_expert:g}")


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


@LINES
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_line_matches_the_oracle(line, mode):
    """The largest call of each line, with dropped ids, a skewed expert and an idle one, is within the bar."""
    tokens, experts = largest_call(TILINGS, line, K)
    weights, scales = random_weights(experts, H, INTER, seed=1, split_gate_up=True), input_scales(mode, experts)
    x, w, ids = inputs(tokens, H, K, experts, seed=tokens)
    ids[ids == 3] = 5
    ids[1::7, 0] = -1
    settings = EVERY_MODE[mode] | {"swiglu_limit": 2.0}
    moe = build(target(), weights, top_k=K, max_num_tokens=max(tokens, 16), **scales, **settings)
    args = on(target()[1], x, w, ids)
    if mode == "w4a4-calibrated":
        l1, l2 = moe.compute_activation_global_scales(*args)
        scales = {"l1_input_scale": l1, "l2_input_scale": l2}
        settings |= {"activation_scale": "static"}
    out = poisoned(tokens, H, target()[1])
    moe.run(*args, out=out)
    want = nearest_reference(out.cpu(), x, w, ids, weights, **scales, **({"activation_scale": "static"} | settings))
    assert relative_l2(out.cpu(), want) <= BAR


@LINES
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
def test_every_line_replays_and_keeps_a_tokens_bits(line, mode):
    """A graph of each line's largest call gives eager's bits for fresh routings; each token of it those that it has
    alone, with ``batch_invariant``."""
    tokens, experts = largest_call(TILINGS, line, K)
    moe = build(
        target(), random_weights(experts, H, INTER, seed=1), top_k=K, max_num_tokens=tokens, batch_invariant=True,
        route_weight="before_down", **SCALES, **MODES[mode],
    )  # fmt: skip
    args = on(target()[1], *inputs(tokens, H, K, experts))
    out = poisoned(tokens, H, target()[1], torch.float32)
    moe.warmup((1, tokens))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moe.run(*args, out=out)
    for seed in (1, 2, 3):
        for old, new in zip(args, inputs(tokens, H, K, experts, seed=seed), strict=True):
            old.copy_(new)
        if seed == 2:
            args[2].fill_(experts - 1)
        if seed == 3:
            args[2][::2] = -1
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, moe.run(*args, out_dtype=torch.float32)), seed
    for t in {0, tokens // 2, tokens - 1}:
        alone = moe.run(*(a[t : t + 1] for a in args), out_dtype=torch.float32)
        assert torch.equal(alone[0], out[t])


@pytest.fixture
def no_self_check(monkeypatch) -> Iterator[None]:
    """It would be most of what a tool that follows every access has to follow."""
    monkeypatch.setattr(proof, "known", lambda backend, device: Verdict(True, "not asked here"))
    proof.prove.cache_clear()
    yield
    proof.prove.cache_clear()


@pytest.mark.usefixtures("no_self_check")
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-token"])
@LINES
def test_sanitize(line, mode):
    """One call of every line and format, a small one, writes all of its result: for compute-sanitizer."""
    top_k = 1
    tokens, experts = largest_call(TILINGS, line, top_k)
    weights = random_weights(experts, 256, 128, seed=1)
    moe = build(target(), weights, top_k=top_k, max_num_tokens=tokens, swiglu_limit=2.0, **MODES[mode])
    out = poisoned(tokens, 256, target()[1])
    moe.run(*on(target()[1], *inputs(tokens, 256, top_k, experts)), out=out)
    assert out.isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (512, 4096)])
def test_the_pack_kernel_is_its_twin(n, k, gated):
    """Every byte of two experts stands where the torch twin puts it, and bytes around the matrix are left alone."""
    from dsv4.kernels.hopper.layout import matrix_bytes, pack_matrix
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


@pytest.mark.parametrize("tile", sorted({line.gemm1[0] for line in TILINGS}))
def test_images_hold_the_rows_of_the_tile_map(tile):
    """The gathered image is the torch twin's of the rows that the tile map names; padding rows are zero."""
    from dsv4.kernels.hopper.layout import to_image
    from dsv4.kernels.hopper.stages import gather_image
    from dsv4.kernels.triton.grouped_gemm import TileMap
    from dsv4.ops.routing import route

    tokens, k = 37, 256
    local = torch.randint(-1, 4, (tokens * K,), device="cuda")
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    tables = route(local, 4, tile)
    used = int((tables.tile_expert >= 0).sum())
    num_tiles = torch.tensor([used], dtype=torch.int32, device="cuda")
    row_slot = tables.row_slot.int()
    image = torch.full((row_slot.numel() * k,), torch.nan, dtype=torch.bfloat16, device="cuda")
    scale, row_scale = torch.rand(tokens, device="cuda"), torch.full((row_slot.numel(),), torch.nan, device="cuda")
    gather_image(x, scale, image, row_scale, TileMap(row_slot, tables.tile_expert.int(), num_tiles), tile, K)
    slots = row_slot[: used * tile].long()
    token = slots.clamp(min=0) // K
    rows = torch.where((slots >= 0)[:, None], x[token], 0)
    assert torch.equal(image[: used * tile * k], to_image(rows, tile).flatten())
    assert torch.equal(row_scale[: used * tile][slots >= 0], scale[token][slots >= 0])
    assert bool(image[used * tile * k :].isnan().all())


def test_weights_are_those_that_were_packed():
    """Unpacking gives back every code and scale, of an odd number of blocks too."""
    weights: OracleWeights = random_weights(3, 640, 384, seed=1, split_gate_up=True)
    moe = build(target(), weights, top_k=K, **SCALES)
    unpacked = moe._backend.unpack(moe._packed)
    for name, want in vars(weights).items():
        assert torch.equal(getattr(unpacked, name).cpu().view(torch.uint8), want.view(torch.uint8)), name
