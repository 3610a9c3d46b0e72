"""Layouts: every rearrangement against a loop over explicit indices, which is its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4.errors import InputError
from dsv4.ops.layouts import (
    Swizzle32x4x4,
    assemble_raw_scales_2d3d_3d_side,
    assemble_scales_3d_side,
    ceil_div,
    deinterleave_l1_weights,
    gate_groups,
    interleave_l1_weights,
    make_b_k_major,
    pad_and_swizzle_single,
    round_up,
    swizzle_32_4_4,
    up_groups,
)

# Rows and columns around the tile of 128 x 4.
SHAPES = [(1, 1), (3, 5), (32, 4), (127, 3), (128, 4), (129, 8), (260, 9)]
ONE_BYTE = [torch.uint8, torch.float8_e4m3fn]


def random_scales(rows: int, cols: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> torch.Tensor:
    """Bytes 1-255: none is zero, so that padding shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (rows, cols), generator=generator, dtype=torch.uint8).view(dtype)


def place(row: int, col: int, cols: int) -> int:
    """Where (row, col) stands: tiles of 128 x 4, 512 bytes each, row by row; inside, the documented formula."""
    tiles_across = (cols + 3) // 4
    tile = row // 128 * tiles_across + col // 4
    r, c = row % 128, col % 4
    return tile * 512 + (r % 32) * 16 + (r // 32) * 4 + c


def swizzled(sf: torch.Tensor) -> list[int]:
    """The swizzled buffer as a list of bytes, made one by one, padding zero."""
    rows, cols = sf.shape
    out = [0] * ((rows + 127) // 128 * 128 * ((cols + 3) // 4 * 4))
    for row, values in enumerate(sf.view(torch.uint8).tolist()):
        for col, value in enumerate(values):
            out[place(row, col, cols)] = value
    return out


def as_bytes(t: torch.Tensor) -> list[int]:
    return t.view(torch.uint8).tolist()


# Integers.


@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_ceil_div_and_round_up(a, b):
    """The least q with q * b >= a, exact where floats would round; and that multiple itself."""
    q = ceil_div(a, b)
    assert q * b >= a > (q - 1) * b
    assert round_up(a, b) == q * b


# The swizzle.


@pytest.mark.parametrize("dtype", ONE_BYTE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swizzle_by_the_formula(device, shape, dtype):
    """Every byte is where the formula says, every other one is zero; flat, of the same dtype."""
    sf = random_scales(*shape, dtype)
    for function in (pad_and_swizzle_single, swizzle_32_4_4, Swizzle32x4x4(*shape).swizzle):
        flat = function(sf.to(device))
        assert (flat.dtype, flat.dim()) == (dtype, 1)
        assert as_bytes(flat) == swizzled(sf)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_swizzle_any_shape(rows, cols, seed):
    """Size, positions, offsets, zero padding and the inverse for any shape."""
    sf = random_scales(rows, cols, seed=seed)
    layout = Swizzle32x4x4(rows, cols)
    flat = layout.swizzle(sf)
    assert flat.numel() == layout.numel == round_up(rows, 128) * round_up(cols, 4)
    assert as_bytes(flat) == swizzled(sf)
    assert torch.equal(layout.unswizzle(flat), sf)
    row, col = seed % rows, seed % cols
    assert layout.offset(row, col) == place(row, col, cols)


def test_first_bytes_of_a_tile():
    """The example of the documentation: (0,0) (0,1) (0,2) (0,3) (32,0) (32,1) ... (96,3) (1,0)."""
    row = torch.arange(128, dtype=torch.uint8).unsqueeze(1).expand(128, 4)
    col = torch.arange(4, dtype=torch.uint8).expand(128, 4)
    first_rows, first_cols = (as_bytes(pad_and_swizzle_single(t))[:17] for t in (row, col))
    assert first_rows == [0] * 4 + [32] * 4 + [64] * 4 + [96] * 4 + [1]
    assert first_cols == [0, 1, 2, 3] * 4 + [0]


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_unswizzle(device, dtype):
    """The inverse drops the padding, whatever stands in it, and takes a buffer of any shape."""
    sf = random_scales(130, 6, dtype)
    layout = Swizzle32x4x4(130, 6)
    flat = layout.swizzle(sf.to(device)).view(torch.uint8)
    flat[flat == 0] = 0x55
    back = layout.unswizzle(flat.view(dtype).view(256, 8))
    assert (back.dtype, back.shape) == (dtype, (130, 6))
    assert torch.equal(back.view(torch.uint8).cpu(), sf.view(torch.uint8))


def test_swizzle_of_strided_scales():
    """A transposed view is read by its indices, not by its memory."""
    sf = random_scales(6, 130).t()
    assert as_bytes(pad_and_swizzle_single(sf)) == swizzled(sf.contiguous())


def test_swizzle_of_nothing():
    """No rows: an empty buffer, and an empty matrix back."""
    layout = Swizzle32x4x4(0, 4)
    flat = layout.swizzle(torch.empty(0, 4, dtype=torch.uint8))
    assert flat.shape == (0,)
    assert layout.unswizzle(flat).shape == (0, 4)


@pytest.mark.parametrize("dtype", ONE_BYTE)
@pytest.mark.parametrize("out_shape", [(256 * 8,), (256, 8), (2, 128, 8)], ids=str)
def test_swizzle_into_out(device, dtype, out_shape):
    """``out`` of any shape is filled and returned: padding too, over whatever stood there."""
    sf = random_scales(130, 6, dtype)
    out = torch.full(out_shape, 0x77, dtype=torch.uint8, device=device).view(dtype)
    assert swizzle_32_4_4(sf.to(device), out=out) is out
    assert as_bytes(out.view(-1)) == swizzled(sf)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(256 * 8 - 1, dtype=torch.uint8),
        torch.empty(256 * 8, dtype=torch.float8_e4m3fn),
        torch.empty(2 * 256 * 8, dtype=torch.uint8)[::2],
    ],
    ids=["size", "dtype", "strided"],
)
def test_swizzle_into_a_bad_out(out):
    """A wrong size or dtype, or gaps, are refused with what is needed."""
    with pytest.raises(InputError, match=r"out must be contiguous torch.uint8 with 2048 elements, found .*\d"):
        swizzle_32_4_4(random_scales(130, 6), out=out)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pad_and_swizzle_single(torch.zeros(4, dtype=torch.uint8)), r"\[N, K_sf\].*\(4,\)"),
        (lambda: swizzle_32_4_4(torch.zeros(2, 4, 4, dtype=torch.uint8)), r"\[N, K_sf\].*\(2, 4, 4\)"),
        (lambda: pad_and_swizzle_single(torch.zeros(4, 4)), "one-byte.*float32"),
        (lambda: Swizzle32x4x4(4, 4).swizzle(torch.zeros(4, 5, dtype=torch.uint8)), r"\[4, 4\].*\(4, 5\)"),
        (lambda: Swizzle32x4x4(4, 4).unswizzle(torch.zeros(16, dtype=torch.uint8)), r"512.*\(16,\)"),
        (lambda: Swizzle32x4x4(4, 4).unswizzle(torch.zeros(512)), "one-byte.*float32"),
    ],
)
def test_bad_scales(call, match):
    """Wrong shapes and dtypes of scales are refused with what was found."""
    with pytest.raises(InputError, match=match):
        call()


# Scales of all experts.


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_assemble_raw_scales(device, dtype):
    """One row an expert, each the swizzle of its ``[N, K_sf]`` scales alone."""
    experts = [random_scales(130, 6, dtype, seed) for seed in range(3)]
    got = assemble_raw_scales_2d3d_3d_side([sf.to(device) for sf in experts])
    assert (got.shape, got.dtype) == ((3, 256 * 8), dtype)
    assert as_bytes(got) == [swizzled(sf) for sf in experts]


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_assemble_scales(device, dtype):
    """The same from scales with K first, ``[K_sf, N]``."""
    experts = [random_scales(6, 130, dtype, seed) for seed in range(3)]
    got = assemble_scales_3d_side([sf.to(device) for sf in experts])
    assert (got.shape, got.dtype) == ((3, 256 * 8), dtype)
    assert as_bytes(got) == [swizzled(sf.t().contiguous()) for sf in experts]


@pytest.mark.parametrize("function", [assemble_scales_3d_side, assemble_raw_scales_2d3d_3d_side])
def test_assemble_nothing(function):
    """No expert is an error that says so."""
    with pytest.raises(InputError, match="at least one expert"):
        function([])


# K-major weights.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8, 3), (4, 24, 10), (2, 1, 1)], ids=str)
def test_make_b_k_major(device, shape, dtype):
    """Same shape and values, stride 1 along K, each expert's matrix dense and contiguous in itself."""
    e, k, n = shape
    b = torch.arange(e * k * n, device=device).view(shape).to(dtype)
    got = make_b_k_major(b)
    assert torch.equal(got, b)
    assert got.shape == shape
    assert got.stride() == (k * n, 1, k)


def test_make_b_k_major_wants_three_dimensions():
    """A matrix is refused."""
    with pytest.raises(InputError, match=r"\[E, K/2, N\].*\(4, 4\)"):
        make_b_k_major(torch.zeros(4, 4))


# Interleaved gate and up.


def interleaved_order(width: int, granularity: int) -> list[int]:
    """Which column of ``[gate | up]`` stands at each place: [g * granularity, u * granularity, ...]."""
    half = width // 2
    order: list[int] = []
    for start in range(0, half, granularity):
        order += range(start, start + granularity)
        order += range(half + start, half + start + granularity)
    return order


def test_interleaved_order_by_hand():
    """Eight gates and eight ups in groups of four."""
    got = interleave_l1_weights(torch.arange(16)).tolist()
    assert got == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([(), (3,), (2, 3)]))
def test_interleave_and_its_inverse(groups, granularity, leading):
    """The documented order, for any granularity and leading dimensions; deinterleaving and the halves agree with it."""
    width = 2 * groups * granularity
    w = torch.arange(width) + 1000 * torch.arange(6)[: torch.Size(leading).numel()].view(*leading, 1)
    got = interleave_l1_weights(w, granularity)
    assert torch.equal(got, w[..., interleaved_order(width, granularity)])
    assert torch.equal(deinterleave_l1_weights(got, granularity), w)
    assert torch.equal(gate_groups(got, granularity), w[..., : width // 2])
    assert torch.equal(up_groups(got, granularity), w[..., width // 2 :])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16])
def test_interleave_every_dtype(device, dtype):
    """Codes and scales of weights are moved like values, bit by bit, by the default granularity of 4."""
    w = random_scales(5, 48).to(device).view(dtype)
    width = w.shape[1]
    got = interleave_l1_weights(w)
    order = interleaved_order(width, 4)
    assert [as_bytes(got[:, i].contiguous()) for i in range(width)] == [as_bytes(w[:, i].contiguous()) for i in order]
    assert torch.equal(deinterleave_l1_weights(got).view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize("function", [interleave_l1_weights, deinterleave_l1_weights, gate_groups, up_groups])
@pytest.mark.parametrize(("width", "granularity"), [(12, 4), (4, 4), (8, 0), (8, -4)])
def test_widths_that_do_not_divide(function, width, granularity):
    """A width that is no multiple of two groups is refused with both numbers."""
    with pytest.raises(InputError, match=rf"\({width}\).*\({2 * granularity}\)"):
        function(torch.zeros(3, width), granularity)


# On the device, without the host.

CALLS = {
    "pad_and_swizzle_single": pad_and_swizzle_single,
    "swizzle_32_4_4": swizzle_32_4_4,
    "swizzle_32_4_4-out": lambda sf: swizzle_32_4_4(sf, out=sf.new_empty(256 * 8)),
    "unswizzle": lambda sf: Swizzle32x4x4(130, 6).unswizzle(sf.new_zeros(256 * 8)),
    "make_b_k_major": lambda sf: make_b_k_major(sf.unsqueeze(0)),
    "interleave": lambda sf: interleave_l1_weights(sf.t()[:, :128]),
    "deinterleave": lambda sf: deinterleave_l1_weights(sf.t()[:, :128]),
    "gate_groups": lambda sf: gate_groups(sf.t()[:, :128]),
    "assemble_scales": lambda sf: assemble_scales_3d_side([sf, sf]),
    "assemble_raw_scales": lambda sf: assemble_raw_scales_2d3d_3d_side([sf, sf]),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(no_host_sync, device, name):
    """No value is read by the host, no shape depends on values."""
    sf = torch.ones(130, 6, dtype=torch.uint8, device=device)
    with no_host_sync():
        CALLS[name](sf)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_values(name):
    """Fake and meta tensors pass through, with the real results' shapes, strides and dtypes."""

    def signature(t):
        return t.shape, t.stride(), t.dtype

    want = signature(CALLS[name](torch.ones(130, 6, dtype=torch.uint8)))
    assert signature(CALLS[name](torch.ones(130, 6, dtype=torch.uint8, device="meta"))) == want
    with FakeTensorMode():
        assert signature(CALLS[name](torch.ones(130, 6, dtype=torch.uint8))) == want
