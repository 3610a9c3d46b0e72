"""Scalar functions of the CuTe DSL kernels run on the host: schedule, addresses, and the epilogue's arithmetic.

What is one PTX instruction on a GPU (division, fused multiplication, conversions) is the same operation in the host's
arithmetic here; everything that is made of them is the kernels' own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import cutlass
import torch
from cutlass import Float32, Float64, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import from_dlpack
from torch import Tensor

from dsv4.kernels.cutedsl import epilogue, ptx, schedule
from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS


def _lesser(a, b):
    # A comparison is false for NaN: the number is the result.
    return Float32(cutlass.select_(Float32(a) < Float32(b), Float32(a), Float32(b)))


def _of_nan(a, b, first):
    """``a`` or ``b``; a NaN in either is the result."""
    a, b = Float32(a), Float32(b)
    chosen = Float32(cutlass.select_(first, a, b))
    return Float32(cutlass.select_((a == a) & (b == b), chosen, a + b))


def _e4m3_byte(value):
    """By integers: from 2^-6 on a step is one of the bits that are kept, ties to even; below it is 2^-9."""
    value = _lesser(value, 448.0)
    bits = value.bitcast(Uint32)
    rounded = (bits + Uint32(0x7FFFF) + ((bits >> 20) & Uint32(1))) & Uint32(0xFFF00000)
    subnormal = (value + 16384.0) - 16384.0
    kept = Float32(cutlass.select_(value < 0.015625, subnormal, rounded.bitcast(Float32)))
    return (kept * 2.0**-120).bitcast(Uint32) >> 20


def _e4m3_value(byte):
    value = ((Uint32(byte) & Uint32(0x7F)) << 20).bitcast(Float32) * 2.0**120
    return Float32(cutlass.select_(Uint32(byte) == Uint32(0x7F), Float32(float("nan")), value))


def _permuted(low, high, selector):
    """PRMT: bytes 0 to 3 are the first word's."""
    result = Uint32(0)
    for place in range(4):
        byte = selector >> (4 * place) & 7
        word = Uint32(low) if byte < 4 else Uint32(high)
        result = result | (((word >> (8 * (byte % 4))) & Uint32(0xFF)) << (8 * place))
    return result


def _halves(word):
    return Uint32(word) & Uint32(0xFFFF), Uint32(word) >> 16


def _by_halves(function):
    def both(a, b):
        low, high = (function(x, y) for x, y in zip(_halves(a), _halves(b), strict=True))
        return Uint32(low) | (Uint32(high) << 16)

    return both


def _bf16_bits(value):
    """Rounded, ties to even; not of a NaN."""
    bits = Float32(value).bitcast(Uint32)
    return (bits + Uint32(0x7FFF) + ((bits >> 16) & Uint32(1))) >> 16


def _exact_product(a, b):
    return ((a << 16).bitcast(Float32) * (b << 16).bitcast(Float32)).bitcast(Uint32) >> 16


def _fused(a, b, c):
    """The exact product's sum in fp64, rounded to odd: rounding that to fp32 is as good as rounding once (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd")."""
    product, c = Float64(a) * Float64(b), Float64(c)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.bitcast(Int64)
    nearer = Int64(cutlass.select_((error > 0.0) == (total > 0.0), bits + 1, bits - 1))
    inexact = ((error > 0.0) | (error < 0.0)) & ((bits & Int64(1)) == 0)
    return Float32(Int64(cutlass.select_(inexact, nearer, bits)).bitcast(Float64))


@contextmanager
def host_arithmetic() -> Iterator[None]:
    """PTX's instructions by the host's."""
    with (
        mock.patch.object(ptx, "divide", lambda a, b: Float32(a) / Float32(b)),
        mock.patch.object(ptx, "fused", _fused),
        mock.patch.object(ptx, "lesser", _lesser),
        mock.patch.object(ptx, "minimum", lambda a, b: _of_nan(a, b, Float32(a) < Float32(b))),
        mock.patch.object(ptx, "maximum", lambda a, b: _of_nan(a, b, Float32(a) > Float32(b))),
        mock.patch.object(ptx, "reciprocal", lambda a: Float32(1.0) / Float32(a)),
        mock.patch.object(ptx, "exponential2", lambda a: cute.math.exp2(Float32(a))),
        mock.patch.object(ptx, "e4m3_byte", _e4m3_byte),
        mock.patch.object(ptx, "e4m3_value", _e4m3_value),
        mock.patch.object(ptx, "permute", lambda a, selector: _permuted(a, 0, selector)),
        mock.patch.object(ptx, "permute_two", _permuted),
        mock.patch.object(ptx, "larger_u16x2", _by_halves(lambda a, b: cutlass.max(a, b))),
        # Of magnitudes, whose bits order as they do: a NaN's are above those of all numbers.
        mock.patch.object(ptx, "lesser_bf16x2", _by_halves(lambda a, b: cutlass.min(a, b))),
        mock.patch.object(ptx, "multiply_bf16x2", _by_halves(_exact_product)),
        mock.patch.object(ptx, "pack_bf16x2", lambda a, b: _bf16_bits(a) | (_bf16_bits(b) << 16)),
    ):
        yield


@cute.jit
def _requantize(x: cute.Tensor, gs: cute.Tensor, words: cute.Tensor, scales: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        low, high, scale = epilogue.requantize([x[i, j] for j in range(16)], gs[i])
        words[i, 0], words[i, 1], scales[i] = low.bitcast(Int32), high.bitcast(Int32), scale.bitcast(Int32)


def requantize(x: Tensor, gs: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 ``[B, 16]`` under fp32 ``[B]`` -> ``(codes uint8 [B, 8], scale bytes uint8 [B])``."""
    words, scales = torch.zeros(len(x), 2, dtype=torch.int32), torch.zeros(len(x), dtype=torch.int32)
    with host_arithmetic():
        _requantize(from_dlpack(x), from_dlpack(gs), from_dlpack(words), from_dlpack(scales), len(x))
    return words.view(torch.uint8), scales.to(torch.uint8)


@cute.jit
def _quantized_pairs(x: cute.Tensor, gs: cute.Tensor, out: cute.Tensor, count: Int32):
    for i in cutlass.range(count):
        largest = Uint32(0)
        words = [[x[2 * i + half, c].bitcast(Uint32) for c in range(8)] for half in range(2)]
        for c in cutlass.range_constexpr(8):
            largest = ptx.larger_u16x2(largest, epilogue.pair_maxima(words[0][c], words[1][c]))
        for half in cutlass.range_constexpr(2):
            amax = largest << 16 if cutlass.const_expr(half == 0) else largest & Uint32(0xFFFF0000)
            scale = gs[2 * i + half]
            terms = epilogue.block_terms(amax.bitcast(Float32), scale, ptx.divide(1.0, scale))
            for c in cutlass.range_constexpr(8):
                out[2 * i + half, c] = epilogue.quantized_pair(words[half][c], terms).bitcast(Int32)


def quantized_pairs(x: Tensor, gs: Tensor) -> Tensor:
    """bf16 ``[B, 16]`` under fp32 ``[B]`` -> ``e2m1 * sf``, bf16 ``[B, 16]``; B is even: blocks meet by twos."""
    words = x.view(torch.int32).contiguous()
    out = torch.zeros_like(words)
    with host_arithmetic():
        _quantized_pairs(from_dlpack(words), from_dlpack(gs), from_dlpack(out), len(x) // 2)
    return out.view(torch.bfloat16)


@cute.jit
def _swiglu(
    gate: cute.Tensor, up: cute.Tensor, out: cute.Tensor, limit: Float32, limited: cutlass.Constexpr, count: Int32
):
    for i in cutlass.range(count):
        out[i] = epilogue.swiglu(gate[i], up[i], limit if limited else None)


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """fp32 ``[B]``."""
    out = torch.zeros_like(gate)
    with host_arithmetic():
        _swiglu(*(from_dlpack(t) for t in (gate, up, out)), limit or 0.0, limit is not None, len(gate))
    return out


@cute.jit
def _table(address: Int64, table: cute.Tensor, num_experts: Int32, height: cutlass.Constexpr):
    ends = schedule.ends_at(address, num_experts)
    tiles = Int32(0)
    scales = Int32(0)
    for lane in cutlass.range(schedule.LANES):
        chunk = schedule.chunk_ends(ends, num_experts, lane)
        schedule.fill_chunk(table, chunk, lane, tiles, scales, height)
        tiles += schedule.chunk_tiles(chunk, height)
        scales += schedule.chunk_tiles(chunk, 128)


@cute.jit
def _located(table: cute.Tensor, out: cute.Tensor, column_tiles: Int32, total: Int32):
    for tile in cutlass.range(total):
        expert, row_tile, column_tile = schedule.locate(table, column_tiles, tile)
        out[tile, 0], out[tile, 1], out[tile, 2] = expert, row_tile, column_tile


def table_of(ends: Tensor, height: int) -> Tensor:
    """int32 ``[MAX_EXPERTS + 1, 3]``: starts, row tiles and scale tiles before each expert."""
    table = torch.full((3, MAX_EXPERTS + 1), -1, dtype=torch.int32).t()
    _table(ends.data_ptr(), from_dlpack(table), len(ends), height)
    return table


def located(table: Tensor, column_tiles: int) -> Tensor:
    """int32 ``[tiles, 3]``: expert, row tile and column tile of every number."""
    total = int(table[-1, 1]) * column_tiles
    out = torch.full((max(total, 1), 3), -1, dtype=torch.int32)
    _located(from_dlpack(table), from_dlpack(out), column_tiles, total)
    return out[:total]


@cute.jit
def _scale_offsets(out: cute.Tensor, columns: Int32, count: Int32):
    for i in cutlass.range(count):
        out[i] = schedule.scale_offset(i // columns, i % columns, columns)


def scale_offsets(rows: int, columns: int) -> Tensor:
    """int32 ``[rows, columns]``."""
    out = torch.zeros(rows * columns, dtype=torch.int32)
    _scale_offsets(from_dlpack(out), columns, rows * columns)
    return out.view(rows, columns)
