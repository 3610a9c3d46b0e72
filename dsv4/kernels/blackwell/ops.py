"""The public grouped GEMMs (:mod:`dsv4.ops.gemm_runner`) on Blackwell's tensor cores, by their own contracts.

Compiled, never run. The public functions do not come here by themselves: see docs/blackwell.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.blackwell.config import BlackwellConfig, chosen
from dsv4.kernels.blackwell.launch import Loader, Operands, Requantized, gemm_kernel, grouped_gemm
from dsv4.ops.gemm_runner import Layout, check_limit, resolved_layout


def run_nvfp4_grouped_gemm(
    *,
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    expert_offsets: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: BlackwellConfig | None = None,
    loader: Loader = gemm_kernel,
) -> Tensor:
    """:func:`dsv4.ops.gemm_runner.run_nvfp4_grouped_gemm`.

    Args:
        config: tiles; chosen by the mean number of rows if None. Its flags are set here.
        loader: where kernels come from.

    Raises:
        InputError: a shape, dtype, stride or address does not fit: here K is a multiple of 32, N of 32, or of 64 with
            ``global_scale_b [E, 2]``.
    """
    operands = _operands(mat_a, mat_b, scale_a, scale_b, expert_offsets, global_scale_a, global_scale_b, row_scale)
    rows, columns = mat_a.shape[0], mat_b.shape[2]
    if out is None:
        out = torch.zeros(rows, columns, dtype=out_dtype, device=mat_a.device)
    config = replace(config or _chosen(operands), wide_out=out.dtype == torch.float32, row_scale=row_scale is not None)
    grouped_gemm(config, operands, out, multiprocessors=_multiprocessors(mat_a.device), loader=loader)
    return out


def run_fused_swiglu_grouped_gemm(
    *,
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    expert_offsets: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    swiglu_limit: float = 0.0,
    layout: Layout | None = None,
    row_scale: Tensor | None = None,
    out: Tensor | None = None,
    requantized: Requantized | None = None,
    config: BlackwellConfig | None = None,
    loader: Loader = gemm_kernel,
) -> Tensor:
    """:func:`dsv4.ops.gemm_runner.run_fused_swiglu_grouped_gemm`.

    Args:
        requantized: quantize the results under a scale for each expert: ``out`` then is uint8 codes ``[rows, I/2]``,
            and their block scales go to ``requantized.scales``, swizzled, an operand of the next GEMM.
        config: tiles; chosen by the mean number of rows if None. Its flags are set here.
        loader: where kernels come from.

    Raises:
        InputError: a shape, dtype, stride, address or layout does not fit, or the limit is negative.
    """
    operands = _operands(mat_a, mat_b, scale_a, scale_b, expert_offsets, global_scale_a, global_scale_b, row_scale)
    check_limit(swiglu_limit)
    rows, columns = mat_a.shape[0], mat_b.shape[2]
    interleaved = resolved_layout(layout, out, columns) == "interleaved"
    if interleaved and requantized is not None:
        raise InputError(f'layout: expected "half", or "interleaved" for bf16 results, found {layout!r}')
    if out is None and requantized is not None:
        out = torch.empty(rows, columns // 4, dtype=torch.uint8, device=mat_a.device)
    elif out is None:
        width = columns if interleaved else columns // 2
        out = torch.zeros(rows, width, dtype=torch.bfloat16, device=mat_a.device)
    config = replace(
        config or _chosen(operands), gated=True, interleaved=interleaved, requantize=requantized is not None,
        row_scale=row_scale is not None, limited=swiglu_limit > 0,
    )  # fmt: skip
    grouped_gemm(
        config, operands, out, multiprocessors=_multiprocessors(mat_a.device), limit=swiglu_limit or None,
        requantized=requantized, loader=loader,
    )  # fmt: skip
    return out


def _operands(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    expert_offsets: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    row_scale: Tensor | None,
) -> Operands:
    """From the public layouts: B's codes are read along K, and copied where they do not stand so."""
    if mat_a.dim() != 2 or mat_b.dim() != 3:
        raise InputError(
            f"mat_a, mat_b: expected [rows, K/2] and [E, K/2, N], found {list(mat_a.shape)} and {list(mat_b.shape)}"
        )
    b = mat_b.view(torch.uint8).transpose(1, 2)
    b = b if b.stride(2) == 1 else b.contiguous()
    return Operands(
        mat_a.view(torch.uint8),
        scale_a.reshape(-1),
        b,
        scale_b.reshape(b.shape[0], -1),
        expert_offsets.to(torch.int32),
        global_scale_a,
        global_scale_b,
        row_scale=row_scale,
    )


def _chosen(operands: Operands) -> BlackwellConfig:
    rows, (experts, columns, half_k) = operands.mat_a.shape[0], operands.mat_b.shape
    return chosen(rows / max(experts, 1), columns, 2 * half_k)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
