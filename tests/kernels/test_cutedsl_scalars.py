"""Functions that the CuTe DSL kernels of every chip share, run on the host against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass")

from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS
from dsv4.nvfp4 import block_codes, decode_e2m1, quantize_blocks
from dsv4.ops.layouts import Swizzle32x4x4
from kernels import cute_scalars
from kernels.hard_blocks import all_ones, below_powers, blocks, ties

COUNTS = {
    "ragged": [1, 0, 130, 128, 7, 0, 300],
    "one": [0, 515],
    "single": [1],
    "empty": [0, 0, 0],
    "V4-Pro": [(e * 37) % 411 for e in range(384)],
    "most experts": [e % 3 * 128 for e in range(MAX_EXPERTS)],
}


@pytest.mark.parametrize("height", [128, 256])
@pytest.mark.parametrize("name", COUNTS)
def test_schedule(name, height):
    """Tables equal torch's prefix sums, and the numbers below the total name each tile of each expert exactly once:
    row tiles fastest, then columns, then experts."""
    counts = torch.tensor(COUNTS[name])
    ends = counts.cumsum(0)
    table = cute_scalars.table_of(ends.int(), height)
    tiles, scales = -(-counts // height), -(-counts // 128)
    for column, want in enumerate((counts, tiles, scales)):
        before = torch.cat([torch.zeros(1, dtype=torch.int64), want.cumsum(0)])
        assert table[: len(counts) + 1, column].tolist() == before.tolist()
        assert (table[len(counts) :, column] == before[-1]).all()  # behind the last expert: totals
    for column_tiles in (1, 3):
        want = [
            [expert, row, column]
            for expert, rows in enumerate(tiles.tolist())
            for column in range(column_tiles)
            for row in range(rows)
        ]
        assert cute_scalars.located(table, column_tiles).tolist() == want


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (384, 20)])
def test_scale_offsets(rows, columns):
    """Every place equals that of :class:`Swizzle32x4x4`."""
    swizzle = Swizzle32x4x4(rows, columns)
    want = [[swizzle.offset(row, column) for column in range(columns)] for row in range(rows)]
    assert cute_scalars.scale_offsets(rows, columns).tolist() == want


@pytest.mark.parametrize("data", [blocks, below_powers])
def test_requantization_gives_the_twin_s_bytes(data):
    """Codes and scale bytes of the epilogue's arithmetic equal :func:`quantize_blocks`', bit for bit."""
    x, gs = data()
    codes, scales = cute_scalars.requantize(x, gs)
    want_codes, want_scales = quantize_blocks(x, gs.unsqueeze(1))
    want_scales = want_scales.view(torch.uint8).flatten()
    assert torch.equal(scales, want_scales)
    assert torch.equal(codes, want_codes)
    if data is blocks:
        assert {0, 0x7E, 0x7F} < set(want_scales.tolist())


@pytest.mark.parametrize("data", [blocks, ties, below_powers, all_ones])
def test_quantizing_in_pairs_gives_the_twin_s_values(data):
    """``e2m1 * sf`` of values whose block's maximum is put together from pairs equals :func:`block_codes`' decoded:
    blocks that saturate, vanish, lie on ties or just below a power of two, steps of ones alone; NaN where one holds a
    NaN or Inf; zeros keep their signs."""
    x, gs = data()
    x = x.bfloat16()
    codes, sf = block_codes(x, gs.unsqueeze(1))
    want = (decode_e2m1(codes) * sf.float().unsqueeze(-1)).flatten(1)
    if data is below_powers:
        quotients = x[:, 5] / (sf.flatten().float() * gs)
        assert {2 - 2.0**-23, 2 - 3 * 2.0**-23, 4 - 2.0**-22, 4 - 3 * 2.0**-22} <= set(quotients.tolist())
    got = cute_scalars.quantized_pairs(x, gs).float()
    same = (got == want) | (got.isnan() & want.isnan())
    assert bool(same.all()), (same.logical_not().nonzero(), x[~same], got[~same], want[~same])
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(x)[~got.isnan()])


@pytest.mark.parametrize("limit", [None, 0.5, 7.0])
def test_swiglu(limit):
    """Within fp32's rounding of float64: no lower bound for the gate, both for up, NaN through either, Inf as IEEE."""
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(4096, generator=generator) * torch.logspace(-3, 2, 4096) for _ in range(2))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -60.0, 200.0])
    pairs = torch.cartesian_prod(special, torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -3.0]))
    gate, up = torch.cat([gate, pairs[:, 0]]), torch.cat([up, pairs[:, 1]])
    got = cute_scalars.swiglu(gate, up, limit).double()
    wide_gate, wide_up = gate.double(), up.double()
    if limit is not None:
        wide_gate, wide_up = wide_gate.clamp(max=limit), wide_up.clamp(-limit, limit)
    want = wide_gate * torch.sigmoid(wide_gate) * wide_up
    ordinary = (gate.abs() < 80) & up.isfinite()
    # Up to gate = -80 the exponent's argument is off by 2^-24 of 115.
    assert ((got - want).abs()[ordinary] <= 2e-5 * want.abs()[ordinary] + 1e-40).all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
