"""ModelOpt NVFP4: the layout of NVIDIA's releases, read and written.

Per projection of an expert, with ``out x in`` the matrix:

==================  ==================================  ==============================================================
``weight``          uint8 ``[out, in/2]``               two e2m1 codes a byte, even K index in the low nibble
``weight_scale``    float8_e4m3fn ``[out, in/16]``      block scales, in row order (not swizzled)
``weight_scale_2``  float32 ``[]`` or ``[1]``           global scale, a multiplier on decode (``amax / 2688``)
``input_scale``     float32 ``[]`` or ``[1]``           the activation's global scale, likewise; may be absent
==================  ==================================  ==============================================================

gate and up have a ``weight_scale_2`` each, equal or not. Source: ModelOpt's unified Hugging Face export
(``modelopt.torch.export``) and the NVFP4 releases of DeepSeek-V4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertShape, ExpertWeights, InputScale
from dsv4.checkpoints.checks import check_block_scales, check_dtype, check_shape, require, scalar, scale_problem
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import DEEPSEEK_V4, PROJECTIONS, NameFamily
from dsv4.checkpoints.source import TensorInfo, TensorSource
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK, Nvfp4Tensor

WEIGHT = "weight"
BLOCK_SCALE = "weight_scale"
GLOBAL_SCALE = "weight_scale_2"
INPUT_SCALE = "input_scale"
_SUFFIXES = (WEIGHT, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE)


class ModelOptNvfp4:
    """The :class:`~dsv4.checkpoints.base.ExpertFormat` of ModelOpt NVFP4 checkpoints."""

    @property
    def name(self) -> str:
        return "modelopt-nvfp4"

    def detect(self, source: TensorSource, location: ExpertLocation, config: Mapping[str, Any]) -> bool:
        # Either sign will do: a tensor that is missing is then an error that names it, not an unknown format.
        return any(
            suffix == GLOBAL_SCALE or (suffix == WEIGHT and source[name].dtype == "U8")
            for (_, suffix), name in location.tensors.items()
        )

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        for (_, suffix), name in location.tensors.items():
            if suffix not in _SUFFIXES:
                # Not ignored: what it stands for (a bias, a pre-quantization scale) would change the result.
                raise CheckpointError(f"{source[name]}: not part of this format; expected only {list(_SUFFIXES)}")
        gate_shape = _matrix_shape(source, location, "gate")
        inter, hidden = gate_shape
        for projection, expected in (("up", (inter, hidden)), ("down", (hidden, inter))):
            info = require(source, location, projection, WEIGHT)
            check_shape(info, (expected[0], expected[1] // 2), f"{location}: gate is {inter} x {hidden}")
            _matrix_shape(source, location, projection)
        return ExpertShape(hidden, inter)

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        self.shape(source, location)
        gate, up, down = (_read_matrix(source, location, projection) for projection in PROJECTIONS)
        scales = {projection: _read_input_scale(source, location, projection) for projection in PROJECTIONS}
        return ExpertWeights(gate, up, down, scales)


def expert_tensors(
    weights: ExpertWeights, layer: int, expert: int, *, family: NameFamily = DEEPSEEK_V4, prefix: str = "model."
) -> dict[str, Tensor]:
    """One expert as ModelOpt stores it: tensor name -> contiguous CPU tensor of its own, ready for safetensors.

    Args:
        weights: what to write; a projection without an input scale value gets no ``input_scale`` tensor.
        layer: the decoder layer.
        expert: the global expert id.
        family: how to name the tensors.
        prefix: what to put before ``layers``, with its dot.
    """
    tensors: dict[str, Tensor] = {}
    for projection in PROJECTIONS:
        matrix = weights.projection(projection)
        parts = {WEIGHT: matrix.codes, BLOCK_SCALE: matrix.sf, GLOBAL_SCALE: matrix.gs.float().reshape(())}
        scale = weights.input_scales.get(projection)
        if scale is not None and scale.value is not None:
            parts[INPUT_SCALE] = torch.tensor(scale.value, dtype=torch.float32)
        for suffix, tensor in parts.items():
            name = family.tensor_name(prefix, layer, expert, projection, suffix)
            # A copy: gate and up may share their global scale, which safetensors refuses to write twice.
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def quantization_config(ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose routed experts are written by :func:`expert_tensors`.

    Args:
        ignore: module name patterns that are not quantized, for readers that need them listed.
    """
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "moe_quant_algo": "NVFP4",
        "group_size": BLOCK,
        "ignore": list(ignore),
    }


def _matrix_shape(source: TensorSource, location: ExpertLocation, projection: str) -> tuple[int, int]:
    """(out, in) of a projection, from headers that agree with each other."""
    weight = require(source, location, projection, WEIGHT)
    check_dtype(weight, "U8")
    if len(weight.shape) != 2 or 0 in weight.shape or weight.shape[1] % (BLOCK // 2):
        raise CheckpointError(
            f"{weight}: expected shape [out, in/2] with in a positive multiple of {BLOCK}, found {list(weight.shape)}"
        )
    rows, columns = weight.shape[0], weight.shape[1] * 2
    block_scale = require(source, location, projection, BLOCK_SCALE)
    check_dtype(block_scale, "F8_E4M3")
    check_shape(block_scale, (rows, columns // BLOCK), f"one scale for {BLOCK} of {rows} x {columns}")
    require(source, location, projection, GLOBAL_SCALE)
    return rows, columns


def _read_matrix(source: TensorSource, location: ExpertLocation, projection: str) -> Nvfp4Tensor:
    block_scale = require(source, location, projection, BLOCK_SCALE)
    sf = source.read(block_scale.name)
    check_block_scales(block_scale, sf)
    global_scale = require(source, location, projection, GLOBAL_SCALE)
    value = scalar(source, global_scale)
    problem = scale_problem(global_scale, value)
    if problem:
        raise CheckpointError(problem)
    codes = source.read(require(source, location, projection, WEIGHT).name)
    return Nvfp4Tensor(codes, sf, torch.tensor(value, dtype=torch.float32))


def _read_input_scale(source: TensorSource, location: ExpertLocation, projection: str) -> InputScale:
    name = location.tensors.get((projection, INPUT_SCALE))
    if name is None:
        expected = location.expected_name(projection, INPUT_SCALE)
        weight: TensorInfo = require(source, location, projection, WEIGHT)
        return InputScale(problem=f"{weight.file}: tensor {expected!r} is missing")
    value = scalar(source, source[name])
    problem = scale_problem(source[name], value)
    return InputScale(problem=problem) if problem else InputScale(value)
