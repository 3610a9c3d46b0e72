"""Checks of tensor arguments, with one way of saying what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.errors import InputError


def check_tensor(
    name: str,
    tensor: object,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device | None = None,
) -> None:
    """Require one of some dtypes, a shape and, if given, a device. Reads no values.

    Raises:
        InputError: names the argument, what was found and what was expected.
    """
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in allowed:
        raise InputError(
            f"{name}: expected {dtype_names(allowed)} {list(shape)}, found {dtype_names([tensor.dtype])} "
            f"{list(tensor.shape)}"
        )
    if device is not None and tensor.device != device:
        raise InputError(f"{name}: expected a tensor on {device}, found one on {tensor.device}")


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """``bfloat16 or float32``."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def stack_experts(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor per expert, stacked; they must have one shape.

    Raises:
        InputError: no expert, or experts of different shapes.
    """
    if not tensors:
        raise InputError(f"{name}: expected one tensor per expert, found none")
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) > 1:
        raise InputError(f"{name}: expected the same shape for every expert, found {sorted(shapes)}")
    return torch.stack(list(tensors))
