"""Checks that formats share. Each names the file and the tensor, what was found and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4 import weights
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
