"""Which tile of which expert a program multiplies next, from the experts' cumulative row ends; and where scales stand.

Everything here is integer arithmetic on tensors of int32, in shared memory of a GPU or in memory of a CPU.

The *table* has three columns of ``MAX_EXPERTS + 1`` entries: the first row of each expert, how many row tiles come
before it, and how many tiles of 128 scale rows. Entries behind the last expert are totals. A tile's number counts row
tiles fastest within an expert, so that neighbouring programs share the columns of B, then column tiles, then experts.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute

from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS

LANES = 32
_CHUNK = MAX_EXPERTS // LANES
_SEARCH = tuple(MAX_EXPERTS >> (1 + i) for i in range(MAX_EXPERTS.bit_length() - 1))
STARTS, TILES, SCALES = range(3)
_SCALE_ROWS = 128


def table_layout():
    """Of the table: ``(entry, column)``."""
    return cute.make_layout((MAX_EXPERTS + 1, 3))


def ends_at(address, num_experts):
    """The cumulative row ends at an address.

    As many as there are: in a tensor of a constant size 1 every index is element 0.
    """
    pointer = cute.make_ptr(Int32, address, cute.AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(pointer, cute.make_layout(num_experts))


def chunk_ends(ends, num_experts, lane):
    """The ends of a lane's experts, and that of the expert before them: those behind the last have no rows."""
    last = num_experts - 1
    first = lane * _CHUNK
    before = ends[cutlass.max(cutlass.min(first - 1, last), 0)] * Int32(first > 0)
    return [before] + [ends[cutlass.min(first + i, last)] for i in range(_CHUNK)]


def tiles_of(rows, height):
    """Tiles of ``height`` rows that hold so many."""
    return (rows + (height - 1)) // height


def chunk_tiles(chunk, height):
    """Tiles of a lane's experts together."""
    total = Int32(0)
    for i in range(_CHUNK):
        total = total + tiles_of(chunk[i + 1] - chunk[i], height)
    return total


@cute.jit
def fill_chunk(table, chunk, lane, tiles, scales, height):
    """Write a lane's entries.

    Args:
        table: int32, see :func:`table_layout`.
        chunk: of :func:`chunk_ends`.
        lane: 0 to 31.
        tiles: row tiles of the lanes before.
        scales: scale tiles of the lanes before.
        height: rows of a tile.
    """
    first = lane * _CHUNK
    if lane == 0:
        for column in cutlass.range_constexpr(3):
            table[0, column] = Int32(0)
    for i in cutlass.range_constexpr(_CHUNK):
        rows = chunk[i + 1] - chunk[i]
        tiles = tiles + tiles_of(rows, height)
        scales = scales + tiles_of(rows, _SCALE_ROWS)
        table[first + i + 1, STARTS] = chunk[i + 1]
        table[first + i + 1, TILES] = tiles
        table[first + i + 1, SCALES] = scales


@cute.jit
def locate(table, column_tiles, tile):
    """``(expert, row tile, column tile)`` of a tile's number, which must be below the total."""
    expert = Int32(0)
    for step in cutlass.range_constexpr(len(_SEARCH)):
        candidate = expert + _SEARCH[step]
        if table[candidate, TILES] * column_tiles <= tile:
            expert = candidate
    before = table[expert, TILES]
    row_tiles = table[expert + 1, TILES] - before
    place = tile - before * column_tiles
    column = place // row_tiles
    return expert, place - column * row_tiles, column


def scale_offset(row, block, scale_columns):
    """Where the scale of a row and a block of 16 stands in the swizzled 32x4x4 layout (:mod:`dsv4.ops.layouts`).

    Args:
        row: of the scale matrix, padding counted.
        block: number of the block along K.
        scale_columns: of the matrix, a multiple of 4.
    """
    tile = (row // 128) * (scale_columns // 4) + block // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
