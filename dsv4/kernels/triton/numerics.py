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
    """fp32 magnitudes -> the nearest e2m1 magnitude as fp32, ties to even, saturating at 6. By integers, as above."""
    bits = a.to(tl.uint32, bitcast=True)
    above_one = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) & 0xFFC00000).to(tl.float32, bitcast=True)
    below_one = (a + 4194304.0) - 4194304.0  # where fp32's own steps are 0.5
    return tl.minimum(tl.where(a < 1.0, below_one, above_one), 6.0)


@triton.jit
def divide_by(x, divisor, reciprocal):
    """``x / divisor``, rounded to nearest, where ``reciprocal`` is ``1 / divisor`` rounded to nearest.

    One correction of the product by its exact remainder. Source: Markstein, "Computation of elementary functions on the
    IBM RISC System/6000 processor", theorem 8.3.
    """
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)


@triton.jit
def quantize_block(x, gs):
    """Quantize ``x [rows, blocks, 16]`` fp32 under ``gs`` (broadcastable against ``[rows, blocks]``).

    Returns:
        ``e2m1 * sf`` in fp32, NaN for a non-finite block.
    """
    a = tl.abs(x)
    nonfinite = ((a.to(tl.uint32, bitcast=True)) >= 0x7F800000).to(tl.int32)
    bad = tl.max(nonfinite, axis=2) > 0
    amax = tl.max(tl.where(nonfinite > 0, 0.0, a), axis=2)
    wanted = tl.minimum(tl.div_rn(tl.div_rn(amax, 6.0), gs), 448.0)
    sf = round_e4m3(wanted)
    step = sf * gs
    usable = (step > 0) & (step < float("inf")) & (bad == 0)
    divisor = tl.where(usable, step, 1.0)
    reciprocal = tl.div_rn(1.0, divisor)
    magnitude = round_e2m1(divide_by(a, divisor[:, :, None], reciprocal[:, :, None]))
    # A block that keeps no codes is zero, or NaN. Finite numbers times zero keep their sign, and it does not matter.
    factor = tl.where(bad, float("nan"), tl.where(usable, sf, 0.0))
    value = magnitude * factor[:, :, None]
    return tl.where(x < 0, -value, value)


@triton.jit
def silu_product(gate, up, limit, HAS_LIMIT: tl.constexpr):
    """Clamped SwiGLU in fp32. Comparisons that are false for NaN let it through."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    return tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
