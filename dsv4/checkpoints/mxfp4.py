"""MXFP4: the routed experts of DeepSeek-V4's own release, cast to NVFP4 while reading.

Per projection of an expert, with ``out x in`` the matrix:

==========  ===========================================  =============================================================
``weight``  int8 (or uint8) ``[out, in/2]``              two e2m1 codes a byte, even K index in the low nibble
``scale``   float8_e8m0fnu (or uint8) ``[out, in/32]``   block scales, ``2^(byte - 127)``; byte 255 is NaN
==========  ===========================================  =============================================================

There is no global scale, and no input scale: activations are the reader's choice. What the cast keeps and what it
cannot is in :mod:`dsv4.checkpoints.mxfp4_cast`; each expert says so in ``recoded``. Sources: the configuration of the
release (``expert_dtype: "fp4"``) and Transformers' reader of it (``integrations/finegrained_fp8.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertShape, ExpertWeights, InputScale
from dsv4.checkpoints.checks import check_dtype_in, check_matrices, check_shape, check_suffixes, matrix_size, require
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.mxfp4_cast import E8M0_NAN, MX_BLOCK, cast_mxfp4
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.source import TensorSource
from dsv4.errors import CheckpointError

WEIGHT = "weight"
SCALE = "scale"


class Mxfp4:
    """The :class:`~dsv4.checkpoints.base.ExpertFormat` of MXFP4 checkpoints."""

    @property
    def name(self) -> str:
        return "mxfp4"

    def detect(self, source: TensorSource, location: ExpertLocation, config: Mapping[str, Any]) -> bool:
        # Either sign will do: a tensor that is missing is then an error that names it, not an unknown format.
        suffixes = {suffix for _, suffix in location.tensors}
        int8 = any(source[name].dtype == "I8" for (_, suffix), name in location.tensors.items() if suffix == WEIGHT)
        return SCALE in suffixes or (int8 and suffixes == {WEIGHT})

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        check_suffixes(source, location, (WEIGHT, SCALE))
        sizes = {projection: _matrix_size(source, location, projection) for projection in PROJECTIONS}
        return check_matrices(source, location, WEIGHT, sizes)

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        self.shape(source, location)
        gate, up, down = (_read_matrix(source, location, projection, device) for projection in PROJECTIONS)
        l1, l1_report = cast_mxfp4(gate, up)
        l2, l2_report = cast_mxfp4(down)
        matrices = dict(zip(PROJECTIONS, (*l1, *l2), strict=True))
        file = source[location.tensors["gate", WEIGHT]].file
        none = InputScale(problem=f"{file}: {location}: MXFP4 checkpoints have no input scales")
        return ExpertWeights(**matrices, input_scales=dict.fromkeys(PROJECTIONS, none), recoded=l1_report + l2_report)


def _matrix_size(source: TensorSource, location: ExpertLocation, projection: str) -> tuple[int, int]:
    """(out, in) of a projection, from headers that agree with each other."""
    weight = require(source, location, projection, WEIGHT)
    check_dtype_in(weight, ("I8", "U8"))
    rows, columns = matrix_size(weight, MX_BLOCK, packed=True)
    scale = require(source, location, projection, SCALE)
    check_dtype_in(scale, ("F8_E8M0", "U8"))
    check_shape(scale, (rows, columns // MX_BLOCK), f"one scale for {MX_BLOCK} of {rows} x {columns}")
    return rows, columns


def _read_matrix(
    source: TensorSource, location: ExpertLocation, projection: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(codes, scale) as uint8 on ``device``."""
    info = require(source, location, projection, SCALE)
    scale = source.read(info.name).view(torch.uint8).to(device)
    nan = scale == E8M0_NAN
    if bool(nan.any()):
        raise CheckpointError(
            f"{info}: found NaN (e8m0 byte {E8M0_NAN}) at {[int(i) for i in nan.nonzero()[0]]} ({int(nan.sum())} such "
            f"in all); a block scale must be a power of two"
        )
    codes = source.read(require(source, location, projection, WEIGHT).name)
    return codes.view(torch.uint8).to(device), scale
