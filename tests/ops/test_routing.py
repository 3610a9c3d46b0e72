"""Routing tables against a loop, the capacity bound, and the absence of host synchronisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dsv4.config import capacity
from dsv4.ops.routing import local_expert_ids, route


def expected_tables(ids: list[list[int]], num_experts: int, tile: int):
    """The tables by plain loops: slots of each expert in order, each expert padded to whole tiles."""
    flat = [e for row in ids for e in row]
    rows: list[int] = []
    tile_expert: list[int] = []
    slot_row = [-1] * len(flat)
    for expert in range(num_experts):
        slots = [s for s, e in enumerate(flat) if e == expert]
        for slot in slots:
            slot_row[slot] = len(rows)
            rows.append(slot)
        padding = -len(slots) % tile
        rows += [-1] * padding
        tile_expert += [expert] * ((len(slots) + padding) // tile)
    return rows, slot_row, tile_expert


@st.composite
def routings(draw: st.DrawFn):
    """Any T, k, E and P with ids of any skew: repeated in a row, dropped, or all on one expert."""
    experts = draw(st.sampled_from([1, 2, 3, 8, 64, 512]))
    tokens = draw(st.integers(0, 40))
    top_k = draw(st.integers(1, 8))
    tile = draw(st.sampled_from([1, 2, 8, 16, 128]))
    favourites = draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=4))
    pick = st.one_of(st.sampled_from(favourites), st.integers(-1, experts - 1))
    ids = draw(st.lists(st.lists(pick, min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens))
    return ids, top_k, experts, tile


@given(routings())
@example(([], 6, 4, 16))
def test_tables_equal_a_loop(case):
    """Each served slot has exactly one row, in slot order within its expert, and every padding entry is -1."""
    ids, top_k, experts, tile = case
    tensor = torch.tensor(ids, dtype=torch.int32).reshape(len(ids), top_k)
    routing = route(tensor, experts, tile)
    rows, slot_row, tile_expert = expected_tables(ids, experts, tile)
    bound = capacity(tensor.numel(), experts, tile)
    assert len(rows) <= bound
    assert routing.row_slot.tolist() == rows + [-1] * (bound - len(rows))
    assert routing.slot_row.reshape(-1).tolist() == slot_row
    assert routing.tile_expert.tolist() == tile_expert + [-1] * (bound // tile - len(tile_expert))
    assert routing.counts.tolist() == [sum(row.count(e) for row in ids) for e in range(experts)]
    assert routing.row_starts.tolist()[-1] == len(rows)


@given(
    experts=st.integers(1, 512),
    tokens=st.integers(0, 4096),
    top_k=st.integers(1, 8),
    tile=st.sampled_from([1, 8, 16, 64, 128, 256]),
    seed=st.integers(0, 2**31),
    skew=st.sampled_from(["uniform", "one", "few", "zipf"]),
)
@example(experts=256, tokens=1, top_k=6, tile=128, seed=0, skew="one")
@example(experts=1, tokens=4096, top_k=8, tile=128, seed=0, skew="one")
def test_no_routing_exceeds_the_bound(experts, tokens, top_k, tile, seed, skew):
    """Whatever the skew, the padded rows of all experts fit the capacity bound."""
    generator = torch.Generator().manual_seed(seed)
    span = {"uniform": experts, "one": 1, "few": min(experts, 3), "zipf": experts}[skew]
    if skew == "zipf":
        p = 1.0 / torch.arange(1, span + 1).double()
        ids = torch.multinomial(p, max(tokens * top_k, 1), replacement=True, generator=generator)
        ids = ids[: tokens * top_k].reshape(tokens, top_k)
    else:
        ids = torch.randint(0, span, (tokens, top_k), generator=generator)
    routing = route(ids.to(torch.int32), experts, tile)
    assert int(routing.row_starts[-1]) <= capacity(tokens * top_k, experts, tile)
    assert int(routing.counts.sum()) == tokens * top_k


@given(
    experts=st.integers(1, 512),
    tokens=st.integers(0, 4096),
    top_k=st.integers(1, 8),
    tile=st.sampled_from([1, 2, 8, 16, 64, 128]),
)
@example(experts=384, tokens=4096, top_k=6, tile=128)
@example(experts=512, tokens=1, top_k=1, tile=16)
def test_the_bound_is_reached(experts, tokens, top_k, tile):
    """The worst routing needs exactly the bound: one row on every expert but one, all the others on that one.

    Ids may repeat in a row, so these counts can be had for any T and k.
    """
    slots = tokens * top_k
    busy = min(experts, slots)
    flat = torch.zeros(slots, dtype=torch.int32)
    flat[:busy] = torch.arange(busy, dtype=torch.int32)
    routing = route(flat.reshape(tokens, top_k), experts, tile)
    assert int(routing.row_starts[-1]) == capacity(slots, experts, tile)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_contiguous_range(dtype):
    """Ids outside [start, start + E), negative ones and ids beyond 32 bits are dropped, never clamped."""
    huge = 2**31 - 1 if dtype == torch.int32 else 2**40 + 4
    ids = torch.tensor([[3, 4, 7], [8, -1, huge]], dtype=dtype)
    assert local_expert_ids(ids, 4, start=4).tolist() == [[-1, 0, 3], [-1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expert_map(dtype):
    """A map sends global ids anywhere; -1 and ids that it does not know are dropped."""
    ids = torch.tensor([[0, 1, 2], [3, -1, 9]], dtype=dtype)
    expert_map = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    assert local_expert_ids(ids, 3, expert_map=expert_map).tolist() == [[1, -1, 0], [2, -1, -1]]
    nothing = torch.empty(0, dtype=torch.int32)
    assert local_expert_ids(ids, 3, expert_map=nothing).tolist() == [[-1] * 3] * 2


def test_padding_tokens_are_dropped():
    """Tokens from num_valid_tokens on are served by nobody."""
    ids = torch.tensor([[0, 1], [1, 0], [0, 0]])
    local = local_expert_ids(ids, 2, num_valid_tokens=torch.tensor([1], dtype=torch.int32))
    assert local.tolist() == [[0, 1], [-1, -1], [-1, -1]]


def test_no_host_synchronisation(no_host_sync):
    """Routing uses no operation whose result or shape the host must read."""
    ids = torch.randint(-1, 8, (33, 3))
    with no_host_sync():
        local = local_expert_ids(ids, 8, expert_map=torch.arange(8), num_valid_tokens=torch.tensor([30]))
        routing = route(local, 8, 16)
        routing.row_token()
        routing.row_expert()


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.bincount(),
        lambda x: x.unique(),
        lambda x: x[x > 1],
        lambda x: x.repeat_interleave(x),
        lambda x: bool(x.any()),
    ],
)
def test_the_guard_itself_raises(no_host_sync, sync):
    """The mode used above does catch what it is meant to catch."""
    with pytest.raises(AssertionError, match="host"), no_host_sync():
        sync(torch.tensor([1, 2]))
