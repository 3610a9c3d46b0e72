"""Grouped GEMM over NVFP4 weights: decode in registers, multiply on bf16 tensor cores, any NVIDIA GPU from Ampere on.

Written in Gluon, Triton's language with explicit layouts: a plain Triton kernel decodes just as fast, but then sends
the decoded weights through shared memory, since the compiler does not see that they already stand where the tensor
cores want them.

**Operands are swapped.** A product has few tokens and many outputs, so the *weights* are the left operand, ``[BN, K]``,
which tensor cores take from registers, where decoding leaves it; the tokens are the right one, ``[K, BM]``, of which 8
columns are enough. Weights stand in memory in the order of the left operand's fragments
(:mod:`dsv4.kernels.triton.weight_layout`) and are decoded in place (:mod:`dsv4.kernels.triton.decode`).

**Pipeline.** Codes, scales and gathered token rows travel by asynchronous copies through a ring of ``STAGES`` slots.
Copies are issued two steps short of the ring's length ahead, right after the step's barrier: a slot that is filled was
read two steps ago.

**Schedule.** The grid is persistent: programs walk the tiles (row tile, output tile) that the routing kernel counted on
the device; no launch depends on a token count. A row tile belongs to one expert; its rows name slots, whose token (or
slot) rows are gathered by the loads themselves, and results are written at the slot. Padding rows name slot -1:
nothing is read or written for them.

**Tensor cores.** ``mma`` instructions take their right operand from registers, too, and suit few tokens; on Hopper,
``wgmma`` takes it from shared memory and is twice as fast with many.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from dsv4.kernels.triton.decode import (
    UNSCALE,
    block_scales,
    code_layout,
    grouped_layout,
    high_fields,
    low_fields,
    scale_layout,
    scaled,
)
from dsv4.kernels.triton.numerics import quantize_block, silu_product
from dsv4.kernels.triton.weight_layout import CHUNK_BYTES, CODE_BYTES, Matrix
from dsv4.ops.layouts import ceil_div

_CHUNK = gl.constexpr(CHUNK_BYTES)
_CODES = gl.constexpr(CODE_BYTES)
_SCALES = gl.constexpr(CHUNK_BYTES - CODE_BYTES)


@dataclass(frozen=True)
class GemmConfig:
    """How one product is tiled.

    Attributes:
        block_m: slots of a row tile, a power of two from 8 on.
        block_n: rows of the weight matrix in a tile: 64, 128 or 256; half as many outputs with gate and up interleaved.
        num_warps: 4 or 8; each takes 16 rows at a time.
        num_stages: slots of the ring, at least 3.
        programs_per_sm: persistent programs for each multiprocessor.
        wgmma: use Hopper's ``wgmma`` where the GPU has it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    wgmma: bool = False


@gluon.constexpr_function
def _accumulator_layout(wgmma, warps, columns):
    """How a result tile ``[BN, BM]`` is spread over the threads."""
    version, shape = ([3, 0], [16, columns, 16]) if wgmma else ([2, 0], [16, 8])
    return gl.NVMMADistributedLayout(version, [warps, 1], shape)


@gluon.jit
def _copy(step, stage, codes, scales, x_ptr, valid, column, K, code_ring, scale_ring, low_ring, high_ring,
          EVEN_K: gl.constexpr):  # fmt: skip
    """Start the copies of one step into its slot. What is masked is filled with zeros, and costs no traffic."""
    async_copy.async_copy_global_to_shared(code_ring.index(stage), codes + step * _CHUNK)
    async_copy.async_copy_global_to_shared(scale_ring.index(stage), scales + step * _CHUNK)
    k = step * 128
    low = valid if EVEN_K else valid & (column + k < K)
    high = valid if EVEN_K else valid & (column + (k + 64) < K)
    async_copy.async_copy_global_to_shared(low_ring.index(stage), x_ptr + k, mask=low)
    async_copy.async_copy_global_to_shared(high_ring.index(stage), x_ptr + (k + 64), mask=high)


@gluon.jit
def _store_rows(value, out, row_slot, first, N, WIDTH, scale, row_scale, BM: gl.constexpr, BO: gl.constexpr,
                PER_THREAD: gl.constexpr, REQUANTIZE: gl.constexpr, EVEN_N: gl.constexpr,
                num_warps: gl.constexpr):  # fmt: skip
    """Write ``value [BO, BM]`` at the slots of a row tile, outputs ``first ..`` of rows of ``WIDTH``."""
    LANES: gl.constexpr = min(32, BO // PER_THREAD)
    OUT: gl.constexpr = gl.BlockedLayout([PER_THREAD, 1], [LANES, 32 // LANES], [1, num_warps], [0, 1])
    value = gl.convert_layout(value.to(out.dtype.element_ty), OUT)
    slot = gl.load(row_slot + gl.arange(0, BM, gl.SliceLayout(0, OUT)))
    n = first + gl.arange(0, BO, gl.SliceLayout(1, OUT))
    valid = slot >= 0
    slot = gl.where(valid, slot, 0)
    if REQUANTIZE:
        # A thread holds whole blocks of 16: nothing is exchanged.
        blocks = value.to(gl.float32).permute([1, 0]).reshape([BM, BO // 16, 16])
        blocks = quantize_block(blocks, scale)
        value = gl.convert_layout(blocks.reshape([BM, BO]).permute([1, 0]).to(out.dtype.element_ty), OUT)
        if first == 0:
            gl.store(row_scale + slot, gl.zeros_like(slot).to(gl.float32) + scale, mask=valid)
    mask = valid[None, :] if EVEN_N else valid[None, :] & (n < N)[:, None]
    gl.store(out + slot[None, :].to(gl.int64) * WIDTH + n[:, None], value, mask=mask)


# A count of 1 made a constant would fold the loop over K away, which the compiler of Gluon code does not survive.
@gluon.jit(do_not_specialize=["k_blocks", "row_tiles"])
def _grouped_gemm(
    x,  # bf16 [rows, K]
    x_scale,  # f32 [rows] or unused
    experts,  # u8 [E, expert_bytes]
    gs,  # f32 [E, 2] or [E]
    topk_weights,  # f32 [S] or unused
    out_scale,  # f32 [E]: with REQUANTIZE, the global scale of the results
    row_slot,
    tile_expert,
    num_tiles,
    out,
    out_row_scale,  # f32 [S], written with REQUANTIZE
    K,
    k_blocks,
    row_tiles,
    N,  # outputs: half the matrix's rows where gate and up are interleaved
    expert_bytes,
    offset,
    limit,
    SLOTS_PER_ROW: gl.constexpr,  # slots that share a row of x: top_k, or 1
    GATED: gl.constexpr,  # rows of gate and up are interleaved; gs is [E, 2]
    SWIGLU: gl.constexpr,  # write SwiGLU, else gate | up
    HAS_X_SCALE: gl.constexpr,
    HAS_WEIGHT: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    REQUANTIZE: gl.constexpr,
    EVEN_K: gl.constexpr,
    EVEN_N: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    WGMMA: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    ACC: gl.constexpr = _accumulator_layout(WGMMA, num_warps, BM)
    RING: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2) if WGMMA else gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    REPEAT: gl.constexpr = BN // (16 * num_warps)
    GROUPED: gl.constexpr = grouped_layout(num_warps, REPEAT)
    CODES_OF_THREAD: gl.constexpr = code_layout(num_warps, REPEAT)
    SCALES_OF_THREAD: gl.constexpr = scale_layout(num_warps, REPEAT)
    COPY: gl.constexpr = gl.BlockedLayout([16], [32], [num_warps], [0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    X_ROW: gl.constexpr = gl.SliceLayout(1, X_COPY)
    BO: gl.constexpr = BN // 2 if GATED else BN

    code_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BN * 64], FLAT)
    scale_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BN * 8], FLAT)
    low_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 64], RING)
    high_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 64], RING)

    n_tiles = gl.cdiv(N, BO)
    total = gl.load(num_tiles) * n_tiles
    code = gl.arange(0, BN * 64, COPY)
    scale_byte = gl.arange(0, BN * 8, COPY)
    column = gl.arange(0, 64, gl.SliceLayout(0, X_COPY))[None, :]
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        row_tile = tile // n_tiles
        n_tile = tile % n_tiles
        expert = gl.load(tile_expert + row_tile)
        slots = row_slot + row_tile * BM
        slot = gl.load(slots + gl.arange(0, BM, X_ROW))
        valid = (slot >= 0)[:, None]
        x_row = gl.where(slot >= 0, slot // SLOTS_PER_ROW, 0)
        x_ptr = x + x_row[:, None].to(gl.int64) * K + column
        chunk_of_code, chunk_of_scale = (
            n_tile * (BN // 64) + code // _CODES,
            n_tile * (BN // 64) + scale_byte // _SCALES,
        )
        if not EVEN_N:  # the last tile may reach beyond the matrix
            chunk_of_code = gl.minimum(chunk_of_code, row_tiles - 1)
            chunk_of_scale = gl.minimum(chunk_of_scale, row_tiles - 1)
        base = experts + expert.to(gl.int64) * expert_bytes + offset
        codes = base + chunk_of_code * (k_blocks * _CHUNK) + code % _CODES
        scales = base + chunk_of_scale * (k_blocks * _CHUNK) + (_CODES + scale_byte % _SCALES)
        gl.thread_barrier()  # nothing of the tile before is read any more
        for step in gl.static_range(STAGES - 2):
            if step < k_blocks:
                _copy(step, step, codes, scales, x_ptr, valid, column, K,
                      code_ring, scale_ring, low_ring, high_ring, EVEN_K)  # fmt: skip
            async_copy.commit_group()
        acc = gl.zeros([BN, BM], gl.float32, ACC)
        for step in range(k_blocks):
            async_copy.wait_group(STAGES - 3)
            ahead = step + (STAGES - 2)
            if ahead < k_blocks:
                _copy(ahead, ahead % STAGES, codes, scales, x_ptr, valid, column, K,
                      code_ring, scale_ring, low_ring, high_ring, EVEN_K)  # fmt: skip
            async_copy.commit_group()
            if WGMMA:
                fence_async_shared()  # wgmma reads what asynchronous copies wrote
            stage = step % STAGES
            q = code_ring.index(stage).load(CODES_OF_THREAD)
            sf_low, sf_high = block_scales(scale_ring.index(stage).load(SCALES_OF_THREAD), GROUPED, BN)
            x_low, x_high = low_ring.index(stage).permute([1, 0]), high_ring.index(stage).permute([1, 0])
            low = scaled(low_fields(q), sf_low, GROUPED, A, BN)
            if WGMMA:
                acc = warpgroup_mma(low, x_low, acc, is_async=True)
                high = scaled(high_fields(q), sf_high, GROUPED, A, BN)
                acc = warpgroup_mma(high, x_high, acc, is_async=True)
                acc, low, high = warpgroup_mma_wait(0, deps=[acc, low, high])
            else:
                acc = mma_v2(low, x_low.load(B), acc)
                high = scaled(high_fields(q), sf_high, GROUPED, A, BN)
                acc = mma_v2(high, x_high.load(B), acc)

        acc *= UNSCALE
        slot_of = gl.load(slots + gl.arange(0, BM, gl.SliceLayout(0, ACC)))
        if HAS_X_SCALE:
            acc *= gl.load(x_scale + gl.where(slot_of >= 0, slot_of // SLOTS_PER_ROW, 0))[None, :]
        first = n_tile * BO
        if GATED:
            pair = acc.reshape([BN // 16, 2, 8, BM]).permute([0, 2, 3, 1]).reshape([BO, BM, 2])
            gate, up = gl.split(pair)
            gate *= gl.load(gs + 2 * expert)
            up *= gl.load(gs + 2 * expert + 1)
            if SWIGLU:
                result = silu_product(gate, up, limit, HAS_LIMIT)
                if HAS_WEIGHT:
                    LIKE: gl.constexpr = gl.SliceLayout(0, result.type.layout)
                    safe = gl.convert_layout(gl.where(slot_of >= 0, slot_of, 0), LIKE)
                    result *= gl.load(topk_weights + safe)[None, :]
                requantized_by = gl.load(out_scale + expert) if REQUANTIZE else 0.0
                _store_rows(result, out, slots, first, N, N, requantized_by, out_row_scale, BM, BO,
                            16 if REQUANTIZE else 8, REQUANTIZE, EVEN_N, num_warps)  # fmt: skip
            else:
                _store_rows(gate, out, slots, first, N, 2 * N, 0.0, out_row_scale, BM, BO, 8, False, EVEN_N, num_warps)
                _store_rows(
                    up, out + N, slots, first, N, 2 * N, 0.0, out_row_scale, BM, BO, 8, False, EVEN_N, num_warps
                )
        else:
            acc *= gl.load(gs + expert)
            _store_rows(acc, out, slots, first, N, N, 0.0, out_row_scale, BM, BO, 8, False, EVEN_N, num_warps)


@dataclass(frozen=True)
class TileMap:
    """What the routing kernel leaves on the device.

    Attributes:
        row_slot: int32 ``[R]``, slot of each row, -1 for padding.
        tile_expert: int32 ``[R / P]``, valid up to ``num_tiles``.
        num_tiles: int32 ``[1]``.
    """

    row_slot: Tensor
    tile_expert: Tensor
    num_tiles: Tensor


@dataclass(frozen=True)
class Requantize:
    """Quantize results as they are written, under scales known beforehand.

    Attributes:
        scale: fp32 ``[E]``, each expert's global scale.
        row_scale: fp32 ``[S]``, where the scale of each slot is written.
    """

    scale: Tensor
    row_scale: Tensor


def grouped_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    experts: Tensor,
    matrix: Matrix,
    gs: Tensor,
    tiles: TileMap,
    out: Tensor,
    config: GemmConfig,
    *,
    slots_per_row: int,
    swiglu: bool = False,
    limit: float | None = None,
    topk_weights: Tensor | None = None,
    requantize: Requantize | None = None,
    multiprocessors: int,
) -> None:
    """Multiply every routed slot's row with its expert's matrix.

    Args:
        x: bf16 ``[rows, K]``, contiguous; slot s reads row ``s // slots_per_row``.
        x_scale: fp32 ``[rows]``, multiplied into that row's results, or None.
        experts: uint8 ``[E, bytes]``.
        matrix: which part of them.
        gs: fp32 ``[E]``, or ``[E, 2]`` for an interleaved gate and up.
        tiles: the schedule, with row tiles of ``config.block_m``.
        out: bf16 or fp32, written at the slot: ``[S, N]``, an interleaved matrix's ``[S, 2I]`` (gate, then up), or with
            ``swiglu`` ``[S, I]``.
        config: the tiling.
        slots_per_row: see ``x``.
        swiglu: apply clamped SwiGLU to an interleaved matrix's results.
        limit: of SwiGLU.
        topk_weights: fp32, ``S`` values, multiplied into SwiGLU's result before it is rounded.
        requantize: with ``swiglu``, quantize the rounded results; ``out`` holds ``e2m1 * sf``.
        multiprocessors: of the device.
    """
    n = matrix.out_features // 2 if matrix.interleaved else matrix.out_features
    outputs = config.block_n // 2 if matrix.interleaved else config.block_n
    n_tiles = ceil_div(n, outputs)
    programs = max(1, min(multiprocessors * config.programs_per_sm, tiles.tile_expert.shape[0] * n_tiles))
    _grouped_gemm[(programs,)](
        x,
        x_scale if x_scale is not None else gs,
        experts,
        gs,
        topk_weights if topk_weights is not None else gs,
        requantize.scale if requantize is not None else gs,
        tiles.row_slot,
        tiles.tile_expert,
        tiles.num_tiles,
        out,
        requantize.row_scale if requantize is not None else gs,
        matrix.in_features,
        matrix.k_blocks,
        matrix.row_tiles,
        n,
        experts.stride(0),
        matrix.offset,
        limit or 0.0,
        SLOTS_PER_ROW=slots_per_row,
        GATED=matrix.interleaved,
        SWIGLU=swiglu,
        HAS_X_SCALE=x_scale is not None,
        HAS_WEIGHT=topk_weights is not None,
        HAS_LIMIT=limit is not None,
        REQUANTIZE=requantize is not None,
        EVEN_K=matrix.in_features % 128 == 0,
        EVEN_N=n % outputs == 0,
        BM=config.block_m,
        BN=config.block_n,
        WGMMA=config.wgmma,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
