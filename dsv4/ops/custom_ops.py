"""``torch.ops.nvfp4.moe_gemm``: a layer as one torch operator, opaque to torch.compile.

The operator takes a layer by a number (an operator's arguments are tensors and scalars). The registry holds layers
weakly: it keeps none of them, nor their weights, alive.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dsv4.errors import StateError

_runners: WeakValueDictionary[int, Any] = WeakValueDictionary()
_next_id = itertools.count()


def register_runner(obj: Any) -> int:
    """Give ``obj`` a number under which the operator finds it.

    Args:
        obj: has ``_run_impl(hidden, topk_weights, topk_ids) -> Tensor [T, hidden_size]``; the keywords ``out``,
            ``out_dtype`` and ``num_valid_tokens`` are passed when the operator was given them. Referenced weakly.

    Returns:
        A number never used before in this process.
    """
    runner_id = next(_next_id)
    _runners[runner_id] = obj
    return runner_id


def _run(runner_id: int, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor, **keywords: Any) -> Tensor:
    runner = _runners.get(runner_id)
    if runner is None:
        raise StateError(f"nvfp4::moe_gemm: no layer has the number {runner_id} (any more): keep the layer alive")
    given = {name: value for name, value in keywords.items() if value is not None}
    result: Tensor = runner._run_impl(hidden, topk_weights, topk_ids, **given)
    return result


_library = torch.library.Library("nvfp4", "DEF")
_ARGUMENTS = "Tensor hidden, Tensor topk_weights, Tensor topk_ids, int runner_id, int hidden_size"
_library.define(f"moe_gemm({_ARGUMENTS}, *, Tensor? num_valid_tokens=None, ScalarType? out_dtype=None) -> Tensor")
# The result is the argument itself; returning it too would make an alias that functionalization cannot follow.
_library.define(f"moe_gemm.out({_ARGUMENTS}, *, Tensor? num_valid_tokens=None, Tensor(a!) out) -> ()")


def _moe_gemm(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    runner_id: int,
    hidden_size: int,
    *,
    num_valid_tokens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return _run(runner_id, hidden, topk_weights, topk_ids, num_valid_tokens=num_valid_tokens, out_dtype=out_dtype)


def _moe_gemm_out(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    runner_id: int,
    hidden_size: int,
    *,
    num_valid_tokens: Tensor | None = None,
    out: Tensor,
) -> None:
    runner = _runners.get(runner_id)
    if runner is not None and "out" not in inspect.signature(runner._run_impl).parameters:
        out.copy_(_run(runner_id, hidden, topk_weights, topk_ids, num_valid_tokens=num_valid_tokens))
        return
    _run(runner_id, hidden, topk_weights, topk_ids, num_valid_tokens=num_valid_tokens, out=out)


def _moe_gemm_fake(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    runner_id: int,
    hidden_size: int,
    *,
    num_valid_tokens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return hidden.new_empty((hidden.shape[0], hidden_size), dtype=out_dtype or torch.bfloat16)


def _moe_gemm_out_fake(*args: Any, **keywords: Any) -> None:
    return None


_library.impl("moe_gemm", _moe_gemm, "CompositeExplicitAutograd")
_library.impl("moe_gemm.out", _moe_gemm_out, "CompositeExplicitAutograd")
torch.library.register_fake("nvfp4::moe_gemm", _moe_gemm_fake)
torch.library.register_fake("nvfp4::moe_gemm.out", _moe_gemm_out_fake)


def nvfp4_moe_gemm(
    hidden: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    runner_id: int,
    hidden_size: int,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    num_valid_tokens: Tensor | None = None,
) -> Tensor:
    """Run a registered layer through the torch operator.

    Args:
        hidden: bf16 ``[T, H]``.
        topk_weights: fp32 ``[T, k]``.
        topk_ids: int32 or int64 ``[T, k]``.
        runner_id: from :func:`register_runner`.
        hidden_size: columns of the result, H.
        out: written by ``nvfp4::moe_gemm.out`` and returned.
        out_dtype: dtype of a new result, bf16 by default.
        num_valid_tokens: integer ``[1]`` on the device.

    Returns:
        ``[T, hidden_size]``.
    """
    if out is None:
        result: Tensor = torch.ops.nvfp4.moe_gemm(
            hidden,
            topk_weights,
            topk_ids,
            runner_id,
            hidden_size,
            num_valid_tokens=num_valid_tokens,
            out_dtype=out_dtype,
        )
        return result
    torch.ops.nvfp4.moe_gemm.out(
        hidden, topk_weights, topk_ids, runner_id, hidden_size, num_valid_tokens=num_valid_tokens, out=out
    )
    return out
