"""Plain bf16, fp16 or fp32 experts, quantized to NVFP4 while reading.

Two layouts: a ``weight [out, in]`` for every projection of every expert, and Transformers' fused tensors, one a layer:
``gate_up_proj [E, 2I, H]`` (rows of gate, then of up) and ``down_proj [E, H, I]``, of which an expert's rows are read.
The numbers are those of :func:`dsv4.checkpoints.dense.quantize_expert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertShape, ExpertWeights, InputScale
from dsv4.checkpoints.checks import check_dtype_in, check_matrices, check_shape, check_suffixes, matrix_size, require
from dsv4.checkpoints.dense import quantize_expert
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.source import TensorInfo, TensorSource
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK

WEIGHT = "weight"
_DTYPES = ("BF16", "F16", "F32")
_FUSED_SUFFIX = ""
# What may belong to a fused tensor, and would change the result if it were ignored.
_COMPANIONS = ("_bias", "_scale", "_scale_inv", "_scales", "_blocks")


@dataclass(frozen=True)
class DenseExperts:
    """The :class:`~dsv4.checkpoints.base.ExpertFormat` of floating-point checkpoints.

    Attributes:
        four_over_six: quantize with 4-over-6 block scales: see :mod:`dsv4.nvfp4`.
    """

    four_over_six: bool = False

    @property
    def name(self) -> str:
        return "dense"

    def detect(self, source: TensorSource, location: ExpertLocation, config: Mapping[str, Any]) -> bool:
        return any(
            suffix in (WEIGHT, _FUSED_SUFFIX) and source[name].dtype in _DTYPES
            for (_, suffix), name in location.tensors.items()
        )

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        if location.family.fused:
            return _fused_shape(source, location)
        check_suffixes(source, location, (WEIGHT,))
        sizes = {}
        for projection in PROJECTIONS:
            info = require(source, location, projection, WEIGHT)
            check_dtype_in(info, _DTYPES)
            sizes[projection] = matrix_size(info, BLOCK)
        return check_matrices(source, location, WEIGHT, sizes)

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        self.shape(source, location)
        if location.family.fused:
            parts: Mapping[str, str] = {"gate_up": _FUSED_SUFFIX, "down": _FUSED_SUFFIX}
        else:
            parts = dict.fromkeys(PROJECTIONS, WEIGHT)
        infos = [require(source, location, projection, suffix) for projection, suffix in parts.items()]
        matrices = [_read(source, info, location, device) for info in infos]
        *l1, down = matrices
        gate, up = l1[0].chunk(2) if location.family.fused else l1
        quantized = quantize_expert(gate, up, down, four_over_six=self.four_over_six)
        none = InputScale(problem=f"{infos[0].file}: {location}: floating-point checkpoints have no input scales")
        return ExpertWeights(quantized.gate, quantized.up, quantized.down, dict.fromkeys(PROJECTIONS, none))


def _fused_shape(source: TensorSource, location: ExpertLocation) -> ExpertShape:
    gate_up, down = (require(source, location, projection, _FUSED_SUFFIX) for projection in ("gate_up", "down"))
    for info in (gate_up, down):
        check_dtype_in(info, _DTYPES)
        for companion in _COMPANIONS:
            if info.name + companion in source:
                raise CheckpointError(
                    f"{source[info.name + companion]}: not part of this format; expected only {info.name!r}"
                )
    if len(gate_up.shape) != 3 or 0 in gate_up.shape or gate_up.shape[1] % (2 * BLOCK) or gate_up.shape[2] % BLOCK:
        raise CheckpointError(
            f"{gate_up}: expected shape [E, 2I, H] with I and H positive multiples of {BLOCK}, found "
            f"{list(gate_up.shape)}"
        )
    experts, rows, hidden = gate_up.shape
    check_shape(down, (experts, hidden, rows // 2), f"[E, H, I]: {gate_up.name} is {list(gate_up.shape)}")
    return ExpertShape(hidden, rows // 2)


def _read(source: TensorSource, info: TensorInfo, location: ExpertLocation, device: torch.device) -> Tensor:
    """One matrix on ``device``, all of it finite."""
    if location.family.fused:
        matrix: Tensor = source.slice(info.name)[location.expert]
    else:
        matrix = source.read(info.name)
    matrix = matrix.to(device)
    finite = matrix.isfinite()
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"{info}: {location}: found {matrix[tuple(index)].item()} at {index} ({int((~finite).sum())} such in all); "
            f"weights must be finite"
        )
    return matrix
