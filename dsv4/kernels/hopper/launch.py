"""Launches of the Hopper grouped GEMM: operands checked and handed to the driver."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import InputError
from dsv4.kernels.cutedsl.launch import Kernel
from dsv4.kernels.hopper.cache import ARCH, CACHE
from dsv4.kernels.hopper.config import ROW_UNIT, HopperConfig
from dsv4.kernels.hopper.layout import matrix_bytes
from dsv4.kernels.triton.grouped_gemm import TileMap
from dsv4.kernels.triton.routing import RowGroups

GEMM_SIGNATURE = (ctypes.c_int64,) * 13 + (ctypes.c_int32, ctypes.c_int32, ctypes.c_float, ctypes.c_int64)
"""Arguments of :class:`dsv4.kernels.hopper.grouped_gemm.GroupedGemm`, without the grid."""


def _unfit(name: str, found: Any, expected: str) -> InputError:
    what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else found
    return InputError(f"{name}: found {what}, expected {expected}")


def _address(operand: Tensor | None) -> int:
    """Null, where there is no such operand."""
    return operand.data_ptr() if operand is not None else 0


def _check_operands(
    config: HopperConfig,
    image: Tensor,
    row_scale: Tensor | None,
    expert_scale: Tensor | None,
    experts: Tensor,
    offset: int,
    gs: Tensor,
    tiles: TileMap,
    groups: RowGroups,
    out: Tensor,
    rows: int,
    k: int,
    topk_weights: Tensor | None,
    result_gs: Tensor | None,
) -> None:
    """A kernel believes every address and size; words are found only where something is wrong."""
    if rows % (64 * config.warpgroups) or k % (128 * config.blocks):
        raise InputError(
            f"a {rows} x {k} matrix is not whole tiles of {64 * config.warpgroups} x {128 * config.blocks}: "
            "choose another configuration"
        )
    if config.gated and rows % 128:
        raise _unfit("rows", rows, "a multiple of 128 for a gated product")
    if config.requantized and (config.warpgroups % 2 or not config.gated):
        raise _unfit("config", config, "an even number of warpgroups and a gated product, to requantize")
    if experts.dtype != torch.uint8 or experts.stride(1) != 1 or experts.stride(0) % 16 or offset % 16:
        raise _unfit("experts", experts, "uint8 rows, a matrix at every 16th byte")
    if offset + matrix_bytes(rows, k) > experts.shape[1]:
        raise _unfit("experts", experts, f"a {rows} x {k} matrix from byte {offset} on")
    if not config.gated and (out.dim() != 2 or out.shape[1] != rows):
        raise _unfit("out", out, f"[S, {rows}]")
    if groups.rows != config.tokens:
        raise _unfit("groups", f"row groups of up to {groups.rows} rows", str(config.tokens))
    image_rows, num_experts = tiles.tile_expert.shape[0] * ROW_UNIT, experts.shape[0]
    # And the least number of elements that is touched, where that is known here.
    operands: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("image", image, torch.bfloat16, image_rows * k),
        ("gs", gs, torch.float32, num_experts * (1 + config.gated)),
        ("row_slot", tiles.row_slot, torch.int32, image_rows),
        ("group_row", groups.group_row, torch.int32, 2),
        ("group_expert", groups.group_expert, torch.int32, 1),
        ("num_groups", groups.num_groups, torch.int32, 1),
        ("taken", groups.taken, torch.int32, 2),
        ("out", out, torch.float32 if config.wide_out else torch.bfloat16, config.gated * image_rows * rows // 2),
    ]
    if config.gated and not config.row_scale and row_scale is not None:
        raise _unfit("row_scale", row_scale, "None, of a gated product whose kernel does not read it")
    if expert_scale is not None and (config.gated or row_scale is not None):
        raise _unfit("expert_scale", expert_scale, "None, of a gated product and beside row_scale")
    if config.row_scale or row_scale is not None:
        operands.append(("row_scale", row_scale, torch.float32, image_rows))
    if expert_scale is not None:
        operands.append(("expert_scale", expert_scale, torch.float32, num_experts))
    if config.weighted:
        operands.append(("topk_weights", topk_weights, torch.float32, 0))
    if config.requantized:
        operands.append(("result_gs", result_gs, torch.float32, num_experts))
    for name, tensor, dtype, size in operands:
        if tensor is None or tensor.dtype != dtype or tensor.numel() < size or not tensor.is_contiguous():
            raise _unfit(name, tensor, f"{dtype}, contiguous, at least {size} elements")


@cache
def gemm_kernel(config: HopperConfig, device_index: int) -> Kernel:
    """The grouped GEMM of a configuration, loaded once for each device: from the cache, or compiled."""
    cubin, entry = CACHE.load(config, ARCH)
    return Kernel.on_device(device_index, cubin, entry, config.threads, config.shared_bytes, GEMM_SIGNATURE)


def grouped_gemm(
    config: HopperConfig,
    image: Tensor,
    row_scale: Tensor | None,
    experts: Tensor,
    offset: int,
    gs: Tensor,
    tiles: TileMap,
    groups: RowGroups,
    out: Tensor,
    *,
    rows: int,
    k: int,
    multiprocessors: int,
    limit: float | None = None,
    expert_scale: Tensor | None = None,
    topk_weights: Tensor | None = None,
    result_gs: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """Multiply every row group with its expert's matrix.

    Args:
        config: which kernel; its flags say which optional operands are needed, but for the scales of a product that is
            not gated.
        image: bf16, the tokens: see :mod:`dsv4.kernels.hopper.stages`.
        row_scale: fp32, by row of the tile map: multiplied into the row's results. With ``config.row_scale``, or, if
            the product is not gated, where it is given.
        experts: uint8 ``[E, bytes]``.
        offset: first byte of the matrix.
        gs: fp32 ``[E, 2]`` for a gated product, else ``[E]``.
        tiles: rows and their experts, with row tiles of ``ROW_UNIT``.
        groups: the schedule, with groups of up to ``config.tokens`` rows. Its counters of tiles are zero: routing
            serves one launch of either product.
        out: the next image, or ``[S, rows]``.
        rows: of the matrix, a multiple of ``64 * config.warpgroups``.
        k: a multiple of ``128 * config.blocks``.
        multiprocessors: of the device.
        expert_scale: fp32 ``[E]``, likewise by expert, in place of ``row_scale`` (not of a gated product).
        limit: of SwiGLU.
        topk_weights: fp32, by slot.
        result_gs: fp32 ``[E]``, at least 2^-100 each: the next image's global scales, where it is quantized.
        dependent: start before the launch before it has ended, which wrote ``tiles`` and ``groups`` only if
            ``config.follows_routing``.

    Raises:
        InputError: the matrix is not whole tiles of this configuration, or an operand's dtype or size does not fit.
    """
    _check_operands(
        config, image, row_scale, expert_scale, experts, offset, gs, tiles, groups, out, rows, k, topk_weights,
        result_gs,
    )  # fmt: skip
    n_tiles = rows // (64 * config.warpgroups)
    grid = min(multiprocessors * config.programs_per_sm, groups.group_expert.shape[0] * n_tiles)
    gemm_kernel(config, image.device.index or 0)(
        grid,
        torch.cuda.current_stream(image.device).cuda_stream,
        experts.data_ptr() + offset,
        image.data_ptr(),
        gs.data_ptr(),
        tiles.row_slot.data_ptr(),
        groups.group_expert.data_ptr(),
        groups.group_row.data_ptr(),
        groups.num_groups.data_ptr(),
        groups.taken[0 if config.gated else 1].data_ptr(),
        _address(row_scale),
        _address(expert_scale),
        _address(topk_weights),
        out.data_ptr(),
        experts.stride(0),
        k // 128,
        n_tiles,
        limit or 0.0,
        _address(result_gs),
        dependent=dependent,
    )
