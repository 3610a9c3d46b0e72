"""compressed-tensors ``nvfp4-pack-quantized``: the layout of llm-compressor's exports.

Per projection of an expert, with ``out x in`` the matrix:

=======================  =============================  ==============================================================
``weight_packed``        uint8 ``[out, in/2]``          two e2m1 codes a byte, even K index in the low nibble
``weight_scale``         float8_e4m3fn ``[out, in/16]`` block scales, in row order
``weight_global_scale``  float32 ``[1]``                global scale, a **divisor** on decode (``2688 / amax``)
``input_global_scale``   float32 ``[1]``                the activation's global scale, likewise; may be absent
=======================  =============================  ==============================================================

The library decodes ``e2m1 * (sf / divisor)``, this one ``e2m1 * sf * (1 / divisor)``, as vLLM does: the same number
within the rounding of one fp32 operation, the same bits where the divisor is a power of two.

Source: ``compressed_tensors.compressors.nvfp4`` and its ``QuantizationConfig``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dsv4.checkpoints.base import ExpertShape, ExpertWeights
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.nvfp4_layout import Nvfp4Layout
from dsv4.checkpoints.source import TensorSource
from dsv4.errors import CheckpointError

FORMAT = "nvfp4-pack-quantized"
LAYOUT = Nvfp4Layout("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divisor=True)

# Where a rotation is applied to activations at run time; all others are part of the stored weights.
_ONLINE = ("input", "output")


class CompressedTensorsNvfp4:
    """The :class:`~dsv4.checkpoints.base.ExpertFormat` of compressed-tensors NVFP4 checkpoints."""

    @property
    def name(self) -> str:
        return "compressed-tensors-nvfp4"

    def detect(self, source: TensorSource, location: ExpertLocation, config: Mapping[str, Any]) -> bool:
        """A tensor that only this format has, or a config group of it and packed weights.

        Raises:
            CheckpointError: the configuration asks for rotations at run time.
        """
        suffixes = {suffix for _, suffix in location.tensors}
        stated = FORMAT in _formats(config)
        if LAYOUT.global_scale not in suffixes and not (stated and LAYOUT.weight in suffixes):
            return False
        for where in _online_transforms(config):
            raise CheckpointError(
                f"config.json: quantization_config.transform_config applies a rotation to activations ({where}), which "
                f"these experts do not compute; expected a checkpoint without transforms, or with offline ones"
            )
        return True

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        return LAYOUT.shape(source, location)

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        return LAYOUT.read_expert(source, location)


def _formats(config: Mapping[str, Any]) -> set[str]:
    """The formats that the configuration states, for the whole and for its groups."""
    section = _object(config.get("quantization_config"))
    groups = _object(section.get("config_groups")).values()
    return {str(entry.get("format")) for entry in (section, *map(_object, groups))}


def _online_transforms(config: Mapping[str, Any]) -> Iterator[str]:
    transforms = _object(_object(config.get("quantization_config")).get("transform_config"))
    for name, scheme in _object(transforms.get("config_groups")).items():
        steps = _object(scheme).get("apply")
        for step in steps if isinstance(steps, list) else ():
            if _object(step).get("location") in _ONLINE:
                yield f"{name}: {step}"[:200]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
