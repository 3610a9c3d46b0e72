"""Where the Blackwell kernel puts things, against CuTe's own layouts for tcgen05 and against plain torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass")

from dsv4.kernels.blackwell.config import MMA_K, TMEM_COLUMNS, deepest
from dsv4.ops.layouts import Swizzle32x4x4
from kernels import cute_blackwell

TILES = [(128, 64, 64), (128, 192, 128), (256, 128, 256), (256, 256, 256)]


@pytest.mark.parametrize("operand", [0, 1], ids="AB")
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_codes_lie_as_the_tensor_core_reads_them(tile, operand):
    """A TMA box of rows by bytes is the K-major operand of tcgen05, under the same swizzle, in every stage."""
    config = deepest(*tile)
    ours, theirs, (our_swizzle, their_swizzle) = cute_blackwell.code_places(config, operand)
    assert torch.equal(2 * ours, theirs)
    assert len(ours.unique()) == len(ours)
    assert our_swizzle == their_swizzle


@pytest.mark.parametrize("operand", [0, 1], ids="AB")
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_scales_lie_as_the_tensor_core_reads_them(tile, operand):
    """A TMA box of 512-byte tiles is one run, and in it tcgen05 finds each scale where the 32x4x4 swizzle has it."""
    config = deepest(*tile)
    ours, theirs = cute_blackwell.scale_places(config, operand)
    assert torch.equal(ours, torch.arange(len(ours), dtype=torch.int32))
    swizzle = Swizzle32x4x4(theirs.shape[2], theirs.shape[1])
    want = torch.tensor([[swizzle.offset(r, b) for r in range(swizzle.rows)] for b in range(swizzle.cols)])
    for stage in range(config.stages):
        assert torch.equal(theirs[stage].long(), want + stage * swizzle.numel)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tensor_memory_holds_what_it_is_given(tile):
    """Columns of scales and accumulators are as many as CuTe's layouts have, they do not overlap but where they are
    meant to, and an accumulator's row is a lane (address bits 16 and up) and its column a column."""
    config = deepest(*tile)
    (sfa, sfb, acc, k), addresses = cute_blackwell.tensor_memory(config)
    assert (sfa, sfa + sfb, acc, k) == (config.a_scale_columns, config.scale_columns, config.n, MMA_K)
    assert config.scale_base + config.scale_columns <= TMEM_COLUMNS
    assert config.accumulator_stride + config.n <= config.scale_base
    row, column = torch.arange(128).unsqueeze(1), torch.arange(config.n)
    assert torch.equal(addresses.long(), (row << 16) + column)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_shared_columns_are_released_first(tile):
    """Subtiles read before the next product may begin cover every column that it overwrites of this one; with two
    accumulators apart, all are read."""
    config = deepest(*tile)
    first, second = set(range(config.n)), set(range(config.accumulator_stride, config.accumulator_stride + config.n))
    read = 32 * config.release_after
    if config.overlapped:
        assert first & second <= set(range(config.n - read, config.n))  # of the first: from its end
        assert first & second <= {config.accumulator_stride + c for c in range(read)}  # of the second: from its start
    else:
        assert not first & second
        assert read == config.n
