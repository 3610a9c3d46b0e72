"""The routing kernels' logic on a CPU, by Triton's interpreter, against the torch twin; the bound on their scratch."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from dsv4.config import capacity
from dsv4.kernels.triton.routing import RoutingConfig, histogram_size, num_bins, route
from dsv4.ops.routing import local_expert_ids
from dsv4.ops.routing import route as route_twin
from kernels.interpreter import mend, run
from kernels.row_groups import POISON, assert_filled, expected, poisoned_buffers


@pytest.mark.parametrize("experts", [7, 256, 384])
def test_scratch_holds_the_histograms_of_every_smaller_call(experts):
    """A buffer sized for the largest call fits any call below it, whichever way that one is cut up."""
    bins = num_bins(experts)
    used = [0]
    for slots in range(1, 60_000):
        config = RoutingConfig.of(slots, bins)
        used.append(triton.cdiv(slots, config.chunk) * bins if config.count_first else 0)
    largest = 0
    for slots in range(1, 60_000):
        largest = max(largest, used[slots])
        assert histogram_size(slots, experts) >= largest


def test_routing_tables():
    """Every entry of every table equals the torch twin's, one launch and two, with nothing cleared beforehand."""
    run(__file__, "tables")


def test_row_groups():
    """Row groups, for any counts, equal a loop's: see :func:`compare_groups`."""
    run(__file__, "groups")


@st.composite
def grouped_routings(draw: st.DrawFn) -> tuple[list[int], int, int, int, bool]:
    """Local ids with any counts, of an idle and a busy expert too, dropped ones among them; and a way to cut them."""
    unit, most_tiles = draw(st.sampled_from([8, 16])), draw(st.integers(1, 8))
    most = unit * most_tiles
    near = [max(0, tiles * unit + d) for tiles in (0, 1, most_tiles, most_tiles + 1) for d in (-1, 0, 1)]
    of_expert = st.one_of(st.sampled_from(near), st.integers(0, 2 * most + 1))
    counts = draw(st.lists(of_expert, min_size=1, max_size=5))
    local = [expert for expert, number in enumerate(counts) for _ in range(number)]
    local += [-1] * draw(st.integers(0 if local else 1, 5))
    draw(st.randoms(use_true_random=False)).shuffle(local)
    return local, len(counts), unit, most, draw(st.booleans())


@settings(deadline=None, derandomize=True, database=None, max_examples=25)
@given(grouped_routings())
@example(([-1] * 7, 3, 8, 24, False))
@example(([-1] * 7, 3, 16, 64, True))
@example(([e for e in range(5) for _ in range(17)], 5, 8, 16, False))  # the bound on groups, reached
@example(([e for e in range(5) for _ in range(33)], 5, 16, 32, True))
def compare_groups(case: tuple[list[int], int, int, int, bool]) -> None:
    """Every entry that is read is the loop's, whether experts are counted first or not; groups are no more than the
    bound on them, none is longer than the most rows, and those of an expert are equally long, but the last."""
    local, experts, unit, most, count_first = case
    got = poisoned_buffers(len(local), experts, unit, most)
    config = RoutingConfig(16, 4 if count_first else 64, count_first)
    if count_first:
        chunks = triton.cdiv(len(local), config.chunk)
        got = replace(got, hist=torch.full((chunks * num_bins(experts),), POISON, dtype=torch.int32))
    route(torch.tensor(local)[:, None], experts, unit, got, config=config)
    groups, want = got.groups, expected(local, experts, unit, most)
    assert_filled(groups, want)
    assert got.tiles.row_slot.tolist() == want.row_slot + [-1] * (got.tiles.row_slot.numel() - len(want.row_slot))
    assert got.tiles.tile_expert[: len(want.tile_expert)].tolist() == want.tile_expert
    assert len(want.group_expert) <= groups.group_expert.numel()
    assert bool((groups.group_row[len(want.group_row) :] == POISON).all())
    of_expert: dict[int, list[int]] = {}
    for expert, rows in zip(want.group_expert, want.groups(), strict=True):
        of_expert.setdefault(expert, []).append(len(rows))
    for sizes in of_expert.values():
        assert set(sizes[:-1]) <= {sizes[0]}
        assert 0 < sizes[-1] <= sizes[0] <= most


def test_the_bound_on_groups_is_reached():
    """One row more than whole groups, for every expert: the buffer of groups is exactly full."""
    for experts, unit, most in ((5, 8, 16), (3, 16, 128)):
        local = [expert for expert in range(experts) for _ in range(most + 1)]
        assert len(expected(local, experts, unit, most).group_expert) == capacity(len(local), experts, most) // most


def compare(tokens: int, top_k: int, experts: int, tile: int) -> None:
    slots = tokens * top_k
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
    mapping = torch.randperm(experts + 2, generator=generator).to(torch.int32)
    mapping[mapping >= experts] = -1
    for start, expert_map, valid in (
        (1, None, torch.tensor([tokens // 2 + 1], dtype=torch.int32)),
        (0, mapping, None),
    ):
        got = poisoned_buffers(slots, experts, tile)
        tiles = got.tiles
        route(ids, experts, tile, got, start=start, expert_map=expert_map, num_valid_tokens=valid)
        local = local_expert_ids(ids, experts, start, expert_map, valid)
        want = route_twin(local, experts, tile)
        assert torch.equal(got.local_ids, local.flatten())
        assert torch.equal(tiles.row_slot, want.row_slot)
        assert torch.equal(tiles.tile_expert, want.tile_expert)
        assert tiles.num_tiles.item() == (want.tile_expert >= 0).sum().item()
        assert got.amax.tolist() == [0.0, 0.0]


if __name__ == "__main__":
    mend()
    if sys.argv[1] == "groups":
        compare_groups()
    else:
        for tokens, top_k in ((1, 6), (11, 6), (64, 6), (171, 6), (333, 5)):
            for experts, tile in ((7, 16), (256, 128)):
                compare(tokens, top_k, experts, tile)
