"""What ``config.json`` and ``hf_quant_config.json`` say about how the experts are quantized.

Releases state it in several places: DeepSeek-V4 in NVFP4 keeps ``quant_method: "fp8"`` for the rest of the model and
adds ``moe_quant_algo: "NVFP4"``; ModelOpt's exports have ``quant_algo``, with ``"MIXED_PRECISION"`` and
``quantized_layers`` where modules differ; compressed-tensors has a ``format``, of its own or of each of its groups. The
tensors themselves are the authority on the format; what is taken from here is the group size, which must be NVFP4's 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.checkpoints.files import read_json
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK

HF_QUANT_CONFIG = "hf_quant_config.json"
ACTIVATIONS_KEY = "moe_activations"
"""In ``quantization_config``, written by ``dsv4 convert``: whether the experts have input scales (``"static"``), and if
not, whether they are W4A16 (``"weight-only"``) or quantize activations with a scale a token (``"dynamic"``)."""
_ACTIVATIONS = ("static", "weight-only", "dynamic")
_NVFP4 = "NVFP4"
_COMPRESSED_TENSORS = "nvfp4-pack-quantized"


@dataclass(frozen=True)
class QuantizationInfo:
    """How a checkpoint says it is quantized.

    Attributes:
        method: ``quant_method`` (``"fp8"``, ``"modelopt"``, ...), "" where not stated.
        expert_algorithm: the algorithm of the routed experts (``"NVFP4"``, ...), "" where not stated.
        group_size: values that share a block scale, None where not stated.
        activations: ``"static"``, ``"weight-only"`` or ``"dynamic"`` where :data:`ACTIVATIONS_KEY` says how the experts
            are to be run, "" where it is not there.
    """

    method: str = ""
    expert_algorithm: str = ""
    group_size: int | None = None
    activations: str = ""


def read_quantization(folder: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    """Read what is stated; everything is optional.

    Args:
        folder: the checkpoint's folder, for ``hf_quant_config.json``.
        config: ``config.json``.

    Raises:
        CheckpointError: NVFP4 experts with a group size other than 16, or entries of the wrong type.
    """
    sections = [
        (folder / "config.json", config.get("quantization_config")),
        (folder / HF_QUANT_CONFIG, read_json(folder / HF_QUANT_CONFIG).get("quantization")),
    ]
    method = algorithm = activations = ""
    group_size: int | None = None
    for file, section in sections:
        if section is None:
            continue
        if not isinstance(section, dict):
            raise CheckpointError(f"{file}: the quantization entry must be an object, found {section!r:.80}")
        method = method or str(section.get("quant_method") or "")
        algorithm = algorithm or _expert_algorithm(section)
        stated = section.get(ACTIVATIONS_KEY)
        if stated is not None and stated not in _ACTIVATIONS:
            raise CheckpointError(
                f"{file}: {ACTIVATIONS_KEY} must be one of {list(_ACTIVATIONS)}, found {stated!r:.80}"
            )
        activations = activations or str(stated or "")
        for where, size in _nvfp4_group_sizes(section):
            if size != BLOCK:
                raise CheckpointError(
                    f"{file}: {where:.200} is {size!r:.80}; NVFP4 has {BLOCK} values to a block scale, and nothing "
                    f"else is supported"
                )
            group_size = BLOCK
    return QuantizationInfo(method, algorithm, group_size, activations)


def _expert_algorithm(section: Mapping[str, Any]) -> str:
    if section.get("moe_quant_algo"):
        return str(section["moe_quant_algo"])
    for module, entry in _entries(section, "quantized_layers"):
        if module.endswith("experts") or ".experts." in module:
            return str(entry.get("quant_algo") or "")
    if section.get("quant_algo"):
        return str(section["quant_algo"])
    return _NVFP4 if any(_packed_groups(section)) else ""


def _nvfp4_group_sizes(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of the group sizes that are NVFP4's; FP8's and INT4's are none of our business."""
    if _NVFP4 in (section.get("moe_quant_algo"), section.get("quant_algo")) and section.get("group_size") is not None:
        yield "group_size", section["group_size"]
    for module, entry in _entries(section, "quantized_layers"):
        if entry.get("quant_algo") == _NVFP4 and entry.get("group_size") is not None:
            yield f"quantized_layers[{module!r}].group_size", entry["group_size"]
    modelopt = _entries(section, "config_groups") if section.get("quant_algo") == _NVFP4 else ()
    for groups in (modelopt, _packed_groups(section)):
        for group, entry in groups:
            weights = entry.get("weights")
            if isinstance(weights, dict) and weights.get("group_size") is not None:
                yield f"config_groups[{group!r}].weights.group_size", weights["group_size"]


def _packed_groups(section: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config groups of compressed-tensors that are NVFP4."""
    for group, entry in _entries(section, "config_groups"):
        if (entry.get("format") or section.get("format")) == _COMPRESSED_TENSORS:
            yield group, entry


def _entries(section: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = section.get(key)
    if isinstance(entries, dict):
        yield from ((str(name), entry) for name, entry in entries.items() if isinstance(entry, dict))
