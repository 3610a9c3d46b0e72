"""Where rows stand, by plain loops, and tables to be filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from dsv4.config import capacity
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.routing import RoutingBuffers, RowGroups, histogram_size

POISON = 0x5A5A5A5A


@dataclass(frozen=True)
class Expected:
    """The tables' entries that are ever read.

    Attributes:
        row_slot: of each row, -1 for padding.
        slot_row: of each slot, -1 for a dropped one.
        tile_expert: of each row tile.
        tile_start, tile_rows: of each row tile: first row of its group, and number of rows of that.
        group_row: first row of each group, and the number of rows.
        group_expert: of each group.
    """

    row_slot: list[int]
    slot_row: list[int]
    tile_expert: list[int]
    tile_start: list[int]
    tile_rows: list[int]
    group_row: list[int]
    group_expert: list[int]

    def groups(self) -> list[range]:
        """The rows of each group."""
        return [range(a, b) for a, b in zip(self.group_row, self.group_row[1:], strict=False)]


def expected(local: Sequence[int], experts: int, unit: int, most: int) -> Expected:
    """Slots of each expert in order, padded to tiles of ``unit`` rows; as few groups of up to ``most`` rows as hold
    them, as small as that number of them can be."""
    tables = Expected([], [-1] * len(local), [], [], [], [], [])
    served: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(local):
        if expert >= 0:
            served[expert].append(slot)
    for expert, slots in enumerate(served):
        for slot in slots:
            tables.slot_row[slot] = len(tables.row_slot)
            tables.row_slot.append(slot)
        tables.row_slot.extend([-1] * (-len(slots) % unit))
        tiles = (len(slots) + unit - 1) // unit
        groups = next(n for n in count() if n * most >= tiles * unit)
        size = next(n for n in count(1) if groups * n >= tiles)
        for tile in range(tiles):
            if tile % size == 0:
                tables.group_row.append(len(tables.tile_expert) * unit)
                tables.group_expert.append(expert)
            tables.tile_expert.append(expert)
            tables.tile_start.append(tables.group_row[-1])
    tables.group_row.append(len(tables.row_slot))
    for group in tables.groups():
        tables.tile_rows.extend([len(group)] * (len(group) // unit))
    return tables


def filled(want: Expected, most: int) -> tuple[TileMap, RowGroups]:
    """The tables as kernels read them, int32, with row groups of up to ``most`` rows."""

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tiles = TileMap(table(want.row_slot), table(want.tile_expert), table([len(want.tile_expert)]))
    groups = RowGroups(
        most,
        slot_row=table(want.slot_row),
        tile_start=table(want.tile_start),
        tile_rows=table(want.tile_rows),
        group_row=table(want.group_row),
        group_expert=table(want.group_expert),
        num_groups=table([len(want.group_expert)]),
        taken=table([0, 0]),
    )
    return tiles, groups


def assert_filled(got: RowGroups, want: Expected) -> None:
    """Every entry that is read is the expected one."""
    tiles, groups = len(want.tile_expert), len(want.group_expert)
    assert got.slot_row.tolist() == want.slot_row
    assert got.tile_start[:tiles].tolist() == want.tile_start
    assert got.tile_rows[:tiles].tolist() == want.tile_rows
    assert got.group_row[: groups + 1].tolist() == want.group_row
    assert got.group_expert[:groups].tolist() == want.group_expert
    assert got.num_groups.item() == groups
    assert got.taken.tolist() == [0, 0]


def poisoned_buffers(
    slots: int, experts: int, unit: int, most: int | None = None, device: torch.device | str = "cpu"
) -> RoutingBuffers:
    """Tables as large as the bounds say, without row groups where ``most`` is None."""

    def poison(n: int) -> Tensor:
        return torch.full((n,), POISON, dtype=torch.int32, device=device)

    rows = capacity(slots, experts, unit)
    groups = None
    if most is not None:
        bound = capacity(slots, experts, most) // most
        groups = RowGroups(
            most,
            slot_row=poison(slots),
            tile_start=poison(rows // unit),
            tile_rows=poison(rows // unit),
            group_row=poison(bound + 1),
            group_expert=poison(bound),
            num_groups=poison(1),
            taken=poison(2),
        )
    return RoutingBuffers(
        poison(slots),
        TileMap(poison(rows), poison(rows // unit), poison(1)),
        poison(histogram_size(slots, experts)),
        torch.full((2,), torch.nan, device=device),
        groups,
    )
