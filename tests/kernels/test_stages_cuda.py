"""Triton stages against their torch twins, on a GPU: tables and quantized bits equal, sums within fp32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsv4.nvfp4 import block_codes, decode_e2m1, finite_row_amax, global_scale
from dsv4.ops.routing import local_expert_ids
from dsv4.ops.routing import route as route_twin
from kernels.triton_blocks import DATA, TERMS, check_quantized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from dsv4.kernels.triton import packing, stages
    from dsv4.kernels.triton.routing import route
    from dsv4.kernels.triton.stages import ScaleSource
    from dsv4.kernels.triton.weight_layout import Matrix
    from kernels.row_groups import assert_filled, expected, poisoned_buffers

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("experts", [1, 7, 32, 256, 384])
@pytest.mark.parametrize(
    ("tokens", "top_k"),
    # 170 and 171, 2730 and 2731: either side of where the launches change.
    [(1, 1), (1, 6), (11, 6), (64, 6), (170, 6), (171, 6), (333, 5), (2730, 6), (2731, 6), (8192, 6)],
)
def test_routing_tables(tokens, top_k, experts, tile):
    """Every entry of every table equals the torch twin's: uniform, skewed, dropped, masked and empty routing."""
    generator = torch.Generator(DEVICE).manual_seed(tokens + experts)
    uniform = torch.randint(-2, experts + 3, (tokens, top_k), device=DEVICE, generator=generator)
    mapping = torch.randperm(experts + 2, device=DEVICE, generator=generator).to(torch.int32)
    mapping[mapping >= experts] = -1
    cases = [
        (uniform, 0, None, None),
        (uniform.to(torch.int32), 1, None, torch.tensor([tokens // 2], dtype=torch.int32, device=DEVICE)),
        (uniform, 0, mapping, None),
        (torch.full_like(uniform, experts - 1), 0, None, None),
        (torch.full_like(uniform, -1), 0, None, None),
        # Every expert one row more than a whole tile, as far as the slots go: the capacity bound's worst case.
        ((torch.arange(tokens * top_k, device=DEVICE) // (tile + 1) % experts).view(tokens, top_k), 0, None, None),
    ]
    for ids, start, expert_map, valid in cases:
        got = poisoned_buffers(ids.numel(), experts, tile, device=DEVICE)
        route(ids, experts, tile, got, start=start, expert_map=expert_map, num_valid_tokens=valid)
        local = local_expert_ids(ids, experts, start, expert_map, valid)
        want = route_twin(local, experts, tile)
        assert torch.equal(got.local_ids, local.flatten())
        assert torch.equal(got.tiles.row_slot, want.row_slot)
        assert torch.equal(got.tiles.tile_expert, want.tile_expert)
        assert got.tiles.num_tiles.item() == (want.tile_expert >= 0).sum().item()
        assert got.amax.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("unit", "most"), [(8, 8), (8, 32), (16, 128)])
@pytest.mark.parametrize("experts", [7, 256, 384])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (11, 6), (171, 6), (2048, 6)])
def test_row_groups(tokens, top_k, experts, unit, most):
    """Every entry that is read equals a loop's: uniform, skewed, dropped, and as many groups as there can be."""
    slots = tokens * top_k
    generator = torch.Generator(DEVICE).manual_seed(tokens + experts)
    uniform = torch.randint(-1, experts, (tokens, top_k), device=DEVICE, generator=generator)
    cases = (
        uniform,
        uniform.where(uniform % 3 > 0, experts - 1),
        torch.full_like(uniform, -1),
        (torch.arange(slots, device=DEVICE) // (most + 1) % experts).view(tokens, top_k),
    )
    for ids in cases:
        got = poisoned_buffers(slots, experts, unit, most, DEVICE)
        want = expected(ids.flatten().tolist(), experts, unit, most)
        route(ids, experts, unit, got)
        assert_filled(got.groups, want)
        assert got.tiles.row_slot[: len(want.row_slot)].tolist() == want.row_slot


def staged_twin(x: torch.Tensor, gs: torch.Tensor) -> torch.Tensor:
    codes, sf = block_codes(x, gs.reshape(-1, 1))
    return (decode_e2m1(codes) * sf.float().unsqueeze(2)).flatten(1).bfloat16()


def hard_rows(rows: int, k: int, seed: int) -> torch.Tensor:
    """bf16 rows of very different size, with zeros, subnormals, ties, NaN and Inf among them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(rows, k, device=DEVICE, generator=generator)
    x *= torch.exp2(torch.randint(-60, 60, (rows, 1), device=DEVICE, generator=generator).float())
    x[1::7] = torch.randint(-12, 13, x[1::7].shape, device=DEVICE, generator=generator) * 0.25  # many ties
    x = x.bfloat16()
    x[2::9] = 0
    if rows > 8:
        x[5, 3], x[6, 0], x[7, k - 1] = torch.nan, torch.inf, -torch.inf
        x[8, :16] = 1e-38
    return x


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("data", DATA)
def test_quantized_blocks_are_the_twins_values(data, terms):
    """Blocks that saturate, vanish, lie on ties or an ulp below a power of two, steps of ones alone: ``e2m1 * sf`` is
    the torch twin's, signs included, by both ways to a block's scale."""
    check_quantized(data, terms, DEVICE)


@pytest.mark.parametrize("k", [16, 48, 256, 2048, 7168])
@pytest.mark.parametrize("source", ["ROW", "GIVEN", "EXPERT", "BATCH"])
def test_quantized_rows_are_the_twins_bits(source, k):
    """Staged values (and so codes and scales) equal the torch twin's bit for bit, NaN rows included."""
    for seed, rows in ((0, 1), (1, 64), (2, 1000)):
        x = hard_rows(rows, k, seed)
        local = torch.arange(rows, device=DEVICE, dtype=torch.int32) % 5 - 1
        out, gs = torch.full_like(x, 7.0), torch.full((rows,), torch.nan, device=DEVICE)
        scale, served = torch.rand(4, device=DEVICE) + 1e-3, torch.ones(rows, dtype=torch.bool, device=DEVICE)
        if source == "ROW":
            want_gs, given = global_scale(finite_row_amax(x)), None
        elif source == "GIVEN":
            want_gs, given = scale[:1].expand(rows), scale[:1]
        elif source == "EXPERT":
            want_gs, given, served = scale[local.clamp(min=0).long()], scale, local >= 0
        else:
            given = torch.zeros(1, device=DEVICE)
            stages.batch_amax(x, local, given, 1)
            amax = torch.where(local >= 0, finite_row_amax(x), 0.0).amax()
            assert given.item() == amax.item()
            want_gs = global_scale(amax).expand(rows)
        by_slot = source == "EXPERT"
        stages.stage_rows(x, out, gs, source=ScaleSource[source], scale=given, local_ids=local if by_slot else None)
        want = staged_twin(x, want_gs)
        assert torch.equal(gs[served], want_gs[served])
        same = (out == want) | (out.isnan() & want.isnan())
        assert bool(same[served].all()), (
            x[served][~same[served]],
            out[served][~same[served]],
            want[served][~same[served]],
        )
        assert bool((out[~served] == 7.0).all())
        again = x.clone()
        stages.stage_rows(
            again, again, gs, source=ScaleSource[source], scale=given, local_ids=local if by_slot else None
        )
        assert torch.equal(again[served].view(torch.int16), out[served].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "h"), [(1, 80), (6, 80), (6, 4096), (8, 7168)])
def test_combine(top_k, h, dtype):
    """fp32 sums in slot order; dropped slots add nothing, though their rows hold NaN and their weights Inf."""
    tokens = 37
    rows = torch.randn(tokens * top_k, h, device=DEVICE).to(dtype)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    local = torch.randint(-1, 4, (tokens * top_k,), device=DEVICE, dtype=torch.int32)
    dropped = local < 0
    want = (
        (rows.double() * weights.double().reshape(-1, 1)).masked_fill(dropped[:, None], 0).view(tokens, top_k, h).sum(1)
    )
    rows[dropped] = torch.nan
    weights.view(-1)[dropped] = torch.inf
    out = torch.full((tokens, h), torch.nan, device=DEVICE)
    stages.combine(rows, local, weights, out, top_k)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 16), (96, 80), (64, 128), (256, 4096)])
def test_packing_is_a_bijection(n, k, interleaved):
    """Unpacking gives back every byte; one expert's bytes stand in its own row alone."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    codes = torch.randint(0, 256, (3, n, k // 2), dtype=torch.uint8, device=DEVICE, generator=generator)
    scales = torch.randint(0, 0x7F, (3, n, k // 16), dtype=torch.uint8, device=DEVICE, generator=generator)
    matrix = Matrix(n, k, 256, interleaved)
    experts = torch.full((3, matrix.end + 16), 0xA5, dtype=torch.uint8, device=DEVICE)
    packing.pack(codes, scales, matrix, experts)
    got_codes, got_scales = packing.unpack(experts, matrix)
    assert torch.equal(got_codes, codes)
    assert torch.equal(got_scales.view(torch.uint8), scales)
    assert bool((experts[:, :256] == 0xA5).all())
    assert bool((experts[:, matrix.end :] == 0xA5).all())
