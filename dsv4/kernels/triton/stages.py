"""The memory-bound stages around the GEMMs: stage rows as GEMM operands, batch maximum, combine.

A *staged* row is what the tensor cores multiply: plain bf16 in W4A16, ``e2m1 * sf`` in W4A4, which bf16 holds exactly;
the row's global scale stands beside it and is applied in the GEMM's epilogue. A token is staged once and gathered by
the GEMM's own loads, however many experts it goes to.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.numerics import block_scales, global_scale, largest_magnitude, quantize_values, silu_product


class ScaleSource(IntEnum):
    """Where a row's global scale comes from."""

    NONE = 0
    """The row is not quantized."""
    ROW = 1
    """Its own largest magnitude."""
    GIVEN = 2
    """One number for all rows."""
    BATCH = 3
    """The largest magnitude of the batch, one number."""
    EXPERT = 4
    """One number for each expert."""


@triton.jit
def _half_blocks(
    x, weight, source, block, K, limit, HALF: tl.constexpr,
    SWIGLU: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """First or second eight values of some blocks of a row, ``[BLOCKS, 8]`` fp32, zeros beyond K."""
    column = block[:, None] * 16 + (HALF * 8 + tl.arange(0, 8))[None, :]
    mask = (block * 16 < K)[:, None]
    if SWIGLU:
        gate = tl.load(x + source * 2 * K + column, mask=mask, other=0.0)
        up = tl.load(x + source * 2 * K + K + column, mask=mask, other=0.0)
        value = silu_product(gate, up, limit, HAS_LIMIT)
    else:
        value = tl.load(x + source * K + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        value *= weight
    if SWIGLU or HAS_WEIGHT:
        value = value.to(tl.bfloat16).to(tl.float32)
    return value


@triton.jit
def _store_half(out, row, block, value, K, HALF: tl.constexpr):
    column = block[:, None] * 16 + (HALF * 8 + tl.arange(0, 8))[None, :]
    tl.store(out + row.to(tl.int64) * K + column, value.to(tl.bfloat16), mask=(block * 16 < K)[:, None])


@triton.jit
def _stage_rows(
    x,  # bf16 [rows, K], or f32 [rows, 2K]: gate, then up
    weights,  # f32 [slots]
    scale,  # f32, by SOURCE
    local_ids,  # i32 [slots]
    out,  # bf16 [rows, K]
    row_scale,  # f32 [rows]
    K,
    limit,
    SOURCE: tl.constexpr,
    SWIGLU: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BY_SLOT: tl.constexpr,  # rows are slots, and dropped ones are skipped
    SLOTS_PER_ROW: tl.constexpr,  # input row = row // this
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0)
    if BY_SLOT:
        expert = tl.load(local_ids + row)
        if expert < 0:
            return
    else:
        expert = 0
    source = (row // SLOTS_PER_ROW).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(weights + row)
    block = tl.arange(0, BLOCKS)
    # Two halves of 16 bytes: a thread holds whole blocks, and a block's maximum crosses no threads.
    low = _half_blocks(x, weight, source, block, K, limit, 0, SWIGLU, HAS_LIMIT, HAS_WEIGHT)
    high = _half_blocks(x, weight, source, block, K, limit, 1, SWIGLU, HAS_LIMIT, HAS_WEIGHT)
    if SOURCE != 0:
        amax = tl.maximum(largest_magnitude(low, 1), largest_magnitude(high, 1), propagate_nan=tl.PropagateNan.ALL)
        if SOURCE == 1:
            row_amax = largest_magnitude(amax, 0)
            gs = global_scale(tl.where(row_amax < float("inf"), row_amax, 0.0))
        elif SOURCE == 2:
            gs = tl.load(scale)
        elif SOURCE == 3:
            gs = global_scale(tl.load(scale))
        else:
            gs = tl.load(scale + expert)
        divisor, reciprocal, factor = block_scales(amax, gs)
        low = quantize_values(low, divisor[:, None], reciprocal[:, None], factor[:, None])
        high = quantize_values(high, divisor[:, None], reciprocal[:, None], factor[:, None])
        tl.store(row_scale + row, gs)
    tl.debug_barrier()  # ``out`` may be ``x``: nothing is written before every thread has read
    _store_half(out, row, block, low, K, 0)
    _store_half(out, row, block, high, K, 1)


def _warps(blocks: int) -> int:
    """Warps for a row of so many blocks: one block for each thread."""
    return max(1, min(16, blocks // 32))


def stage_rows(
    x: Tensor,
    out: Tensor,
    row_scale: Tensor,
    *,
    source: ScaleSource,
    scale: Tensor | None = None,
    local_ids: Tensor | None = None,
    slots_per_row: int = 1,
    swiglu: bool = False,
    limit: float | None = None,
    weights: Tensor | None = None,
) -> None:
    """Stage rows for a GEMM.

    Args:
        x: bf16 ``[.., K]``, or with ``swiglu`` fp32 ``[.., 2K]``; output row r comes from row ``r // slots_per_row``.
        out: bf16 ``[rows, K]``; may be ``x`` itself.
        row_scale: fp32 ``[rows]``, written unless ``source`` is NONE.
        source: of the global scale.
        scale: what ``source`` reads.
        local_ids: rows are slots: int32 ``[rows]``, those below 0 are skipped.
        slots_per_row: see ``x``.
        swiglu: apply clamped SwiGLU first.
        limit: of SwiGLU.
        weights: fp32 ``[rows]``, multiplied in before the one rounding to bf16.
    """
    rows, k = out.shape
    blocks = triton.next_power_of_2(k // 16)
    _stage_rows[(rows,)](
        x,
        weights if weights is not None else row_scale,
        scale if scale is not None else row_scale,
        local_ids if local_ids is not None else row_scale,
        out,
        row_scale,
        k,
        limit or 0.0,
        SOURCE=int(source),
        SWIGLU=swiglu,
        HAS_LIMIT=limit is not None,
        HAS_WEIGHT=weights is not None,
        BY_SLOT=local_ids is not None,
        SLOTS_PER_ROW=slots_per_row,
        BLOCKS=blocks,
        num_warps=_warps(blocks),
    )


@triton.jit
def _batch_amax(
    x, weights, local_ids, amax, K,
    SLOTS: tl.constexpr, HAS_WEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    served = False
    for s in tl.static_range(SLOTS):
        served = served | (tl.load(local_ids + row * SLOTS + s) >= 0)
    if served:
        column = tl.arange(0, COLUMNS)
        value = tl.load(x + row.to(tl.int64) * K + column, mask=column < K, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value = (value * tl.load(weights + row)).to(tl.bfloat16).to(tl.float32)
        row_amax = largest_magnitude(value, 0)
        if row_amax < float("inf"):
            # A maximum has no order: the atomic gives the same bits every time.
            tl.atomic_max(amax, row_amax)


def batch_amax(x: Tensor, local_ids: Tensor, amax: Tensor, slots: int, weights: Tensor | None = None) -> None:
    """Raise ``amax [1]`` to the largest magnitude of ``x [rows, K]``, bf16, or of ``x * weights [rows]`` in bf16.

    Rows that hold a NaN or Inf, or none of whose ``slots`` local ids is served, are left out.
    """
    rows, k = x.shape
    columns = triton.next_power_of_2(k)
    _batch_amax[(rows,)](
        x,
        weights if weights is not None else amax,
        local_ids,
        amax,
        k,
        SLOTS=slots,
        HAS_WEIGHT=weights is not None,
        COLUMNS=columns,
        num_warps=max(1, min(16, columns // 256)),
    )


@triton.jit
def _combine(
    slot_rows, local_ids, weights, out, H,
    TOP_K: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    # First all loads of a kind, then their uses: the time is that of memory, and nothing else should wait for it.
    local: tl.tuple = ()
    for k in tl.static_range(TOP_K):
        local += (tl.load(local_ids + token * TOP_K + k),)
    factors: tl.tuple = ()
    if HAS_WEIGHT:
        for k in tl.static_range(TOP_K):
            factors += (tl.load(weights + token * TOP_K + k),)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the next layer's first launch waits for this one
        tl.extra.cuda.gdc_wait()
    values: tl.tuple = ()
    for k in tl.static_range(TOP_K):
        row = slot_rows + (token * TOP_K + k).to(tl.int64) * H
        values += (tl.load(row + column, mask=mask & (local[k] >= 0), other=0.0),)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        value = values[k].to(tl.float32)
        if HAS_WEIGHT:
            # A dropped slot adds nothing, not 0 * its weight: that may be infinite, and its row was never written.
            value *= tl.where(local[k] >= 0, factors[k], 0.0)
        acc += value
    tl.store(out + token.to(tl.int64) * H + column, acc.to(out.dtype.element_ty), mask=mask)


def combine(
    slot_rows: Tensor,
    local_ids: Tensor,
    weights: Tensor | None,
    out: Tensor,
    top_k: int,
    *,
    dependent: bool = False,
) -> None:
    """``out[t] = sum_k weights[t, k] * slot_rows[t * k]`` in fp32, in the order of k, rounded once.

    Args:
        slot_rows: bf16 or fp32 ``[S, H]``; rows of dropped slots are not read.
        local_ids: int32 ``[S]``, below 0 where dropped.
        weights: fp32 ``[T, k]``, or None for ones.
        out: ``[T, H]``.
        top_k: k.
        dependent: start before the launch before has ended (Hopper and later), which wrote ``slot_rows`` and nothing
            else that is read here.
    """
    tokens, h = out.shape
    block = min(512, triton.next_power_of_2(h))
    _combine[(tokens, triton.cdiv(h, block))](
        slot_rows,
        local_ids,
        weights if weights is not None else local_ids,
        out,
        h,
        TOP_K=top_k,
        HAS_WEIGHT=weights is not None,
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=2,
        **({"launch_pdl": True} if dependent else {}),
    )
