"""A library's grouped NVFP4 GEMM where this project's own cannot be used yet: PyTorch's ``scaled_grouped_mm``.

**Library numerics.** The product comes back in bf16, so that gate and up are rounded once before SwiGLU, which the
numbers' contract does not allow its own backends; the self-check and ``dsv4 verify`` hold it to ``QUANTIZED_TOLERANCE``
and show what they measured. It allocates in every call.

PyTorch has the operator everywhere and NVFP4 in few builds (with MSLK, or cuBLASLt from 13.4 on), for few GPUs: whether
this one does is asked by multiplying a small matrix. Staging, routing and weights are the Blackwell backend's.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dsv4.backends.base import Verdict
from dsv4.backends.blackwell import BlackwellBackend, declines
from dsv4.backends.portable import PortableBackend
from dsv4.config import MoEConfig, capacity
from dsv4.kernels.blackwell.config import BlackwellConfig, padded_scale_columns
from dsv4.kernels.blackwell.launch import Operands, Requantized
from dsv4.ops.activation import clamped_swiglu
from dsv4.ops.layouts import ROW_TILE, gate_groups, up_groups
from dsv4.ops.quantize import quantize_nvfp4_swizzled

MIN_CAPABILITY = (10, 0)
"""NVFP4 tensor cores."""


class LibraryBackend(BlackwellBackend):
    """See the module docstring; the interface is :class:`dsv4.backends.base.Backend`."""

    name = "library"
    library_numerics = True

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return Verdict(False, f"PyTorch's grouped NVFP4 GEMM needs compute capability 10.0, found {device.type}")
        portable = PortableBackend.explain(config, device)
        if not portable.usable:
            return portable
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            found = f"{capability[0]}.{capability[1]}"
            return Verdict(False, f"PyTorch's grouped NVFP4 GEMM needs compute capability 10.0, found {found}")
        declined = declines(config)
        if declined is None and config.batch_invariant:
            declined = "nobody promises that the library's bits are independent of the batch"
        if declined is None:
            declined = _missing(device)
        if declined is not None:
            return Verdict(False, declined)
        return Verdict(True, f"library numerics: scaled_grouped_mm of PyTorch {torch.__version__}")

    def _launch(
        self, config: BlackwellConfig, operands: Operands, out: Tensor, requantized: Requantized | None = None
    ) -> None:
        o = operands
        product = multiply(o).float()
        slots, experts = product.shape[0], o.ends.shape[0]
        row = torch.arange(slots, dtype=o.ends.dtype, device=o.ends.device)
        # Rows past the last end hold anything, and take anything.
        expert = torch.searchsorted(o.ends, row, right=True).clamp_(max=experts - 1)
        product *= o.gs_a[expert].unsqueeze(1)
        if config.row_scale and o.row_scale is not None:
            product *= o.row_scale.unsqueeze(1)
        if not config.gated:
            assert o.row_slot is not None
            target = torch.where(o.row_slot >= 0, o.row_slot, slots)  # rows that nobody has go to one that is cut off
            rows = out.new_empty(slots + 1, out.shape[1])
            rows[target.long()] = (product * o.gs_b[expert].unsqueeze(1)).to(out.dtype)
            out.copy_(rows[:slots])
            return
        weight = None
        if config.weighted and o.topk_weights is not None and o.row_slot is not None:
            weight = o.topk_weights.flatten()[o.row_slot.clamp(min=0).long()].unsqueeze(1)
        gate = gate_groups(product) * o.gs_b[expert, 0].unsqueeze(1)
        up = up_groups(product) * o.gs_b[expert, 1].unsqueeze(1)
        result = clamped_swiglu(gate, up, self.config.swiglu_limit if config.limited else None, weight)
        if requantized is None:
            out.copy_(result)
            return
        size = capacity(slots, experts, ROW_TILE) * padded_scale_columns(result.shape[1])
        scales = requantized.scales[:size].view(torch.float8_e4m3fn)
        quantize_nvfp4_swizzled(result, requantized.gs, o.ends, out=(out, scales))


def multiply(operands: Operands) -> Tensor:
    """``A @ B`` without global scales, bf16 ``[rows, N]``, by the library."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_grouped_mm  # type: ignore[attr-defined]

    o = operands
    fp4, e4m3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    ones = torch.ones_like(o.gs_a)
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    return scaled_grouped_mm(
        o.mat_a.view(fp4),
        o.mat_b.view(fp4).transpose(1, 2),
        [o.scale_a.view(-1, padded_scale_columns(2 * o.mat_a.shape[1])).view(e4m3), ones],
        recipe,
        [o.scale_b.contiguous().view(e4m3), ones],
        recipe,
        swizzle,
        swizzle,
        offs=o.ends,
        output_dtype=torch.bfloat16,
    )


@cache
def _missing(device: torch.device) -> str | None:
    """Why the library cannot, or None: asked by multiplying 128 rows of ones, whose products are known."""
    codes = torch.full((128, 32), 0x22, dtype=torch.uint8, device=device)  # ones
    scales = torch.full((512,), 0x38, dtype=torch.uint8, device=device)  # ones
    one = torch.ones(1, device=device)
    ends = torch.full((1,), 128, dtype=torch.int32, device=device)
    try:
        product = multiply(Operands(codes, scales, codes.unsqueeze(0), scales.unsqueeze(0), ends, one, one))
    except Exception as error:  # whatever a build says that lacks it
        return f"this build of PyTorch has no grouped NVFP4 GEMM: {str(error).splitlines()[0][:160]}"
    if product.shape != (128, 128) or not bool((product == 64).all()):
        return "this build's grouped NVFP4 GEMM multiplies ones to something else than their number"
    return None
