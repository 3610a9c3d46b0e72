"""The quantizing and swizzling kernels compile for every architecture, load wide and spill nothing; no GPU needed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from dsv4.errors import InputError
from dsv4.kernels.triton import quantize, swizzle
from kernels.offline import Launch, recorded, sass

K = 4096


def launches(rows: int, dtype: torch.dtype) -> list[Launch]:
    """One of each kind."""
    x, interleaved = torch.empty(rows, K, dtype=dtype), torch.empty(rows, 2 * K, dtype=dtype)
    one, many = torch.ones(()), torch.ones(rows, 1)
    fp4, sf = torch.empty(rows, K // 2, dtype=torch.uint8), torch.empty(rows, K // 16, dtype=torch.uint8)
    swizzled = torch.empty(1024 * K // 16, dtype=torch.uint8)
    with recorded() as found:
        quantize.amax_quantize(x, fp4, sf, torch.empty(1))
        quantize.quantize(x, many, fp4, sf)
        quantize.quantize(interleaved, one, fp4, sf, interleaved=True)
        quantize.quantize_swizzled(x, many, None, fp4, swizzled)
        quantize.quantize_swizzled(x, torch.ones(256), torch.zeros(256, dtype=torch.int32), fp4, swizzled)
        swizzle.swizzle(sf, torch.empty(-(-rows // 128) * 128 * K // 16, dtype=torch.uint8))
    return found


@pytest.mark.parametrize(
    ("arch", "rows", "dtype"),
    [(80, 4, torch.bfloat16), (90, 8192, torch.float32), (100, 8192, torch.bfloat16)],
    ids=str,
)
def test_no_kernel_spills(arch, rows, dtype, tmp_path):
    """No local memory, subnormals kept, no float8 conversion (none exists before sm_89); 16-byte loads of a row."""
    found = launches(rows, dtype)
    assert [launch.kernel.__name__ for launch in found] == [
        "_amax", "_quantize", "_quantize", "_quantize", "_quantize_swizzled", "_quantize_swizzled", "_swizzle",
    ]  # fmt: skip
    for launch in found:
        compiled = launch.compile(arch)
        ptx = compiled.asm["ptx"]
        ops = Counter(sass(compiled.asm["cubin"], tmp_path))
        assert ops["LDL"] == ops["STL"] == 0, (launch.kernel.__name__, dict(ops))
        assert ".ftz" not in ptx
        assert "e4m3" not in ptx
        if launch.kernel.__name__ != "_swizzle" and not launch.arguments.get("INTERLEAVED"):
            assert "ld.global.v4.b32" in ptx, launch.kernel.__name__


def specializations(rows: int) -> set[tuple]:
    """What tells the compiled kernels of :func:`launches` apart."""
    return {
        (
            launch.kernel.__name__,
            *(
                (p.name, launch.arguments[p.name] if p.is_constexpr else launch.arguments[p.name] % 16 == 0)
                for p in launch.kernel.params
                if p.is_constexpr or (isinstance(launch.arguments[p.name], int) and not p.do_not_specialize)
            ),
        )
        for launch in launches(rows, torch.bfloat16)
    }


def test_shapes_that_differ_in_rows_share_a_kernel():
    """Up to 2^16 blocks, and above, any number of rows is served by the same compiled kernels."""
    few = [specializations(rows) for rows in (2, 3, 16, 130, 256)]
    many = [specializations(rows) for rows in (257, 1000, 1024)]
    assert all(kernels == few[0] for kernels in few)
    assert all(kernels == many[0] for kernels in many)
    assert len(few[0] | many[0]) - len(few[0]) == 3  # those of _quantize


def test_codes_at_an_odd_address_are_refused():
    """Words of codes cannot be stored there: an error, not a fault on the device."""
    fp4 = torch.empty(2 * 8 + 4, dtype=torch.uint8)[1:17].view(2, 8)
    with recorded() as found, pytest.raises(InputError, match="words of 4 bytes"):
        quantize.quantize_swizzled(torch.zeros(2, 16), torch.ones(()), None, fp4, torch.empty(512, dtype=torch.uint8))
    assert not found


def test_too_many_blocks_are_refused():
    """Blocks are counted in 32 bits: more are refused before anything is launched."""
    x, fp4, sf = (torch.empty(2**17, n, device="meta", dtype=torch.uint8) for n in (2**18, 2**17, 2**14))
    with recorded() as found, pytest.raises(InputError, match="131072 rows of 16384"):
        quantize.quantize(x.to(torch.bfloat16), torch.ones(()), fp4, sf)
    assert not found
