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
    magnitude = ptx.lesser(magnitude, 6.0)
    power = cutlass.max(magnitude.bitcast(Int32) & Int32(0x7F800000), Int32(0x3F800000))
    aligned = (power + Int32(22 << 23)).bitcast(Float32)
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
