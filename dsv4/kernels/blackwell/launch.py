"""Launches of the Blackwell grouped GEMM: operands checked, described for TMA, and handed to the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv4.config import capacity
from dsv4.errors import InputError
from dsv4.kernels.blackwell.cache import CACHE
from dsv4.kernels.blackwell.config import SUBTILE, THREADS, BlackwellConfig, padded_scale_columns
from dsv4.kernels.cutedsl.launch import Kernel, TensorMap, tensor_map
from dsv4.kernels.cutedsl.sizes import MAX_EXPERTS
from dsv4.ops.layouts import ROW_TILE, ceil_div, round_up

ARCH_OF = {(10, 0): "sm_100a", (10, 3): "sm_103a"}
"""Compute capability -> what is compiled for it."""

_FAMILY = "sm_100f"
"""Runs on all of them: a cache that has this one alone serves."""

SIGNATURE = (*[TensorMap] * 4, *[ctypes.c_int64] * 9, *[ctypes.c_int32] * 4, ctypes.c_float)
"""Arguments of :class:`dsv4.kernels.blackwell.grouped_gemm.GroupedGemm`, without the grid."""

_SCALE_TILE = 512
_ALIGNMENT = 16  # of what TMA reads
_STORE = 32  # bytes that a thread stores at once

Loader = Callable[[BlackwellConfig, int], Kernel]


def stored(config: BlackwellConfig, capability: tuple[int, int]) -> str | None:
    """The architecture under which a kernel that runs there is in the cache, or None."""
    return next((arch for arch in (ARCH_OF[capability], _FAMILY) if CACHE.lookup(config, arch) is not None), None)


@cache
def gemm_kernel(config: BlackwellConfig, device_index: int) -> Kernel:
    """The grouped GEMM of a configuration, loaded once for each device: from the cache, or compiled."""
    capability = torch.cuda.get_device_capability(device_index)
    cubin, entry = CACHE.load(config, stored(config, capability) or ARCH_OF[capability])
    return Kernel.on_device(device_index, cubin, entry, THREADS, config.shared_bytes, SIGNATURE, cluster=config.ctas)


@dataclass(frozen=True)
class Operands:
    """What one grouped GEMM reads, in the layouts of :mod:`dsv4.ops.gemm_runner`.

    Attributes:
        mat_a: uint8 ``[rows, K/2]``, stride 1 along K.
        scale_a: one byte each, flat, whole tiles of ``128 * pad4(K/16)``.
        mat_b: uint8 ``[E, N, K/2]``, stride 1 along K.
        scale_b: one byte each, ``[E, pad128(N) * pad4(K/16)]``, contiguous for each expert.
        ends: int32 ``[E]``, cumulative.
        gs_a: fp32 ``[E]``.
        gs_b: fp32 ``[E]``, or ``[E, 2]`` of gate and up.
        row_scale: fp32 ``[rows]``, read if the configuration says so.
        row_slot: int32 ``[rows]``, likewise.
        topk_weights: fp32, by slot, likewise.
    """

    mat_a: Tensor
    scale_a: Tensor
    mat_b: Tensor
    scale_b: Tensor
    ends: Tensor
    gs_a: Tensor
    gs_b: Tensor
    row_scale: Tensor | None = None
    row_slot: Tensor | None = None
    topk_weights: Tensor | None = None


@dataclass(frozen=True)
class Requantized:
    """Where SwiGLU's results go as NVFP4.

    Attributes:
        scales: one byte each, flat, whole tiles of ``128 * pad4(I/16)``; padding rows are left as they
            are, padding columns are zeros.
        gs: fp32 ``[E]``, the scale that they are quantized under.
    """

    scales: Tensor
    gs: Tensor


def grouped_gemm(
    config: BlackwellConfig,
    operands: Operands,
    out: Tensor,
    *,
    multiprocessors: int,
    limit: float | None = None,
    requantized: Requantized | None = None,
    loader: Loader = gemm_kernel,
) -> None:
    """Multiply the rows of each expert with its matrix.

    Args:
        config: which kernel; its flags say which of the optional operands are read.
        operands: see there.
        out: ``[rows or slots, N]`` bf16 or (``wide_out``) fp32; gated ``[rows, N/2]``, or interleaved ``[rows, N]``,
            bf16; or requantized uint8 ``[rows, N/4]``. Rows past the last end are left as they are.
        multiprocessors: of the device.
        limit: of SwiGLU.
        requantized: with ``config.requantize``.
        loader: where kernels come from.

    Raises:
        InputError: an operand's shape, dtype, stride or address does not fit.
    """
    a, b = operands.mat_a, operands.mat_b
    experts, columns, k = b.shape[0], b.shape[1], 2 * b.shape[2]
    rows = a.shape[0]
    scale_columns = padded_scale_columns(k)
    _check(config, operands, out, requantized, limit)
    if not rows:
        return
    row_tiles = capacity(rows, experts, config.m) // config.m
    column_tiles = ceil_div(columns, config.n)
    clusters = min(multiprocessors // config.ctas, row_tiles * column_tiles)
    k_tiles = scale_columns // 4
    line, steps = config.k // 2, config.steps
    a_tiles, b_tiles = operands.scale_a.numel() // (ROW_TILE * scale_columns), round_up(columns, ROW_TILE) // ROW_TILE
    order = config.b_scale_order
    b_scales = (
        (_SCALE_TILE // 2, 2, _SCALE_TILE // 2),
        (k_tiles, _SCALE_TILE, steps),
        (b_tiles, k_tiles * _SCALE_TILE, config.b_scale_tiles),
        (experts, operands.scale_b.stride(0), 1),
    )  # size, stride, size of a box
    maps = (
        tensor_map(
            a.data_ptr(), (k // 2, rows, 1), (a.stride(0), rows * a.stride(0)), (line, ROW_TILE, 1), swizzle=line
        ),
        tensor_map(
            b.data_ptr(), (k // 2, columns, experts), (b.stride(1), b.stride(0)), (line, config.b_rows, 1), swizzle=line
        ),
        tensor_map(
            operands.scale_a.data_ptr(),
            (_SCALE_TILE // 2, k_tiles, a_tiles, 1),
            (_SCALE_TILE, k_tiles * _SCALE_TILE, a_tiles * k_tiles * _SCALE_TILE),
            (_SCALE_TILE // 2, steps, 1, 1),
            element_bytes=2,
        ),
        tensor_map(
            operands.scale_b.data_ptr(),
            [b_scales[i][0] for i in order],
            [b_scales[i][1] for i in order[1:]],
            [b_scales[i][2] for i in order],
            element_bytes=2,
        ),
    )
    optional = (operands.row_scale, operands.row_slot, operands.topk_weights)
    loader(config, a.device.index or 0)(
        clusters * config.ctas,
        torch.cuda.current_stream(a.device).cuda_stream,
        *maps,
        operands.ends.data_ptr(),
        operands.gs_a.data_ptr(),
        operands.gs_b.data_ptr(),
        *(tensor.data_ptr() if tensor is not None else 0 for tensor in optional),
        out.data_ptr(),
        requantized.scales.data_ptr() if requantized is not None else 0,
        requantized.gs.data_ptr() if requantized is not None else 0,
        experts,
        columns,
        k,
        operands.gs_b.dim(),
        limit or 0.0,
    )


def column_multiple(gated: bool, separate_gate_up: bool) -> int:
    """What N must be a multiple of: whole subtiles, and of one half where halves have their own scales."""
    return 2 * SUBTILE if separate_gate_up and not gated else SUBTILE


def _check(
    config: BlackwellConfig, operands: Operands, out: Tensor, requantized: Requantized | None, limit: float | None
) -> None:
    """Refuse what the kernel would read or write out of place."""
    o = operands
    (rows, half_k), (experts, columns, b_half_k) = o.mat_a.shape, o.mat_b.shape
    k = 2 * half_k
    scale_columns = padded_scale_columns(k)
    multiple = column_multiple(config.gated, o.gs_b.dim() == 2)
    if b_half_k != half_k or k % 32 or not k or not columns or columns % multiple:
        raise InputError(
            f"mat_a, mat_b: expected [rows, K/2] and [E, N, K/2] with K a multiple of 32 and N of {multiple}, "
            f"found {list(o.mat_a.shape)} and {list(o.mat_b.shape)}"
        )
    if not 1 <= experts <= MAX_EXPERTS:
        raise InputError(f"mat_b: expected 1 to {MAX_EXPERTS} experts, found {experts}")
    _layout("mat_a", o.mat_a, torch.uint8, (rows, half_k), strided=True)
    _layout("mat_b", o.mat_b, torch.uint8, (experts, columns, half_k), strided=True)
    tile = ROW_TILE * scale_columns
    needed = 0 if not rows else tile
    if o.scale_a.element_size() != 1 or o.scale_a.numel() % tile or o.scale_a.numel() < needed:
        raise InputError(
            f"scale_a: expected whole tiles of {tile} one-byte scales, found {o.scale_a.dtype} {list(o.scale_a.shape)}"
        )
    _layout("scale_a", o.scale_a, o.scale_a.dtype, tuple(o.scale_a.shape))
    numel = round_up(columns, ROW_TILE) * scale_columns
    if o.scale_b.element_size() != 1:
        raise InputError(f"scale_b: expected one-byte scales, found {o.scale_b.dtype}")
    _layout("scale_b", o.scale_b, o.scale_b.dtype, (experts, numel), strided=True)
    _layout("ends", o.ends, torch.int32, (experts,), alignment=4)
    _layout("gs_a", o.gs_a, torch.float32, (experts,), alignment=4)
    _layout("gs_b", o.gs_b, torch.float32, (experts, 2) if o.gs_b.dim() == 2 else (experts,), alignment=4)
    if config.row_scale:
        _layout("row_scale", o.row_scale, torch.float32, (rows,), alignment=4)
    if config.weighted or config.scattered:
        _layout("row_slot", o.row_slot, torch.int32, (rows,), alignment=4)
    if config.weighted and (o.topk_weights is None or o.topk_weights.dtype != torch.float32):
        raise InputError("topk_weights: expected fp32, by slot")
    if config.limited != (limit is not None):
        raise InputError(f"limit: found {limit}, for a kernel that is {'' if config.limited else 'not '}limited")
    width = columns // 4 if config.requantize else columns // 2 if config.gated and not config.interleaved else columns
    dtype = torch.uint8 if config.requantize else torch.float32 if config.wide_out else torch.bfloat16
    slots = out.shape[0] if config.scattered else rows
    _layout("out", out, dtype, (slots, width), alignment=8 if config.requantize or config.interleaved else _STORE)
    if config.requantize != (requantized is not None):
        raise InputError("requantized: expected with, and only with, a kernel that requantizes")
    if requantized is not None:
        tile = ROW_TILE * padded_scale_columns(columns // 2)
        scales = requantized.scales
        if scales.element_size() != 1 or scales.numel() < capacity(rows, experts, ROW_TILE) // ROW_TILE * tile:
            raise InputError(
                f"requantized.scales: expected {capacity(rows, experts, ROW_TILE)} rows in whole tiles of {tile} "
                f"one-byte scales, found {scales.dtype} {list(scales.shape)}"
            )
        _layout("requantized.scales", scales, scales.dtype, tuple(scales.shape))
        _layout("requantized.gs", requantized.gs, torch.float32, (experts,), alignment=4)


def _layout(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    strided: bool = False,
    alignment: int = _ALIGNMENT,
) -> None:
    """Require a dtype, a shape, an aligned address, and contiguity; ``strided`` asks for the last dimension's alone."""
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise InputError(f"{name}: expected {dtype} {list(shape)}, found {found}")
    steps = tensor.stride()[:-1]
    dense = tensor.stride(-1) == 1 and not any(s * tensor.element_size() % _ALIGNMENT for s in steps)
    if not (dense if strided else tensor.is_contiguous()) or tensor.data_ptr() % alignment:
        raise InputError(
            f"{name}: expected {'the last dimension' if strided else 'all'} contiguous and addresses that are "
            f"multiples of {alignment}, found strides {tensor.stride()} at {tensor.data_ptr():#x}"
        )
