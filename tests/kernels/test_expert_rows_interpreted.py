"""Rows in the order of their experts as NVFP4 operands: Triton kernels on a CPU, interpreted, against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsv4.config import capacity
from dsv4.kernels.triton.expert_rows import expert_tables, gather_rows, quantize_rows
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.stages import ScaleSource
from dsv4.nvfp4 import finite_row_amax, global_scale, quantize_blocks
from dsv4.ops.layouts import Swizzle32x4x4
from dsv4.ops.routing import route
from kernels.interpreter import mend, run

POISON = 0x5A


def test_rows():
    """Every entry that a product reads equals plain torch's, bit for bit; behind the last row nothing is written."""
    run(__file__)


def routed(tokens: int, top_k: int, experts: int) -> tuple[TileMap, torch.Tensor, torch.Tensor, int]:
    """Tables of tiles of one row, the experts' ends, the row of each row's scales, and how many rows there are."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator).int()
    ids[: tokens // 3] = experts // 2  # more than a tile for one
    routing = route(ids, experts, 1)
    used = int(routing.counts.sum())
    tiles = TileMap(routing.row_slot, routing.tile_expert, torch.tensor([used], dtype=torch.int32))
    padded = -(-routing.counts // 128) * 128
    expert = routing.tile_expert[:used].long()
    starts = routing.counts.cumsum(0) - routing.counts
    place = (padded.cumsum(0) - padded)[expert] + torch.arange(used) - starts[expert]
    return tiles, routing.counts.cumsum(0).int(), place.int(), used


def check_tables() -> None:
    for tokens, top_k, experts in ((1, 1, 1), (5, 2, 7), (700, 3, 12), (3, 6, 384)):
        tiles, ends, place, used = routed(tokens, top_k, experts)
        got = torch.full((experts,), -1, dtype=torch.int32)
        ones, scale_row = torch.zeros(experts), torch.full((tokens * top_k,), -1, dtype=torch.int32)
        expert_tables(tiles, got, ones, scale_row)
        assert torch.equal(got, ends)
        assert (ones == 1).all()
        assert torch.equal(scale_row[:used], place)
        assert (scale_row[used:] == -1).all()


def some_rows(count: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    x = (torch.randn(count, k, generator=generator) * torch.logspace(-3, 3, count).unsqueeze(1)).bfloat16()
    x[1 % count, 3], x[2 % count] = torch.nan, 0
    return x


def swizzled_rows(flat: torch.Tensor, k: int, place: torch.Tensor) -> torch.Tensor:
    """Scales of some rows, padding columns with them."""
    columns = -(-k // 64) * 4
    rows = flat.numel() // columns
    return Swizzle32x4x4(rows, columns).unswizzle(flat)[place.long()]


def check_quantize() -> None:
    tokens, top_k, experts = 12, 3, 5
    tiles, ends, place, used = routed(tokens, top_k, experts)
    slots = tokens * top_k
    scale_row = torch.full((slots,), -1, dtype=torch.int32)
    expert_tables(tiles, torch.empty_like(ends), torch.empty(experts), scale_row)
    per_expert = torch.rand(experts) * 0.1 + 0.01
    weights = torch.rand(tokens)
    for k in (32, 160):
        x = some_rows(tokens, k)
        weighted = (x.float() * weights.unsqueeze(1)).bfloat16()
        for source, scale, want_gs in (
            (ScaleSource.ROW, None, global_scale(finite_row_amax(weighted))),
            (ScaleSource.GIVEN, torch.tensor([0.03]), torch.full((tokens,), 0.03)),
            (ScaleSource.BATCH, torch.tensor([5.0]), global_scale(torch.full((tokens,), 5.0))),
        ):
            codes, sf = torch.zeros(tokens, k // 2, dtype=torch.uint8), torch.zeros(tokens, k // 16, dtype=torch.uint8)
            gs = torch.zeros(tokens)
            quantize_rows(x, codes, sf, gs, source, scale, weights=weights)
            want_codes, want_sf = quantize_blocks(weighted, want_gs.unsqueeze(1))
            assert torch.equal(gs, want_gs)
            assert torch.equal(codes, want_codes)
            assert torch.equal(sf, want_sf.view(torch.uint8))
        # By rows: of tokens, each expert with its own scale, and of rows.
        token = tiles.row_slot[:used].long() // top_k
        expert_gs = per_expert[tiles.tile_expert[:used].long()]
        rows = some_rows(slots, k)
        for values, source, scale, of_token, want_x, want_gs in (
            (x, ScaleSource.EXPERT, per_expert, top_k, x[token], expert_gs),
            (rows, ScaleSource.ROW, None, None, rows[:used], global_scale(finite_row_amax(rows[:used]))),
        ):
            codes = torch.full((slots, k // 2), POISON, dtype=torch.uint8)
            sf = torch.full((capacity(slots, experts, 128) * -(-k // 64) * 4,), POISON, dtype=torch.uint8)
            gs = torch.full((slots,), torch.nan)
            quantize_rows(
                values, codes, sf, gs, source, scale, rows=tiles, scale_row=scale_row, slots_per_token=of_token
            )
            want_codes, want_sf = quantize_blocks(want_x, want_gs.unsqueeze(1))
            assert torch.equal(gs[:used], want_gs)
            assert torch.equal(codes[:used], want_codes)
            assert (codes[used:] == POISON).all()
            got_sf = swizzled_rows(sf, k, place)
            assert torch.equal(got_sf[:, : k // 16], want_sf.view(torch.uint8))
            assert (got_sf[:, k // 16 :] == 0).all()
            assert (sf == POISON).sum() >= sf.numel() - used * (-(-k // 64) * 4)


def check_gather() -> None:
    tokens, top_k, experts, k = 45, 3, 5, 160
    tiles, ends, place, used = routed(tokens, top_k, experts)
    slots = tokens * top_k
    scale_row = torch.full((slots,), -1, dtype=torch.int32)
    expert_tables(tiles, torch.empty_like(ends), torch.empty(experts), scale_row)
    codes = torch.randint(0, 256, (tokens, k // 2), dtype=torch.uint8)
    sf = torch.randint(0, 127, (tokens, k // 16), dtype=torch.uint8)
    gs = torch.rand(tokens)
    out = torch.full((slots, k // 2), POISON, dtype=torch.uint8)
    out_sf = torch.full((capacity(slots, experts, 128) * 12,), POISON, dtype=torch.uint8)
    out_gs = torch.full((slots,), -1.0)
    gather_rows(codes, sf, gs, tiles, scale_row, (out, out_sf, out_gs), top_k)
    token = tiles.row_slot[:used].long() // top_k
    assert torch.equal(out[:used], codes[token])
    assert (out[used:] == POISON).all()
    assert torch.equal(out_gs[:used], gs[token])
    got = swizzled_rows(out_sf, k, place)
    assert torch.equal(got[:, :10], sf[token])
    assert (got[:, 10:] == 0).all()


if __name__ == "__main__":
    mend()
    check_tables()
    check_quantize()
    check_gather()
