"""The kernels of our layer outside the two products: each one's time, and the memory traffic it amounts to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dsv4.backends.portable import FP32_SLOTS
from dsv4.cli._layer import Call
from dsv4.cli._shapes import LayerShape
from dsv4.moe import Nvfp4MoE


def _rows_moved(shape: LayerShape, tokens: int, mode: str) -> int:
    """W4A4: every token, bf16, is read and written, with one fp32 scale; and so is every intermediate row, unless its
    scale is static and GEMM 1 has quantized it."""
    moved = tokens * (4 * shape.hidden_size + 4)
    if mode != "w4a4-static":
        moved += tokens * shape.top_k * (4 * shape.intermediate_size + 4)
    return moved


def _combine_moved(shape: LayerShape, tokens: int, mode: str) -> int:
    """Slot rows, local ids (int32) and weights (fp32) are read, bf16 tokens written."""
    slots = tokens * shape.top_k
    value = 4 if slots <= FP32_SLOTS else 2
    return slots * (shape.hidden_size * value + 8) + tokens * shape.hidden_size * 2


def _routing_moved(shape: LayerShape, tokens: int, mode: str) -> int:
    """Ids (int64) are read; local ids and the slot of each row (int32) are written. Padding is not counted."""
    return tokens * shape.top_k * (8 + 4 + 4)


MOVED: dict[str, Callable[[LayerShape, int, str], int]] = {
    "_stage_rows": _rows_moved,
    "_combine": _combine_moved,
    "_place": _routing_moved,
}
"""Kernel -> bytes that its launches in one layer must move, by formula. Kernels not named here have a time alone."""


def table(
    kernels: Mapping[str, float], shape: LayerShape, tokens: int, mode: str
) -> dict[str, dict[str, float | None]]:
    """Microseconds of one layer in ``mode`` by kernel -> the same with GB/s, products left out, slowest first."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, us in sorted(kernels.items(), key=lambda item: -item[1]):
        if "gemm" in name.lower():
            continue
        moved = MOVED.get(name)
        rate = round(moved(shape, tokens, mode) / us / 1e3, 1) if moved and us else None
        rows[name] = {"us": round(us, 2), "gb_per_s": rate}
    return rows


def kernel_us(layer: Nvfp4MoE, calls: Sequence[Call], out: Any) -> dict[str, float]:
    """Microseconds of every kernel of one call, by name: the profiler's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for call in calls:
            layer.run(call.hidden_states, call.topk_weights, call.topk_ids, out=out)
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / len(calls) for e in trace.key_averages() if e.device_time_total}
