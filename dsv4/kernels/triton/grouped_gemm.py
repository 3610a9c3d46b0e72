"""Grouped GEMM over NVFP4 weights: decode in registers, multiply on bf16 tensor cores, any NVIDIA GPU from Ampere on.

**Operands are swapped.** A product has few tokens and many outputs, so the *weights* are the left operand, ``[BN, K]``,
and the tokens the right one, ``[K, BM]``: Hopper's wgmma wants 64 rows of the left operand but takes any multiple of 8
columns of the right one, and takes its left operand from registers, which is where decoding leaves it.

**K order in a word.** A row is cut into blocks of 128 along K, 64 bytes each; the 32-bit word ``q`` of a block holds
codes ``4q .. 4q + 3`` (the *low* operand, the block's first 64 values of K) and ``64 + 4q .. 64 + 4q + 3`` (the *high*
one). Either operand alone is contiguous along K: two products follow one load, and nothing moves between threads.

**Bits in a word.** Decoding wants two codes at a time in the 16-bit lanes of a register: sign in bit 15, magnitude in
bits 8 to 6, the rest zero. A plain nibble takes four instructions to get there. So the 32 bits of a word are placed
such that most of them stand right after one rotation. In the lane of ``4q + i`` (lane ``i % 2``)::

    low  0, 1    magnitude 8 7 6       sign 15                       mask
    low  2, 3    magnitude 11 10 9     sign 2, in the other lane     rotate by 3, mask
    high 0, 1    magnitude 14 13 12    sign 5, in the other lane     rotate by 6, mask
    high 2, 3    magnitude 0 4 3       sign 1                        mask, multiply by 2^3 + 2^8 + 2^14, mask

The multiplication moves the four remaining bits at once: no two of its partial products meet in a bit, so nothing
carries. That is two instructions for two codes, one of eight of them off the integer pipe.

**Decoding** is exact. The three magnitude bits of a code, put where bf16 has the low bits of its exponent and the high
bit of its mantissa, read as ``value * 2^-126`` (0.5 as a subnormal). The bits of an e4m3 scale, shifted by four, read
as ``value * 2^-120``; two exact multiplications turn it into ``value * 2^117``. Their product is ``e2m1 * sf * 2^-9``,
with at most 5 significant bits; the epilogue takes the factor out again with the global scales. No scale is assumed to
be normal.

**Schedule.** The grid is persistent: programs walk the tiles (row tile, output tile) that the routing kernel counted on
the device; no launch depends on a token count. A row tile belongs to one expert; its rows name slots, whose token (or
slot) rows are gathered by the loads themselves, and results are written at the slot. Padding rows name slot -1: nothing
is read or written for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.triton.numerics import silu_product
from dsv4.ops.layouts import ceil_div, round_up

K_BLOCK = 128
"""Weights are padded to a multiple of this along K."""

_HALF = tl.constexpr(64)
_GROUPS = tl.constexpr(4)  # block scales in half a K block
_UNSCALE = tl.constexpr(512.0)  # 2^9, what decoding leaves out


@dataclass(frozen=True)
class GemmConfig:
    """How one product is tiled.

    Attributes:
        block_m: slots of a row tile.
        block_n: outputs of a tile (of gate and of up each, when both are computed).
        num_warps: warps of a program.
        num_stages: depth of the load pipeline.
        programs_per_sm: persistent programs for each multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@triton.jit
def _scales(words):
    """Four e4m3 scales in each 32-bit word, ``[BN]`` -> bf16 ``[BN, 4]``, times 2^117."""
    # A negative zero is a zero: the sign goes.
    bits = (words[:, None] >> (8 * tl.arange(0, _GROUPS))[None, :]) & 0x7F
    field = (bits << 4).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    # Two steps: 2^237 is no bf16 number.
    return field * tl.full((), 2.0**120, tl.bfloat16) * tl.full((), 2.0**117, tl.bfloat16)


@triton.jit
def _low_fields(q):
    """Bytes of packed words -> their low codes as bf16, times 2^-126: see the module docstring."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 r;
        and.b32 $0, $2, 0x81C081C0;
        shf.r.wrap.b32 r, $2, $2, 3;
        and.b32 $1, r, 0x81C081C0;
        }
        """,
        "=r,=r,r",
        [q],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _high_fields(q):
    """The same for the high codes."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 r;
        shf.r.wrap.b32 r, $2, $2, 6;
        and.b32 $0, r, 0x81C081C0;
        and.b32 r, $2, 0x001B001B;
        mul.lo.u32 r, r, 0x4108;
        and.b32 $1, r, 0x81C081C0;
        }
        """,
        "=r,=r,r",
        [q],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _step(codes, scales, x_low, x_high, acc, BN: tl.constexpr):
    """One K block of one operand: ``acc + decode(codes) @ x``."""
    q = tl.load(codes)
    # Words, not bytes: asynchronous copies move four bytes at least, and a load that is not one stalls every step.
    sf_low = _scales(tl.load(scales))
    sf_high = _scales(tl.load(scales + 1))
    low = _low_fields(q) * tl.broadcast_to(sf_low[:, :, None], (BN, _GROUPS, 16)).reshape(BN, _HALF)
    high = _high_fields(q) * tl.broadcast_to(sf_high[:, :, None], (BN, _GROUPS, 16)).reshape(BN, _HALF)
    acc = tl.dot(low, x_low, acc)
    return tl.dot(high, x_high, acc)


@triton.jit
def _grouped_gemm(
    x,  # bf16 [rows, K]
    x_scale,  # f32 [rows] or unused
    experts,  # u8 [E, expert_bytes]
    gs,  # f32 [E, 2] or [E]
    topk_weights,  # f32 [S] or unused
    row_slot,
    tile_expert,
    num_tiles,
    out,
    K,
    k_blocks,
    N,
    expert_bytes,
    codes_offset,
    scales_offset,
    limit,
    SLOTS_PER_ROW: tl.constexpr,  # slots that share a row of x: top_k, or 1
    GATED: tl.constexpr,  # compute rows n (gate) and n + N (up), and write SwiGLU
    TWO_SCALES: tl.constexpr,  # gs is [E, 2]: gate, then up
    HAS_X_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BN)
    code_row = k_blocks * _HALF  # bytes
    scale_row = k_blocks * 2  # words
    total = tl.load(num_tiles) * n_tiles
    j = tl.arange(0, _HALF)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        row_tile = tile // n_tiles
        expert = tl.load(tile_expert + row_tile)
        slot = tl.load(row_slot + row_tile * BM + tl.arange(0, BM))
        valid = slot >= 0
        x_row = tl.where(valid, slot // SLOTS_PER_ROW, 0)
        n = (tile % n_tiles) * BN + tl.arange(0, BN)
        n_safe = n if EVEN_N else tl.minimum(n, N - 1)
        base = experts + expert.to(tl.int64) * expert_bytes
        codes = base + codes_offset + n_safe[:, None] * code_row + j[None, :]
        scales = (base + scales_offset).to(tl.pointer_type(tl.int32)) + n_safe * scale_row
        x_ptr = x + x_row[None, :].to(tl.int64) * K + j[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        if GATED:
            acc_up = tl.zeros((BN, BM), tl.float32)
        for k in range(0, k_blocks * 128, 128):
            if EVEN_K:
                x_low = tl.load(x_ptr, mask=valid[None, :], other=0.0)
                x_high = tl.load(x_ptr + _HALF, mask=valid[None, :], other=0.0)
            else:
                x_low = tl.load(x_ptr, mask=valid[None, :] & (k + j < K)[:, None], other=0.0)
                x_high = tl.load(x_ptr + _HALF, mask=valid[None, :] & (k + _HALF + j < K)[:, None], other=0.0)
            acc = _step(codes, scales, x_low, x_high, acc, BN)
            if GATED:
                acc_up = _step(codes + N * code_row, scales + N * scale_row, x_low, x_high, acc_up, BN)
            codes += _HALF
            scales += 2
            x_ptr += 128
        mask = valid[None, :] if EVEN_N else valid[None, :] & (n < N)[:, None]
        acc *= _UNSCALE
        if HAS_X_SCALE:
            x_gs = tl.load(x_scale + x_row)[None, :]
            acc *= x_gs
        if GATED:
            acc_up *= _UNSCALE
            if HAS_X_SCALE:
                acc_up *= x_gs
            result = silu_product(
                acc * tl.load(gs + 2 * expert), acc_up * tl.load(gs + 2 * expert + 1), limit, HAS_LIMIT
            )
            if HAS_WEIGHT:
                result *= tl.load(topk_weights + tl.where(valid, slot, 0))[None, :]
        elif TWO_SCALES:
            up_half = (n >= N // 2).to(tl.int32)
            result = acc * tl.load(gs + 2 * expert + up_half)[:, None]
        else:
            result = acc * tl.load(gs + expert)
        out_ptr = out + tl.where(valid, slot, 0)[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out_ptr, result.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Matrix:
    """Where one projection of an expert stands in the packed bytes.

    Attributes:
        out_features: rows, gate and up together for the first projection.
        in_features: K, a multiple of 16.
        offset: first byte.
    """

    out_features: int
    in_features: int
    offset: int

    @property
    def padded_k(self) -> int:
        """K, rounded up to :data:`K_BLOCK`."""
        return round_up(self.in_features, K_BLOCK)

    @property
    def scales_offset(self) -> int:
        """First byte of the block scales."""
        return self.offset + self.out_features * self.padded_k // 2

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.scales_offset + self.out_features * self.padded_k // 16


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
    gated: bool = False,
    limit: float | None = None,
    topk_weights: Tensor | None = None,
    multiprocessors: int,
) -> None:
    """Multiply every routed slot's row with its expert's matrix.

    Args:
        x: bf16 ``[rows, K]``, contiguous; slot s reads row ``s // slots_per_row``.
        x_scale: fp32 ``[rows]``, multiplied into that row's results, or None.
        experts: uint8 ``[E, bytes]``.
        matrix: which part of them.
        gs: fp32 ``[E]``, or ``[E, 2]`` for gate and up.
        tiles: the schedule, with row tiles of ``config.block_m``.
        out: ``[S, N]``, written at the slot: bf16 or fp32. With ``gated`` N is half the matrix's rows.
        config: the tiling.
        slots_per_row: see ``x``.
        gated: apply clamped SwiGLU to the two halves.
        limit: of SwiGLU.
        topk_weights: fp32, ``S`` values, multiplied into SwiGLU's result before it is rounded.
        multiprocessors: of the device.
    """
    n = matrix.out_features // 2 if gated else matrix.out_features
    n_tiles = ceil_div(n, config.block_n)
    programs = max(1, min(multiprocessors * config.programs_per_sm, tiles.tile_expert.shape[0] * n_tiles))
    _grouped_gemm[(programs,)](
        x,
        x_scale if x_scale is not None else gs,
        experts,
        gs,
        topk_weights if topk_weights is not None else gs,
        tiles.row_slot,
        tiles.tile_expert,
        tiles.num_tiles,
        out,
        matrix.in_features,
        matrix.padded_k // K_BLOCK,
        n,
        experts.stride(0),
        matrix.offset,
        matrix.scales_offset,
        limit or 0.0,
        SLOTS_PER_ROW=slots_per_row,
        GATED=gated,
        TWO_SCALES=gs.dim() == 2,
        HAS_X_SCALE=x_scale is not None,
        HAS_WEIGHT=topk_weights is not None,
        HAS_LIMIT=limit is not None,
        EVEN_K=matrix.in_features == matrix.padded_k,
        EVEN_N=n % config.block_n == 0,
        BM=config.block_m,
        BN=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
