"""The names that users and other projects import, their parameters, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from dsv4 import Nvfp4MoE

# (module, name) -> leading parameters, in order.
FUNCTIONS = {
    ("dsv4.ops.quantize", "quantize_to_nvfp4"): ["x"],
    ("dsv4.ops.quantize", "quantize_activation_nvfp4"): ["x", "gs"],
    ("dsv4.ops.quantize", "quantize_nvfp4_gpu"): ["x", "gs"],
    ("dsv4.ops.quantize", "quantize_nvfp4_gpu_fused"): ["x"],
    ("dsv4.ops.quantize", "deinterleave_quantize_nvfp4_cuda"): ["x", "intermediate_size", "gs"],
    ("dsv4.ops.quantize", "deinterleave_amax_quantize_nvfp4_fused"): ["x", "intermediate_size"],
    ("dsv4.ops.quantize", "quantize_weight_to_nvfp4"): ["w"],
    ("dsv4.ops.layouts", "ceil_div"): ["a", "b"],
    ("dsv4.ops.layouts", "pad_and_swizzle_single"): ["sf"],
    ("dsv4.ops.layouts", "make_b_k_major"): ["b"],
    ("dsv4.ops.layouts", "interleave_l1_weights"): ["w", "granularity"],
    ("dsv4.ops.layouts", "deinterleave_l1_weights"): ["w", "granularity"],
    ("dsv4.ops.layouts", "assemble_scales_3d_side"): ["scales"],
    ("dsv4.ops.layouts", "assemble_raw_scales_2d3d_3d_side"): ["scales"],
    ("dsv4.ops.layouts", "swizzle_32_4_4"): ["sf", "out"],
    ("dsv4.ops.gemm_runner", "run_nvfp4_grouped_gemm"): [
        "mat_a", "mat_b", "scale_a", "scale_b", "expert_offsets", "global_scale_a", "global_scale_b", "row_scale",
        "out", "out_dtype",
    ],
    ("dsv4.ops.gemm_runner", "run_fused_swiglu_grouped_gemm"): [
        "mat_a", "mat_b", "scale_a", "scale_b", "expert_offsets", "global_scale_a", "global_scale_b", "swiglu_limit",
        "layout",
    ],
    ("dsv4.ops.gemm_runner", "warmup_compilation"): ["num_experts", "k_packed", "n_packed", "device"],
    ("dsv4.ops.gemm_runner", "warmup_fused_swiglu_compilation"): [
        "num_experts", "k_packed", "n_packed", "device", "swiglu_limit",
    ],
    ("dsv4.ops.custom_ops", "register_runner"): ["obj"],
    ("dsv4.ops.custom_ops", "nvfp4_moe_gemm"): ["hidden", "topk_weights", "topk_ids", "runner_id", "hidden_size"],
}  # fmt: skip

METHODS = {
    "__init__": [
        "num_experts", "hidden_size", "intermediate_size", "max_num_tokens", "top_k", "device", "experts_start_idx",
        "backend", "activation_format", "activation_scale", "swiglu_limit", "route_weight", "batch_invariant",
        "expert_map", "workspace", "l1_scale_policy",
    ],
    "set_swiglu_limit": ["limit"],
    "set_fused_swiglu": ["fused"],
    "prepare_weights_from_stacked": [
        "l1_fp4_stacked", "l1_sf_stacked", "l1_gs", "l2_fp4_stacked", "l2_sf_stacked", "l2_gs", "l1_input_scale",
        "l2_input_scale",
    ],
    "prepare_weights_direct": ["l1_fp4", "l1_sf", "l1_gs", "l2_fp4", "l2_sf", "l2_gs"],
    "prepare_weights_from_dequantized": ["l1_weights_bf16", "l2_weights_bf16"],
    "compute_activation_global_scales": ["hidden_states", "topk_weights", "topk_ids"],
    "warmup": ["token_budgets"],
    "run": [
        "hidden_states", "topk_weights", "topk_ids", "expert_indices", "out", "out_dtype", "num_valid_tokens",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_functions(module, name):
    """Every public function takes its documented parameters, in order."""
    parameters = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    expected = FUNCTIONS[module, name]
    assert parameters[: len(expected)] == expected


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    """Every public method of the layer takes its documented parameters, in order, and no others."""
    assert list(inspect.signature(getattr(Nvfp4MoE, name)).parameters) == ["self", *METHODS[name]]


def test_defaults():
    """The documented defaults: W4A4 with static scales on cuda, 8192 tokens, top-8."""
    defaults = {n: p.default for n, p in inspect.signature(Nvfp4MoE).parameters.items()}
    assert defaults["max_num_tokens"] == 8192
    assert defaults["top_k"] == 8
    assert defaults["device"] == "cuda"
    assert defaults["backend"] == "auto"
    assert defaults["activation_format"] == "nvfp4"
    assert defaults["activation_scale"] == "static"
    assert defaults["route_weight"] == "output"


def test_importing_is_light():
    """``import dsv4`` takes under 0.5 s beyond torch, the best of three, and imports no optional or GPU library."""
    script = (
        "import sys, time, torch, safetensors; before = set(sys.modules); start = time.perf_counter(); import dsv4; "
        "print(time.perf_counter() - start); print(*sorted(set(sys.modules) - before))"
    )
    seconds = []
    for _ in range(3):
        answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        first, imported = answer.splitlines()
        seconds.append(float(first))
        roots = {name.partition(".")[0] for name in imported.split()}
        assert not roots & {"transformers", "triton", "cutlass", "vllm", "rich", "typer", "matplotlib", "numpy"}
    assert min(seconds) < 0.5
