"""The PTX instructions that the DSL has no words for: bulk copies, packed bf16 arithmetic, register transposes."""

from __future__ import annotations

from cutlass import Float32, Int32, Uint32
from cutlass.cute.arch import inline_ptx


def opaque(value):
    """The same integer, of which the compiler knows nothing: what is made of it is made here, not kept from before."""
    return inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def bulk_load(destination, source, size, barrier):
    """Copy ``size`` contiguous bytes from global to shared memory; ``barrier`` counts them as they arrive."""
    inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[destination, source, Int32(size), barrier],
    )


def load_i32(address):
    """A 32-bit integer in global memory."""
    return inline_ptx("ld.global.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def load_f32(address):
    """A float in global memory."""
    return inline_ptx("ld.global.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[address])


def increment(address):
    """Add one to a 32-bit integer in global memory, atomically: what it was before."""
    return inline_ptx("atom.global.add.u32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[address])


def store_b32(address, value):
    """Four bytes to global memory."""
    inline_ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[address, value])


def store_b64(address, low, high):
    """Eight bytes to global memory."""
    inline_ptx("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, low, high])


def store_f32(address, value):
    """A float to global memory."""
    inline_ptx("st.global.f32 [{$r0}], {$r1};", read_only_args=[address, value])


def shared_word(address):
    """Four bytes of shared memory."""
    return inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])


def shared_quad(address):
    """Sixteen bytes of shared memory, as four words."""
    return inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def shared_store_word(address, word):
    """Four bytes to shared memory."""
    inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, word])


def shared_store_quad(address, words):
    """Four words to shared memory, sixteen bytes."""
    inline_ptx("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])


def shared_store_pair(address, first, second):
    """An integer and a float to shared memory, eight bytes."""
    inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, first, second])


def shared_pair(address):
    """What :func:`shared_store_pair` stored."""
    return inline_ptx(
        "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Int32, Float32], read_only_args=[address]
    )


def load_matrices(address):
    """Four 8x8 matrices of 16-bit values from shared memory, two values of each a lane.

    Lane ``8 i + r`` gives the address of row r of matrix i; lane l receives values ``2 (l % 4)`` and the next of row
    ``l // 4`` of each.
    """
    return inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def mma_16x8x16(acc, a, b):
    """``acc + a b`` of a warp: four floats, four registers of A (16 x 16 bf16) and two of B (16 x 8)."""
    return inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *acc],
    )


def permute(word, selector):
    """Bytes of a word by PRMT's selector; 4 to 7 are zero."""
    return inline_ptx(
        "prmt.b32 {$w0}, {$r0}, 0, {$r1};", write_only_types=[Uint32], read_only_args=[word, Uint32(selector)]
    )


def permute_two(low, high, selector):
    """Bytes of two words by PRMT's selector: 0 to 3 are the first one's."""
    return inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[low, high, Uint32(selector)]
    )


def larger_u16x2(a, b):
    """The larger ones of two times two 16-bit integers without signs."""
    return inline_ptx("max.u16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def lesser_bf16x2(a, b):
    """The smaller ones of two times two bf16; of a NaN and a number the number."""
    return inline_ptx("min.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def multiply_bf16x2(a, b):
    """Two bf16 products; subnormals are kept."""
    return inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def multiply_by_lane(a, b, lane):
    """Both bf16 of ``a`` times one of ``b``: 0 is its low half, 1 its high one."""
    both = "{h, h}" if lane else "{l, l}"
    return inline_ptx(
        "{ .reg .b16 l, h; .reg .b32 d; mov.b32 {l, h}, {$r1}; "
        f"mov.b32 d, {both}; "
        "mul.rn.bf16x2 {$w0}, {$r0}, d; }",
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


def scale_bf16x2(a, constant):
    """Both lanes times a constant, which PTX wants in a register here."""
    return inline_ptx(
        f"{{ .reg .b32 c; mov.b32 c, {constant:#x}; mul.rn.bf16x2 {{$w0}}, {{$r0}}, c; }}",
        write_only_types=[Uint32],
        read_only_args=[a],
    )


def rotate_right(word, bits):
    """A rotation."""
    return inline_ptx(
        "shf.r.wrap.b32 {$w0}, {$r0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[word, Uint32(bits)]
    )


def pack_bf16x2(low, high):
    """Two floats, each rounded to bf16 once."""
    return inline_ptx("cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high])


def transpose_8x8(word):
    """An 8x8 matrix of 16-bit values held by a warp, two of a row a lane, transposed."""
    return inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[word]
    )


def reciprocal(value):
    """``1 / value`` to one ulp; results below 2^-126 are zero."""
    return inline_ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def exponential2(value):
    """``2^value`` to two ulp."""
    return inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def minimum(a, b):
    """The smaller one; a NaN in either is the result."""
    return inline_ptx("min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def maximum(a, b):
    """The larger one; a NaN in either is the result."""
    return inline_ptx("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def store_b8(address, value):
    """The lowest byte of a word to global memory."""
    inline_ptx(
        "{ .reg .b16 b; cvt.u16.u32 b, {$r1}; st.global.b8 [{$r0}], b; }", read_only_args=[address, Uint32(value)]
    )


def store_words(address, words):
    """2, 4 or 8 words to global memory at once; 8 take sm_100, and the address is a multiple of their size."""
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(len(words)))
    inline_ptx(f"st.global.v{len(words)}.b32 [{{$r0}}], {{{names}}};", read_only_args=[address, *words])


def divide(a, b):
    """``a / b``, rounded to nearest."""
    return inline_ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def fused(a, b, c):
    """``a * b + c``, rounded once."""
    return inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def lesser(a, b):
    """The smaller one; of a NaN and a number the number."""
    return inline_ptx("min.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


def e4m3_byte(value):
    """The nearest e4m3 number, ties to even, saturating at 448; a NaN is 0x7F."""
    return inline_ptx(
        "{ .reg .b16 p; cvt.rn.satfinite.e4m3x2.f32 p, 0f00000000, {$r0}; cvt.u32.u16 {$w0}, p; }",
        write_only_types=[Uint32],
        read_only_args=[value],
    )


def e4m3_value(byte):
    """Of the lowest byte of a word."""
    return inline_ptx(
        "{ .reg .b16 p, h; .reg .b32 d; cvt.u16.u32 p, {$r0}; cvt.rn.f16x2.e4m3x2 d, p; cvt.u16.u32 h, d; "
        "cvt.f32.f16 {$w0}, h; }",
        write_only_types=[Float32],
        read_only_args=[byte],
    )


def tmem_columns(address, count):
    """``count`` consecutive fp32 columns of the calling thread's lane of tensor memory: 32, loaded and waited for.

    One instruction sequence, so that nothing can use the registers before they are there.
    """
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    return inline_ptx(
        f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {{{names}}}, [{{$r0}}]; tcgen05.wait::ld.sync.aligned;",
        write_only_types=[Float32] * count,
        read_only_args=[address],
    )


def tmem_fence_before():
    """What this thread did to tensor memory comes before what it signals from here on."""
    inline_ptx("tcgen05.fence::before_thread_sync;")


def tmem_fence_after():
    """What this thread does to tensor memory from here on comes after what it waited for."""
    inline_ptx("tcgen05.fence::after_thread_sync;")
