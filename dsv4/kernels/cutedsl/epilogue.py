"""What is done to a product's fp32 values before they are written: plain scalar arithmetic, the same on every chip."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Uint32

from dsv4.kernels.cutedsl import ptx

_LOG2E = 1.4426950408889634


def swiglu(gate, up, limit=None):
    """``silu(gate) * up`` in fp32, with the clamps of DeepSeek-V4 (Transformers, ``deepseek_v4``) before it.

    The gate has no lower bound. A NaN in either operand is the result.
    """
    if limit is not None:
        gate = ptx.minimum(gate, limit)
        up = ptx.maximum(ptx.minimum(up, limit), -limit)
    return gate * ptx.reciprocal(1.0 + ptx.exponential2(-_LOG2E * gate)) * up


def round_e2m1(magnitude):
    """fp32 magnitude to the nearest e2m1 magnitude, ties to even, saturating at 6, NaN to 6.

    Steps are half the power of two below the number, 0.5 at least. Added to 2^22 times that power, fp32's own last bit
    is one step, and the sum is rounded to it.
    """
    return _to_step(ptx.lesser(magnitude, 6.0))


def _to_step(magnitude):
    """:func:`round_e2m1` of what is nearer to 6 than to 8."""
    power = magnitude.bitcast(Int32) & Int32(0x7F800000)
    aligned = cutlass.max(power + Int32(22 << 23), Int32((127 + 22) << 23)).bitcast(Float32)
    return (magnitude + aligned) - aligned


def block_scale(amax, gs):
    """The e4m3 byte of a block whose largest magnitude is ``amax``: 0x7F where that is not finite."""
    wanted = ptx.divide(ptx.divide(amax, 6.0), gs)
    byte = ptx.e4m3_byte(wanted)
    return Uint32(cutlass.select_(amax.bitcast(Uint32) < Uint32(0x7F800000), byte, Uint32(0x7F)))


def requantize(values, gs):
    """Quantize one block of 16 values under a global scale: the bytes of :func:`dsv4.nvfp4.quantize_blocks`.

    Args:
        values: 16 fp32 values, exactly bf16's.
        gs: fp32, positive.

    Returns:
        ``(low, high, scale)``: uint32 words of eight codes each, the first in the lowest nibble, and the scale's byte.
    """
    amax = Uint32(0)
    for value in values:  # magnitudes order as their bits do, Inf and NaN above all
        amax = cutlass.max(amax, value.bitcast(Uint32) & Uint32(0x7FFFFFFF))
    scale = block_scale(amax.bitcast(Float32), gs)
    step = ptx.e4m3_value(scale) * gs
    usable = (step > 0.0) & (step < float("inf"))
    # Division by reciprocal and one correction (Markstein 1990, theorem 8.3), whose remainder must not be subnormal: a
    # tiny step and the values under it are first multiplied by a power of two.
    boost = Float32(cutlass.select_(step < 2.0**-85, Float32(2.0**64), Float32(1.0)))
    divisor = Float32(cutlass.select_(usable, step * boost, Float32(1.0)))
    reciprocal = ptx.divide(1.0, divisor)
    words = []
    for half in (values[:8], values[8:]):
        word = Uint32(0)
        for i, value in enumerate(half):
            bits = (value * boost).bitcast(Uint32)
            magnitude = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32)
            quotient = magnitude * reciprocal
            quotient = ptx.fused(ptx.fused(-quotient, divisor, magnitude), reciprocal, quotient)
            # Scaled by 2^-126, e2m1's numbers begin where fp32's do.
            code = (round_e2m1(quotient) * 2.0**-126).bitcast(Uint32) >> 22
            word = word | ((code | ((bits >> 28) & Uint32(8))) << (4 * i))
        words.append(Uint32(cutlass.select_(usable, word, Uint32(0))))
    return words[0], words[1], scale


def divided(value, divisor, reciprocal):
    """``value / divisor``, rounded to nearest, where ``reciprocal`` is ``1 / divisor`` rounded to nearest.

    The twin of :func:`dsv4.kernels.triton.numerics.divide_by`: no branch, unlike ``div.rn``.
    """
    quotient = value * reciprocal
    return ptx.fused(ptx.fused(-quotient, divisor, value), reciprocal, quotient)


def pair_maxima(first, second):
    """Of two words of two bf16 each: the larger magnitude of either, a word of two bf16's bits.

    Magnitudes order as their bits do, Inf and NaN above all.
    """
    low, high = ptx.permute_two(first, second, 0x5410), ptx.permute_two(first, second, 0x7632)
    return ptx.larger_u16x2(low & Uint32(0x7FFF7FFF), high & Uint32(0x7FFF7FFF))


def block_terms(amax, gs, reciprocal_gs):
    """What :func:`quantized_pair` needs to know of a block.

    Without branches, so that several blocks are computed at the same time. Every result is that of
    :func:`dsv4.kernels.triton.numerics.block_terms`.

    Args:
        amax: fp32, the block's largest magnitude, of bf16 values.
        gs: fp32, the global scale: at least 2^-92, or at least 2^-100 and from data (see the Triton twin).
        reciprocal_gs: ``1 / gs``, rounded to nearest.

    Returns:
        Four words: the fp32 divisor and its reciprocal; two equal bf16 each: what saturates, and the block scale, 0
        for a block that keeps no codes and NaN for one that is not finite.
    """
    sixth = divided(amax, Float32(6.0), Float32(1 / 6))
    # What is far above e4m3's largest number is not divided exactly: its first quotient may be infinite.
    wanted = ptx.lesser(sixth * reciprocal_gs, 512.0)
    wanted = ptx.fused(ptx.fused(-wanted, gs, sixth), reciprocal_gs, wanted)
    finite = amax.bitcast(Uint32) < Uint32(0x7F800000)
    byte = Uint32(cutlass.select_(finite, ptx.e4m3_byte(wanted), Uint32(0x7F)))
    scale = ptx.e4m3_value(byte)
    step = scale * gs
    usable = (step > 0.0) & (step < float("inf"))
    divisor = Float32(cutlass.select_(usable, step, Float32(1.0)))
    # As rcp.rn does it for normal numbers.
    guess = ptx.reciprocal(divisor)
    reciprocal = ptx.fused(ptx.fused(-divisor, guess, 1.0), guess, guess)
    kept = cutlass.select_(usable | (byte == Uint32(0x7F)), scale.bitcast(Uint32), Uint32(0))
    largest = divisor * 6.0
    return (
        divisor.bitcast(Uint32),
        reciprocal.bitcast(Uint32),
        ptx.pack_bf16x2(largest, largest),
        ptx.permute(Uint32(kept), 0x3232),
    )


def quantized_pair(word, terms):
    """Quantize two bf16 values of a block and decode them again.

    Args:
        word: the two.
        terms: of their block, see :func:`block_terms`.

    Returns:
        ``e2m1 * sf`` of the two, bf16, as :func:`dsv4.kernels.triton.numerics.quantize_values` has it.
    """
    divisor, reciprocal, largest, scale = terms
    divisor, reciprocal = divisor.bitcast(Float32), reciprocal.bitcast(Float32)
    # Six steps, rounded to bf16, are still nearer to code 6 than to any other.
    pair = ptx.lesser_bf16x2(word & Uint32(0x7FFF7FFF), largest)
    codes = []
    for bits in (pair << 16, pair & Uint32(0xFFFF0000)):
        quotient = divided(bits.bitcast(Float32), divisor, reciprocal)
        codes.append(_to_step(quotient).bitcast(Uint32))
    decoded = ptx.multiply_bf16x2(ptx.permute_two(codes[0], codes[1], 0x7632), scale)
    return decoded | (word & Uint32(0x80008000))
