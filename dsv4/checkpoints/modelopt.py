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

from dsv4.checkpoints.base import ExpertShape, ExpertWeights
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import DEEPSEEK_V4, PROJECTIONS, NameFamily
from dsv4.checkpoints.nvfp4_layout import Nvfp4Layout
from dsv4.checkpoints.source import TensorSource
from dsv4.nvfp4 import BLOCK

WEIGHT = "weight"
BLOCK_SCALE = "weight_scale"
GLOBAL_SCALE = "weight_scale_2"
INPUT_SCALE = "input_scale"
LAYOUT = Nvfp4Layout(WEIGHT, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE)


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
        return LAYOUT.shape(source, location)

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        return LAYOUT.read_expert(source, location)


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
