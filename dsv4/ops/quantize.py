"""Quantizing activations and weights to NVFP4: the public functions over :mod:`dsv4.nvfp4`.

All of them are plain torch, run on CPU and CUDA, never synchronise with the host and follow the corner cases that the
docstring of :mod:`dsv4.nvfp4` lists (zero, subnormal and NaN scales, sign of zero, tiny tensors). ``fp4`` below is
uint8 with two e2m1 codes a byte (even K in the low nibble), ``sf`` float8_e4m3fn in linear (not swizzled) order,
``gs`` an fp32 multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.errors import InputError
from dsv4.nvfp4 import Nvfp4Tensor, finite_row_amax, global_scale, quantize_blocks
from dsv4.ops.layouts import gate_groups


def _matrix(x: Tensor, name: str) -> Tensor:
    if x.dim() != 2:
        raise InputError(f"{name}: expected a matrix [M, K], found shape {tuple(x.shape)}")
    return x


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
    q = Nvfp4Tensor.quantize(_matrix(x, "quantize_to_nvfp4"))
    return q.codes, q.sf, q.gs


def quantize_activation_nvfp4(x: Tensor, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantize ``x [M, K]`` with a given global scale (0-d, ``[1]``, or one a row, ``[M]`` or ``[M, 1]``).

    Returns:
        ``(fp4 [M, K/2], sf [M, K/16])``. Values beyond ``2688 * gs`` saturate.

    Raises:
        InputError: shapes or dtypes do not fit.
    """
    x = _matrix(x, "quantize_activation_nvfp4")
    return quantize_blocks(x, _row_scales(gs, x))


def quantize_nvfp4_gpu(x: Tensor, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """The same as :func:`quantize_activation_nvfp4`, under the name that GPU callers use."""
    return quantize_activation_nvfp4(x, gs)


def quantize_nvfp4_gpu_fused(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Amax and quantize in one call; like :func:`quantize_to_nvfp4`, but ``gs`` is ``[1]``, never read by the host."""
    fp4, sf, gs = quantize_to_nvfp4(x)
    return fp4, sf, gs.reshape(1)


def _fused_gate_groups(x: Tensor, intermediate_size: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != 2 * intermediate_size:
        raise InputError(
            f"deinterleave: expected x [M, {2 * intermediate_size}] for intermediate size {intermediate_size}, "
            f"found shape {tuple(x.shape)}"
        )
    return gate_groups(x)


def deinterleave_quantize_nvfp4_cuda(x: Tensor, intermediate_size: int, gs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantize the output of the fused SwiGLU GEMM in ``layout="interleaved"``.

    Args:
        x: ``[M, 2I]``: groups of 4 results (in the gate groups' places) between groups of 4 that are ignored.
        intermediate_size: I.
        gs: as in :func:`quantize_activation_nvfp4`.

    Returns:
        ``(fp4 [M, I/2], sf [M, I/16])``.
    """
    return quantize_activation_nvfp4(_fused_gate_groups(x, intermediate_size), gs)


def deinterleave_amax_quantize_nvfp4_fused(x: Tensor, intermediate_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`deinterleave_quantize_nvfp4_cuda` with a global scale from the data: ``(fp4, sf, gs [1])``."""
    return quantize_nvfp4_gpu_fused(_fused_gate_groups(x, intermediate_size))


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
    q = Nvfp4Tensor.quantize(_matrix(w, "quantize_weight_to_nvfp4").t(), four_over_six=four_over_six)
    return q.codes.t().contiguous(), q.sf.t().contiguous(), q.gs


def token_global_scales(x: Tensor) -> Tensor:
    """One global scale a row, from that row's own amax: ``x [M, K]`` -> fp32 ``[M]`` (1 for a non-finite row)."""
    return global_scale(finite_row_amax(x))
