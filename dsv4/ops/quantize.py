"""Quantizing activations and weights to NVFP4: the public functions over :mod:`dsv4.nvfp4`.

On a GPU they are Triton kernels, elsewhere plain torch, bit for bit the same; they never synchronise with the host and
follow the corner cases that the docstring of :mod:`dsv4.nvfp4` lists (zero, subnormal and NaN scales, sign of zero,
tiny tensors). ``fp4`` below is uint8 with two e2m1 codes a byte (even K in the low nibble), ``sf`` float8_e4m3fn in
linear order unless it is said to be swizzled, ``gs`` an fp32 multiplier.

Bytes that a GPU moves, per value of bf16: 2.5625 with a given scale (2 in, 1/2 and 1/16 out), 4.5625 with one from the
data (x is read twice); 2 more for each reading of x where it is fp32 or interleaved. A matrix whose last dimension is
not contiguous is copied first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.checks import check_tensor
from dsv4.config import capacity
from dsv4.errors import InputError
from dsv4.nvfp4 import BLOCK, Nvfp4Tensor, check_quantizable, finite_row_amax, global_scale, quantize_blocks
from dsv4.ops.device import has_kernel
from dsv4.ops.layouts import COL_TILE, ROW_TILE, Swizzle32x4x4, gate_groups, round_up
from dsv4.ops.routing import route


def _matrix(x: Tensor, name: str) -> Tensor:
    if x.dim() != 2:
        raise InputError(f"{name}: expected a matrix [M, K], found shape {tuple(x.shape)}")
    check_quantizable(x)
    return x


def _operand(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Codes and linear block scales for ``[M, k]``, allocated."""
    fp4 = torch.empty(x.shape[0], k // 2, dtype=torch.uint8, device=x.device)
    return fp4, torch.empty(x.shape[0], k // BLOCK, dtype=torch.float8_e4m3fn, device=x.device)


def _quantize(x: Tensor, gs: Tensor | float, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize under a given scale ``x [M, K]``, or the gate groups of ``x [M, 2K]``."""
    scales = _row_scales(gs, x)
    if not has_kernel(x):
        return quantize_blocks(gate_groups(x) if interleaved else x, scales)
    fp4, sf = _operand(x, x.shape[1] // 2 if interleaved else x.shape[1])
    torch.ops.nvfp4.quantize(x, scales, fp4, sf, interleaved)
    return fp4, sf


def _amax_quantize(x: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_quantize` under a scale from the data, which is returned as ``[1]``."""
    if not has_kernel(x):
        q = Nvfp4Tensor.quantize(gate_groups(x) if interleaved else x)
        return q.codes, q.sf, q.gs.reshape(1)
    fp4, sf = _operand(x, x.shape[1] // 2 if interleaved else x.shape[1])
    gs = torch.empty(1, dtype=torch.float32, device=x.device)
    torch.ops.nvfp4.amax_quantize(x, fp4, sf, gs, interleaved)
    return fp4, sf, gs


def _row_scales(gs: Tensor | float, x: Tensor) -> Tensor:
    """``gs`` as fp32 that broadcasts against ``[M, K/16]``: one scale, or one a row."""
    if not isinstance(gs, Tensor):  # filled on the device: copying a number there would synchronise
        return torch.full((), gs, dtype=torch.float32, device=x.device)
    gs = gs.to(device=x.device, dtype=torch.float32)
    if gs.numel() == 1:
        return gs.reshape(())
    if gs.numel() == x.shape[0]:
        return gs.reshape(-1, 1)
    raise InputError(f"gs: expected one scale or one a row ({x.shape[0]}), found shape {tuple(gs.shape)}")


def quantize_to_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``x [M, K]`` with one global scale of its own.

    Returns:
        ``(fp4 [M, K/2], sf [M, K/16], gs)``; gs is a 0-d fp32 tensor on x's device, ``amax / 2688``.

    Raises:
        InputError: x is not a floating-point matrix, or K is not a multiple of 16.
    """
    fp4, sf, gs = _amax_quantize(_matrix(x, "quantize_to_nvfp4"))
    return fp4, sf, gs.reshape(())


def quantize_activation_nvfp4(x: Tensor, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantize ``x [M, K]`` with a given global scale (0-d, ``[1]``, or one a row, ``[M]`` or ``[M, 1]``).

    Returns:
        ``(fp4 [M, K/2], sf [M, K/16])``. Values beyond ``2688 * gs`` saturate.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    return _quantize(_matrix(x, "quantize_activation_nvfp4"), gs)


def quantize_nvfp4_gpu(x: Tensor, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """The same as :func:`quantize_activation_nvfp4`, under the name that GPU callers use."""
    return quantize_activation_nvfp4(x, gs)


def quantize_nvfp4_gpu_fused(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Amax and quantize in one call; like :func:`quantize_to_nvfp4`, but ``gs`` is ``[1]``, never read by the host."""
    return _amax_quantize(_matrix(x, "quantize_nvfp4_gpu_fused"))


def _interleaved(x: Tensor, intermediate_size: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != 2 * intermediate_size:
        raise InputError(
            f"deinterleave: expected x [M, {2 * intermediate_size}] for intermediate size {intermediate_size}, "
            f"found shape {tuple(x.shape)}"
        )
    if intermediate_size % BLOCK:
        raise InputError(
            f"deinterleave: the intermediate size must be a multiple of {BLOCK}, found {intermediate_size}"
        )
    check_quantizable(x)
    return x


def deinterleave_quantize_nvfp4_cuda(x: Tensor, intermediate_size: int, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantize the output of the fused SwiGLU GEMM in ``layout="interleaved"``.

    Args:
        x: ``[M, 2I]``: groups of 4 results (in the gate groups' places) between groups of 4 that are ignored.
        intermediate_size: I.
        gs: as in :func:`quantize_activation_nvfp4`.

    Returns:
        ``(fp4 [M, I/2], sf [M, I/16])``.
    """
    return _quantize(_interleaved(x, intermediate_size), gs, interleaved=True)


def deinterleave_amax_quantize_nvfp4_fused(x: Tensor, intermediate_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`deinterleave_quantize_nvfp4_cuda` with a global scale from the data: ``(fp4, sf, gs [1])``."""
    return _amax_quantize(_interleaved(x, intermediate_size), interleaved=True)


def quantize_nvfp4_swizzled(
    x: Tensor,
    gs: Tensor | float,
    expert_offsets: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize ``x [M, K]`` with block scales in the swizzled 32x4x4 layout, as A operand of the grouped GEMM.

    Padding scales are zeros that are written with the others; nothing is cleared beforehand.

    Args:
        x: floating point ``[M, K]``; with ``expert_offsets`` the rows of all experts one after another.
        gs: one scale, one a row (``[M, 1]``; without ``expert_offsets`` also ``[M]``), or with ``expert_offsets`` one
            an expert (``[E]``).
        expert_offsets: int32 or int64 ``[E]`` on x's device, cumulative row ends. The scales of expert e then start at
            the sum of ``round_up(rows, 128)`` of the experts before it. None: x is one matrix.
        out: ``(fp4, sf)`` to write to, contiguous, sf of any shape with the number of elements below; on a GPU fp4's
            address must be a multiple of 4. Allocated if None.

    Returns:
        ``(fp4 [M, K/2], sf)``, sf with ``pad128(M) * pad4(K/16)`` elements, or with ``expert_offsets`` with
        ``capacity(M, E, 128) * pad4(K/16)``. Rows of fp4 past the last end, and tiles of scales behind those of the
        last expert, are left as they are (undefined if allocated here).

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    x = _matrix(x, "quantize_nvfp4_swizzled")
    rows, k = x.shape
    if expert_offsets is not None:
        if expert_offsets.dim() != 1 or not expert_offsets.numel():
            raise InputError(f"expert_offsets: expected [E] with E > 0, found shape {tuple(expert_offsets.shape)}")
        check_tensor("expert_offsets", expert_offsets, (torch.int32, torch.int64), expert_offsets.shape, x.device)
    scales = _expert_or_row_scales(gs, x, expert_offsets)
    sf_rows = capacity(rows, expert_offsets.numel(), ROW_TILE) if expert_offsets is not None else rows
    layout = Swizzle32x4x4(sf_rows, k // BLOCK)
    if out is None:
        fp4 = torch.empty(rows, k // 2, dtype=torch.uint8, device=x.device)
        out = fp4, torch.empty(layout.numel, dtype=torch.float8_e4m3fn, device=x.device)
    fp4, sf = out
    check_tensor("out fp4", fp4, torch.uint8, (rows, k // 2), x.device)
    check_tensor("out sf", sf, torch.float8_e4m3fn, sf.shape, x.device)
    if sf.numel() != layout.numel or not fp4.is_contiguous() or not sf.is_contiguous():
        raise InputError(
            f"quantize_nvfp4_swizzled: out must be contiguous, with {layout.numel} scales; "
            f"found {sf.numel()} scales, strides {fp4.stride()} and {sf.stride()}"
        )
    if has_kernel(x):
        torch.ops.nvfp4.quantize_swizzled(x, scales, expert_offsets, fp4, sf)
    else:
        _quantize_swizzled_twin(x, scales, expert_offsets, fp4, sf)
    return out


def _expert_or_row_scales(gs: Tensor | float, x: Tensor, expert_offsets: Tensor | None) -> Tensor:
    """``gs`` as fp32: 0-d for one scale, ``[M, 1]`` for one a row, ``[E]`` for one an expert."""
    if expert_offsets is None or not isinstance(gs, Tensor) or gs.dim() != 1 or gs.numel() == 1:
        return _row_scales(gs, x)
    if gs.numel() != expert_offsets.numel():
        raise InputError(
            f"gs: expected one scale, one a row [{x.shape[0]}, 1] or one an expert [{expert_offsets.numel()}], "
            f"found shape {tuple(gs.shape)}"
        )
    return gs.to(device=x.device, dtype=torch.float32)


def _quantize_swizzled_twin(x: Tensor, gs: Tensor, expert_offsets: Tensor | None, fp4: Tensor, sf: Tensor) -> None:
    cols = x.shape[1] // BLOCK
    if expert_offsets is None:
        codes, scales = quantize_blocks(x, gs)
        fp4.copy_(codes)
        sf.view(torch.uint8).view(-1).copy_(Swizzle32x4x4(x.shape[0], cols).swizzle(scales).view(torch.uint8))
        return
    if not x.shape[0]:
        return
    experts = expert_offsets.numel()
    row = torch.arange(x.shape[0], dtype=expert_offsets.dtype, device=x.device)
    expert = torch.searchsorted(expert_offsets, row, right=True)
    served = expert < experts
    if gs.dim() == 1:
        gs = gs[expert.clamp(max=experts - 1)].unsqueeze(1)
    codes, scales = quantize_blocks(x, gs)
    fp4.copy_(torch.where(served.unsqueeze(1), codes, fp4))
    # Rows of scales are placed as slots are: sorted by expert (they are), each expert padded to a tile.
    routing = route(torch.where(served, expert, -1).to(torch.int32).unsqueeze(1), experts, ROW_TILE)
    placed = scales.view(torch.uint8)[routing.row_slot.clamp(min=0).long()]
    placed = torch.where((routing.row_slot >= 0).unsqueeze(1), placed, 0)
    new = Swizzle32x4x4(routing.num_rows, cols).swizzle(placed).view(-1, ROW_TILE * round_up(cols, COL_TILE))
    old = sf.view(torch.uint8).view(new.shape)
    old.copy_(torch.where((routing.tile_expert >= 0).unsqueeze(1), new, old))


def quantize_weight_to_nvfp4(w: Tensor, *, four_over_six: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight stored as ``[K, N]`` (input features first), in blocks of 16 along K.

    Args:
        w: floating point ``[K, N]``.
        four_over_six: choose each block's scale adaptively (see :mod:`dsv4.nvfp4`); lower error, same format.

    Returns:
        ``(fp4 [K/2, N], sf [K/16, N], gs 0-d)``, contiguous.

    Raises:
        InputError: w is not a floating-point matrix, or K is not a multiple of 16.
    """
    if w.dim() != 2:
        raise InputError(f"quantize_weight_to_nvfp4: expected a matrix [K, N], found shape {tuple(w.shape)}")
    rows = _matrix(w.t(), "quantize_weight_to_nvfp4")
    if four_over_six:  # plain torch everywhere: done once, when weights are made
        q = Nvfp4Tensor.quantize(rows, four_over_six=True)
        fp4, sf, gs = q.codes, q.sf, q.gs
    else:
        fp4, sf, gs = _amax_quantize(rows)
    return fp4.t().contiguous(), sf.t().contiguous(), gs.reshape(())


def token_global_scales(x: Tensor) -> Tensor:
    """One global scale a row, from that row's own amax: ``x [M, K]`` -> fp32 ``[M]`` (1 for a non-finite row)."""
    return global_scale(finite_row_amax(x))
