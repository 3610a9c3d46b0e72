"""The quantizing and swizzling kernels without a GPU: tests of the public functions, run by Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from kernels.interpreter import run

QUANTIZE = "tests/ops/test_quantize.py::"
SWIZZLED = "tests/ops/test_quantize_swizzled.py::"
LAYOUTS = "tests/ops/test_layouts.py::"
TESTS = [
    QUANTIZE + "test_ties[cpu]",
    QUANTIZE + "test_given_scales_at_the_ends_of_fp32",
    QUANTIZE + "test_given_scale[cpu-[M]-(3, 48)-quantize_nvfp4_gpu]",
    QUANTIZE + "test_token_scales_make_rows_independent[cpu]",
    QUANTIZE + "test_views[cpu-dtype1-columns of wider rows]",
    SWIZZLED + "test_one_matrix[cpu-False-4-1088]",
    SWIZZLED + "test_experts[cpu-dtype0-expert-[0, 3, 0, 0, 130, 1, 0]]",
    LAYOUTS + "test_swizzle_by_the_formula[cpu-(129, 8)-dtype1]",
    LAYOUTS + "test_swizzle_into_out",
]


def test_public_functions_on_interpreted_kernels():
    """Bytes of the oracle, places of the formula: the same tests as in plain torch, every kernel launched."""
    run("-m", "pytest", "-p", "kernels.interpreted", "-p", "no:cacheprovider", *TESTS)
