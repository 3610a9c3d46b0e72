"""NVFP4's numbers as Triton functions: the twins of :mod:`dsv4.nvfp4`, bit for bit; and SwiGLU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def global_scale(amax):
    """``amax / 2688``, or 1 where that is below 2^-100."""
    gs = tl.div_rn(amax, 2688.0)
    return tl.where(gs >= 2.0**-100, gs, 1.0)


@triton.jit
def round_e4m3(x):
    """fp32 in [0, 448] -> the nearest e4m3 value, ties to even, as fp32.

    By integers, since e4m3 has no conversion instruction before sm_89. Adding half a step (less one, plus the kept
    bit) to the bits of an fp32 number and cutting the rest rounds its mantissa to nearest even, exponent carry
    included. Below 2^-6 steps are 2^-9, and adding 2^14 aligns fp32's own last bit with that step.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    normal = rounded.to(tl.float32, bitcast=True)
    subnormal = (x + 16384.0) - 16384.0
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def round_e2m1(a):
    """fp32 magnitudes -> the nearest e2m1 magnitude as fp32, ties to even, saturating at 6.

    Steps are half the power of two below the number, 0.5 at least. Added to 2^22 times that power, fp32's own last bit
    is one step, and the sum is rounded to it.
    """
    a = tl.minimum(a, 6.0)
    power = tl.maximum(a.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    aligned = (power + (22 << 23)).to(tl.float32, bitcast=True)
    return (a + aligned) - aligned


@triton.jit
def divide_by(x, divisor, reciprocal):
    """``x / divisor``, rounded to nearest, where ``reciprocal`` is ``1 / divisor`` rounded to nearest.

    One correction of the product by its exact remainder. Source: Markstein, "Computation of elementary functions on the
    IBM RISC System/6000 processor", theorem 8.3.
    """
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """``max |x|`` along an axis; NaN where there is one."""
    return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def block_scale(amax, gs):
    """The e4m3 scale of blocks whose :func:`largest_magnitude` is ``amax``, under ``gs``: fp32, NaN if not finite."""
    wanted = tl.div_rn(tl.div_rn(amax, 6.0), gs)
    sf = round_e4m3(tl.minimum(wanted, 448.0))
    return tl.where((amax < float("inf")) & (wanted == wanted), sf, float("nan"))


@triton.jit
def _divisor_and_factor(sf, gs):
    """See :func:`block_scales`: of a block scale, NaN if its block is not finite."""
    step = sf * gs
    usable = (step > 0) & (step < float("inf"))
    return tl.where(usable, step, 1.0), tl.where(usable | (sf != sf), sf, 0.0)


@triton.jit
def block_scales(amax, gs):
    """What a block whose :func:`largest_magnitude` is ``amax`` is quantized with under ``gs``, of any shape.

    Returns:
        ``(divisor, reciprocal, factor)``: codes are magnitudes over ``divisor``, whose reciprocal stands beside it, and
        are decoded by ``factor``: the block scale, 0 for a block that keeps no codes, NaN for a non-finite one.
    """
    divisor, factor = _divisor_and_factor(block_scale(amax, gs), gs)
    return divisor, tl.div_rn(1.0, divisor), factor


@triton.jit
def block_terms(amax, gs):
    """:func:`block_scales` by products alone, for bf16 magnitudes and global scales of at least 2^-92 or from data.

    What :func:`dsv4.kernels.cutedsl.epilogue.block_terms` does; a ``div.rn`` takes 20 instructions and a branch. Under
    smaller scales :func:`divide_by` meets subnormal remainders; those that go wrong (all bits of the mantissa set, none
    above 2^-93) are a 2688th of no bf16 number, so that data does not make them.
    """
    reciprocal_gs = tl.div_rn(1.0, gs)
    sixth = divide_by(amax, 6.0, 1 / 6)
    # What is far above e4m3's largest number is not divided exactly: its first quotient may be infinite.
    wanted = tl.minimum(sixth * reciprocal_gs, 512.0)
    wanted = tl.fma(tl.fma(-wanted, gs, sixth), reciprocal_gs, wanted)
    sf = tl.where(amax < float("inf"), round_e4m3(tl.minimum(wanted, 448.0)), float("nan"))
    divisor, factor = _divisor_and_factor(sf, gs)
    # The instructions of rcp.rn for normal numbers: ``/`` is an approximation, mended by one step of Newton's.
    guess = 1.0 / divisor
    return divisor, tl.fma(tl.fma(-divisor, guess, 1.0), guess, guess), factor


@triton.jit
def quantize_values(x, divisor, reciprocal, factor):
    """``e2m1 * sf`` in fp32 of values under their block's :func:`block_scales` or :func:`block_terms`, broadcastable
    against ``x``.

    For bf16 values and global scales of at least 2^-92, or of at least 2^-100 and from data: under others the remainder
    in :func:`divide_by` is subnormal, and a value next to a midpoint may take the other code.
    """
    value = round_e2m1(divide_by(tl.abs(x), divisor, reciprocal)) * factor
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (value.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def quantize_block(x, gs):
    """Quantize ``x [rows, blocks, 16]`` fp32 under ``gs`` (broadcastable against ``[rows, blocks]``).

    Returns:
        ``e2m1 * sf`` in fp32, NaN for a non-finite block.
    """
    divisor, reciprocal, factor = block_scales(largest_magnitude(x, 2), gs)
    return quantize_values(x, divisor[:, :, None], reciprocal[:, :, None], factor[:, :, None])


@triton.jit
def e4m3_byte(x):
    """fp32 that is a non-negative e4m3 value -> its byte, uint32.

    Scaled by 2^-120, e4m3's numbers begin where fp32's do, subnormals included: the bits only have to be moved.
    """
    return (x * 2.0**-120).to(tl.uint32, bitcast=True) >> 20


@triton.jit
def e2m1_code(magnitude):
    """fp32 that is an e2m1 magnitude -> its code 0-7, uint32, in the way of :func:`e4m3_byte`."""
    return (magnitude * 2.0**-126).to(tl.uint32, bitcast=True) >> 22


@triton.jit
def encode_blocks(x, gs):
    """Quantize ``x [rows, blocks, 16]`` fp32 under ``gs >= 0``, broadcastable against ``[rows, blocks]``.

    Returns:
        ``(words, sf)``: uint32 ``[rows, blocks, 2]``, eight codes each, the lowest K index in the lowest nibble; and
        e4m3 bytes, uint8 ``[rows, blocks]``.
    """
    amax = largest_magnitude(x, 2)
    sf = block_scale(amax, gs)
    divisor, reciprocal, factor = block_scales(amax, gs)
    if tl.min(tl.min(divisor, axis=1), axis=0) < 2.0**-85:  # divide_by's remainder would be subnormal, and rounded
        quotient = tl.div_rn(tl.abs(x), divisor[:, :, None])
    else:
        quotient = divide_by(tl.abs(x), divisor[:, :, None], reciprocal[:, :, None])
    codes = e2m1_code(round_e2m1(quotient)) | ((x.to(tl.uint32, bitcast=True) >> 28) & 8)
    shifts = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, None, :]
    words = tl.sum(tl.reshape(codes, (x.shape[0], x.shape[1], 2, 8)) << shifts, axis=3)
    words = tl.where((factor > 0)[:, :, None], words, 0)  # no codes without a scale, nor under a NaN
    return words.to(tl.uint32), tl.where(sf == sf, e4m3_byte(sf), 0x7F).to(tl.uint8)


@triton.jit
def silu_product(gate, up, limit, HAS_LIMIT: tl.constexpr):
    """Clamped SwiGLU in fp32. Comparisons that are false for NaN let it through."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
