"""What the layouts of NVFP4 checkpoints have in common: the same four tensors under other names.

Per projection of an expert: codes uint8 ``[out, in/2]``, block scales float8_e4m3fn ``[out, in/16]`` in row order, a
global scale and an input scale, fp32 ``[]`` or ``[1]``. A layout says what they are called and whether the two scalars
are multipliers (``amax / 2688``) or divisors (``2688 / amax``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4.checkpoints.base import ExpertShape, ExpertWeights, InputScale
from dsv4.checkpoints.checks import (
    check_block_scales,
    check_dtype,
    check_matrices,
    check_shape,
    check_suffixes,
    matrix_size,
    require,
    scalar,
    scale_problem,
)
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.source import TensorInfo, TensorSource
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK, Nvfp4Tensor


@dataclass(frozen=True)
class Nvfp4Layout:
    """The suffixes of the four tensors, and what the scalars are.

    Attributes:
        weight, block_scale, global_scale, input_scale: suffixes; only the last may be absent from a checkpoint.
        divisor: the scalars divide on decode, and are turned into multipliers here: one fp32 division, rounded to
            nearest, as vLLM does it.
    """

    weight: str
    block_scale: str
    global_scale: str
    input_scale: str
    divisor: bool = False

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        """H and I from headers that agree with each other; see :class:`~dsv4.checkpoints.base.ExpertFormat`."""
        check_suffixes(source, location, (self.weight, self.block_scale, self.global_scale, self.input_scale))
        sizes = {projection: self._matrix_size(source, location, projection) for projection in PROJECTIONS}
        return check_matrices(source, location, self.weight, sizes)

    def read_expert(self, source: TensorSource, location: ExpertLocation) -> ExpertWeights:
        """One expert, as views of the file; see :class:`~dsv4.checkpoints.base.ExpertFormat`."""
        self.shape(source, location)
        gate, up, down = (self._read_matrix(source, location, projection) for projection in PROJECTIONS)
        scales = {projection: self._read_input_scale(source, location, projection) for projection in PROJECTIONS}
        return ExpertWeights(gate, up, down, scales)

    def _matrix_size(self, source: TensorSource, location: ExpertLocation, projection: str) -> tuple[int, int]:
        weight = require(source, location, projection, self.weight)
        check_dtype(weight, "U8")
        rows, columns = matrix_size(weight, BLOCK, packed=True)
        block_scale = require(source, location, projection, self.block_scale)
        check_dtype(block_scale, "F8_E4M3")
        check_shape(block_scale, (rows, columns // BLOCK), f"one scale for {BLOCK} of {rows} x {columns}")
        require(source, location, projection, self.global_scale)
        return rows, columns

    def _read_matrix(self, source: TensorSource, location: ExpertLocation, projection: str) -> Nvfp4Tensor:
        block_scale = require(source, location, projection, self.block_scale)
        sf = source.read(block_scale.name)
        check_block_scales(block_scale, sf)
        scale = self._scale(source, require(source, location, projection, self.global_scale))
        if scale.value is None:
            raise CheckpointError(scale.problem)
        codes = source.read(require(source, location, projection, self.weight).name)
        return Nvfp4Tensor(codes, sf, torch.tensor(scale.value, dtype=torch.float32))

    def _read_input_scale(self, source: TensorSource, location: ExpertLocation, projection: str) -> InputScale:
        name = location.tensors.get((projection, self.input_scale))
        if name is None:
            expected = location.expected_name(projection, self.input_scale)
            weight = require(source, location, projection, self.weight)
            return InputScale(problem=f"{weight.file}: tensor {expected!r} is missing")
        return self._scale(source, source[name])

    def _scale(self, source: TensorSource, info: TensorInfo) -> InputScale:
        """The stored scalar as a multiplier, or what is wrong with it."""
        stored = scalar(source, info)
        problem = scale_problem(info, stored)
        if problem or not self.divisor:
            return InputScale(problem=problem) if problem else InputScale(stored)
        value = float(torch.ones(()) / torch.tensor(stored))
        if value == float("inf"):
            return InputScale(problem=f"{info}: found {stored}; a divisor must have a reciprocal in fp32")
        return InputScale(value)
