"""NVFP4's numbers as Triton functions: the twins of :mod:`dsv4.nvfp4`, bit for bit."""

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
    """fp32 in [0, 448] -> the nearest e4m3 value, ties to even: ``(value fp32, bits)``.

    By integers, since e4m3 has no conversion instruction before sm_89. Adding half a step (less one, plus the kept
    bit) to the bits of an fp32 number and cutting the rest rounds its mantissa to nearest even, exponent carry
    included. Below 2^-6 steps are 2^-9, and adding 2^14 aligns fp32's own last bit with that step.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    normal = rounded.to(tl.float32, bitcast=True)
    normal_code = (rounded >> 20) - (120 << 3)
    shifted = x + 16384.0
    subnormal = shifted - 16384.0
    subnormal_code = shifted.to(tl.uint32, bitcast=True) & 0xF
    tiny = x < 0.015625
    return tl.where(tiny, subnormal, normal), tl.where(tiny, subnormal_code, normal_code).to(tl.uint8)


@triton.jit
def round_e2m1(x):
    """fp32 -> ``(magnitude fp32, code uint8)`` of the nearest e2m1 value, ties to even, saturating; sign in bit 3."""
    a = tl.abs(x)
    # Each threshold is the midpoint of two neighbours; the even one of them decides between > and >=.
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    half_steps = tl.where(code < 5, code, tl.where(code == 5, 6, tl.where(code == 6, 8, 12)))
    sign = (x.to(tl.uint32, bitcast=True) >> 28) & 8
    return half_steps.to(tl.float32) * 0.5, (code.to(tl.uint32) | sign).to(tl.uint8)


@triton.jit
def quantize_block(x, gs, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Quantize ``x [ROWS, BLOCKS, 16]`` fp32 under ``gs`` (broadcastable against ``[ROWS, BLOCKS]``).

    Returns:
        ``(values, codes, sf, sf_bits)``: ``e2m1 * sf`` fp32 with NaN for a non-finite block, uint8 codes, the scale and
        its bits.
    """
    a = tl.abs(x)
    nonfinite = ((a.to(tl.uint32, bitcast=True)) >= 0x7F800000).to(tl.int32)
    bad = tl.max(nonfinite, axis=2) > 0
    amax = tl.max(tl.where(nonfinite > 0, 0.0, a), axis=2)
    wanted = tl.minimum(tl.div_rn(tl.div_rn(amax, 6.0), gs), 448.0)
    sf, sf_bits = round_e4m3(wanted)
    step = sf * gs
    usable = (step > 0) & (step < float("inf")) & (bad == 0)
    divisor = tl.where(usable, step, 1.0)
    magnitude, codes = round_e2m1(tl.div_rn(x, tl.broadcast_to(divisor[:, :, None], (ROWS, BLOCKS, 16))))
    keep = usable[:, :, None]
    codes = tl.where(keep, codes, 0)
    value = tl.where(keep, magnitude, 0.0) * sf[:, :, None]
    value = tl.where(codes >= 8, -value, value)
    nan = float("nan")
    sf_bits = tl.where(bad, 0x7F, sf_bits.to(tl.int32)).to(tl.uint8)
    return tl.where(bad[:, :, None], nan, value), codes, tl.where(bad, nan, sf), sf_bits
