"""Checks that formats share. Each names the file and the tensor, what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from dsv4 import weights
from dsv4.checkpoints.base import ExpertShape
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.source import TensorInfo, TensorSource
from dsv4.errors import CheckpointError, InputError
from dsv4.nvfp4 import GS_DIVISOR, Nvfp4Tensor


def require(source: TensorSource, location: ExpertLocation, projection: str, suffix: str) -> TensorInfo:
    """The header entry of a tensor that must be there."""
    name = location.tensors.get((projection, suffix))
    if name is None:
        present = sorted({str(source[other].file) for other in location.tensors.values()})
        raise CheckpointError(
            f"{', '.join(present)}: {location}: tensor {location.expected_name(projection, suffix)!r} is missing; "
            f"found {sorted(location.tensors.values())[:16]}"
        )
    return source[name]


def check_suffixes(source: TensorSource, location: ExpertLocation, known: Collection[str]) -> None:
    """Refuse tensors that the format does not know: what they stand for (a bias, a rotation) changes the result."""
    for (_, suffix), name in location.tensors.items():
        if suffix not in known:
            raise CheckpointError(f"{source[name]}: not part of this format; expected only {list(known)}")


def matrix_size(info: TensorInfo, block: int, *, packed: bool = False) -> tuple[int, int]:
    """(out, in) of a matrix stored as ``[out, in]``, or ``[out, in/2]`` if packed; ``in`` comes in whole blocks."""
    shape, factor = info.shape, 2 if packed else 1
    if len(shape) != 2 or 0 in shape or shape[1] * factor % block:
        columns = "in/2" if packed else "in"
        raise CheckpointError(
            f"{info}: expected shape [out, {columns}] with in a positive multiple of {block}, found {list(shape)}"
        )
    return shape[0], shape[1] * factor


def check_matrices(
    source: TensorSource, location: ExpertLocation, weight: str, sizes: Mapping[str, tuple[int, int]]
) -> ExpertShape:
    """Require up to have gate's size and down its transpose.

    Args:
        source: the checkpoint's tensors.
        location: the expert.
        weight: the suffix of the tensor that is at fault otherwise.
        sizes: projection -> (out, in).
    """
    inter, hidden = sizes["gate"]
    for projection, expected in (("up", (inter, hidden)), ("down", (hidden, inter))):
        if sizes[projection] != expected:
            info = require(source, location, projection, weight)
            raise CheckpointError(
                f"{info}: expected a matrix of {list(expected)} ({location}: gate is {inter} x {hidden}), found "
                f"{list(sizes[projection])} (stored as {list(info.shape)})"
            )
    return ExpertShape(hidden, inter)


def check_dtype_in(info: TensorInfo, expected: Collection[str]) -> None:
    """:func:`check_dtype` where a format has several."""
    if info.dtype not in expected:
        raise CheckpointError(f"{info}: expected one of the dtypes {list(expected)}, found {info.dtype}")


def check_dtype(info: TensorInfo, expected: str) -> None:
    """``expected`` is safetensors' name of the dtype."""
    if info.dtype != expected:
        raise CheckpointError(f"{info}: expected dtype {expected}, found {info.dtype}")


def check_shape(info: TensorInfo, expected: tuple[int, ...], because: str) -> None:
    """``because`` says what the expectation follows from."""
    if info.shape != expected:
        raise CheckpointError(f"{info}: expected shape {list(expected)} ({because}), found {list(info.shape)}")


def check_block_scales(info: TensorInfo, sf: Tensor) -> None:
    """Refuse NaN and negative e4m3 block scales; zero is legal and makes its block zero."""
    try:
        weights.check_block_scales(str(info), sf)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def scalar(source: TensorSource, info: TensorInfo) -> float:
    """A single fp32 number, stored as ``[]`` or ``[1]``."""
    check_dtype(info, "F32")
    if info.shape not in ((), (1,)):
        raise CheckpointError(f"{info}: expected one number (shape [] or [1]), found shape {list(info.shape)}")
    return float(source.read(info.name).reshape(()))


def scale_problem(info: TensorInfo, value: float) -> str:
    """Why ``value`` cannot be a scale, ``""`` if it can: a scale is positive and finite."""
    if math.isfinite(value) and value > 0:
        return ""
    return f"{info}: found {value}; a scale must be positive and finite"


def check_decodable(source: TensorSource, location: ExpertLocation, matrices: Mapping[str, Nvfp4Tensor]) -> None:
    """Refuse global scales under which the largest code and block scale would decode to an Inf in fp32.

    ``matrices``: projection -> NVFP4 with a 0-d global scale.
    """
    limit = torch.finfo(torch.float32).max / GS_DIVISOR
    for projection, matrix in matrices.items():
        if not 0 < float(matrix.gs) <= limit:
            files = sorted({str(source[name].file) for name in location.tensors.values()})
            raise CheckpointError(
                f"{', '.join(files)}: {location}, {projection}: the global scale is {float(matrix.gs)}; expected a "
                f"positive one of {limit:.3g} at most, beyond which values decode to Inf"
            )
