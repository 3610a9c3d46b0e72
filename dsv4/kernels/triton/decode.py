"""From packed words to the tensor cores' left operand, in registers: see :mod:`dsv4.kernels.triton.weight_layout`.

Decoding is exact. The three magnitude bits of a code, put where bf16 has the low bits of its exponent and the high bit
of its mantissa, read as ``value * 2^-126`` (0.5 as a subnormal). The bits of an e4m3 scale, shifted by four, read as
``value * 2^-120``; two exact multiplications turn it into ``value * 2^117``. Their product is ``e2m1 * sf * 2^-9``,
with at most 5 significant bits; :data:`UNSCALE` takes the factor out again, with the global scales. No scale is assumed
to be normal.

The layouts below say which bits of an index a register, a lane and a warp stand for. They agree with each other and
with the operand's own layout, so that no step moves a number between threads: ``assert_trivial`` holds the compiler to
that.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

UNSCALE = gl.constexpr(512.0)
"""2^9, what decoding leaves out."""


@gluon.constexpr_function
def _bits(unit, count, rank=1):
    """The bits of an index along the first dimension that tell ``count`` parts of ``unit`` apart."""
    return [[unit << bit] + [0] * (rank - 1) for bit in range(count.bit_length() - 1)]


@gluon.constexpr_function
def grouped_layout(warps, repeat):
    """The left operand as ``[outputs, group, 16]``."""
    registers = [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 1, 0], [0, 2, 0], *_bits(16 * warps, repeat, 3)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _bits(16, warps, 3), [], [16 * warps * repeat, 4, 16])


@gluon.constexpr_function
def code_layout(warps, repeat):
    """A tile's code bytes: 16 in a row for each thread, of both pieces."""
    registers = [[1], [2], [4], [8], [512], *_bits(1024 * warps, repeat)]
    lanes = [[16], [32], [64], [128], [256]]
    return gl.DistributedLinearLayout(registers, lanes, _bits(1024, warps), [], [1024 * warps * repeat])


@gluon.constexpr_function
def scale_layout(warps, repeat):
    """A tile's scale bytes: 16 in a row, the same for four neighbouring lanes."""
    registers = [[1], [2], [4], [8], *_bits(128 * warps, repeat)]
    lanes = [[0], [0], [16], [32], [64]]
    return gl.DistributedLinearLayout(registers, lanes, _bits(128, warps), [], [128 * warps * repeat])


@gluon.jit
def low_fields(q):
    """Bytes of packed words -> their low codes as bf16, times 2^-126."""
    return gl.inline_asm_elementwise(
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
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def high_fields(q):
    """The same for the high codes."""
    return gl.inline_asm_elementwise(
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
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _scale_fields(q):
    """Bytes of four e4m3 scales, the middle two exchanged -> bf16 in order, times 2^-120. A sign is dropped: it can
    only be that of a zero."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 r;
        shl.b32 r, $2, 4;
        and.b32 $0, r, 0x07F007F0;
        shr.u32 r, $2, 4;
        and.b32 $1, r, 0x07F007F0;
        }
        """,
        "=r,=r,r",
        [q],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def block_scales(q, GROUPED: gl.constexpr, BN: gl.constexpr):
    """A tile's scale bytes -> ``(low, high)``, bf16 ``[BN, 4]`` times 2^117, of the two halves of a chunk."""
    sf = _scale_fields(q)
    # Two steps: 2^237 is no bf16 number.
    sf *= gl.full_like(sf, 2.0**120)
    sf *= gl.full_like(sf, 2.0**117)
    sf = sf.reshape([BN // 16, 8, 2, 2, 4]).permute([0, 2, 1, 4, 3]).reshape([BN, 4, 2])
    low, high = gl.split(sf)
    low = gl.convert_layout(low, gl.SliceLayout(2, GROUPED), assert_trivial=True)
    return low, gl.convert_layout(high, gl.SliceLayout(2, GROUPED), assert_trivial=True)


@gluon.jit
def scaled(fields, scale, GROUPED: gl.constexpr, A: gl.constexpr, BN: gl.constexpr):
    """Half a chunk's codes times its scales ``[BN, 4]``: the left operand ``[BN, 64]``."""
    f = fields.reshape([BN // 16, 2, 8, 4, 2, 2, 2, 2])  # strip, piece, g, c, 16s, 8s, row, K parity
    f = f.permute([0, 6, 2, 1, 4, 5, 3, 7]).reshape([BN, 4, 16])
    f = gl.convert_layout(f, GROUPED, assert_trivial=True) * gl.expand_dims(scale, 2)
    return gl.convert_layout(f.reshape([BN, 64]), A, assert_trivial=True)
