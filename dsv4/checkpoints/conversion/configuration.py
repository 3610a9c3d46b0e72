"""The JSON files of a converted checkpoint: ``config.json``'s quantization section, and the index.

Which section it is depends on what is *not* converted:

* In FP8 blocks (DeepSeek's releases): ``quant_method`` stays ``"fp8"`` with all that belongs to it, and
  ``moe_quant_algo: "NVFP4"`` says what the experts are, as NVIDIA's NVFP4 releases of DeepSeek-V4 have it. vLLM takes
  its NVFP4 experts from there; ``expert_dtype``, where the configuration has it, must then be ``"fp4"``. Experts of the
  multi-token prediction head are passed through as they were: ``quantized_layers`` lists the others, ``ignore`` these.
* Not quantized: ``quant_method: "modelopt"``, with every module outside the experts under ``ignore``.
* ModelOpt's already: the section stays.

All say under ``moe_activations`` whether there are input scales, and what to do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4.checkpoints.base import ExpertFormat
from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.conversion.plan import ShardPlan, target_family
from dsv4.checkpoints.conversion.scales import Activations
from dsv4.checkpoints.files import INDEX_NAME, read_json
from dsv4.checkpoints.modelopt import ModelOptNvfp4, quantization_config
from dsv4.checkpoints.quantization import ACTIVATIONS_KEY
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK

_NVFP4 = "NVFP4"
_PACKED = ("F8_E4M3", "F8_E5M2", "U8", "I8", "I32", "F4")


def target_config(checkpoint: Checkpoint, activations: Activations) -> dict[str, Any]:
    """``config.json`` of the target.

    Raises:
        CheckpointError: other modules are quantized in a way that cannot be stated beside ModelOpt's experts.
    """
    config = dict(checkpoint.config)
    section = config.get("quantization_config")
    section = dict(section) if isinstance(section, dict) else {}
    if section.get("quant_method") == "fp8":
        section |= _beside_fp8(checkpoint)
        if "expert_dtype" in config:
            config["expert_dtype"] = "fp4"
    elif not (section and _is_modelopt(checkpoint.format)):
        if not _is_modelopt(checkpoint.format):
            _check_not_quantized(checkpoint, str(section.get("quant_method") or "none"))
        section = quantization_config(tuple(ignored_modules(checkpoint)))
    config["quantization_config"] = section | {ACTIVATIONS_KEY: activations}
    return config


def target_index(checkpoint: Checkpoint, plans: Sequence[ShardPlan]) -> dict[str, Any] | None:
    """The index of the target, with what the source's says beside the map; None where one file needs none."""
    source = read_json(checkpoint.folder / INDEX_NAME) if checkpoint.path.is_dir() else {}
    if not source and len(plans) == 1:
        return None
    metadata = source.get("metadata")
    weight_map = {name: plan.name for plan in plans for name in plan.names}
    return source | {
        "metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": sum(p.data_bytes for p in plans)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def ignored_modules(checkpoint: Checkpoint) -> list[str]:
    """Modules with matrices that are not routed experts, as patterns that match no routed expert.

    Each is as short as that allows: ``model.layers.0.self_attn.*`` for all that is in it, ``lm_head``. Engines fuse
    modules (``q_proj`` and ``k_proj`` into ``qkv_proj``), so a pattern for the module above serves them better than
    names.
    """
    containers = [path.split(".") for path in expert_modules(checkpoint)]
    ancestors = {".".join(path[:depth]) for path in containers for depth in range(1, len(path) + 1)}
    patterns: set[str] = set()
    for name in checkpoint.other_tensors():
        module, _, attribute = name.rpartition(".")
        if not module or not attribute.startswith("weight") or len(checkpoint.source[name].shape) < 2:
            continue
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in ancestors:
                patterns.add(path if depth == len(parts) else f"{path}.*")
                break
    return sorted(patterns)


def expert_modules(checkpoint: Checkpoint) -> list[str]:
    """The path of each layer's experts in the target: ``model.layers.3.mlp.experts``."""
    result = []
    for layer in checkpoint.moe_layers:
        location = checkpoint.location(layer, 0)
        name = target_family(location.family).tensor_name(location.prefix, layer, 0, "gate", "weight")
        result.append(name.rpartition(".experts.")[0] + ".experts")
    return result


def _is_modelopt(expert_format: ExpertFormat) -> bool:
    return isinstance(expert_format, ModelOptNvfp4)


def _beside_fp8(checkpoint: Checkpoint) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": _NVFP4,
        "group_size": BLOCK,
        "quantized_layers": {
            module: {"quant_algo": _NVFP4, "group_size": BLOCK} for module in expert_modules(checkpoint)
        },
    }
    if any(_is_prediction_expert(name) for name in checkpoint.other_tensors()):
        entries["ignore"] = ["mtp.*"]
    return entries


def _is_prediction_expert(name: str) -> bool:
    return name.startswith("mtp.") and ".experts." in name


def _check_not_quantized(checkpoint: Checkpoint, method: str) -> None:
    for name in checkpoint.other_tensors():
        info = checkpoint.source[name]
        if info.dtype in _PACKED and name.rpartition(".")[2].startswith("weight"):
            raise CheckpointError(
                f"{info}: not a routed expert and stored as {info.dtype} under quant_method {method!r}, which cannot "
                f"stand beside experts in ModelOpt's layout; expected other weights in a floating-point dtype, or in "
                f"FP8 blocks under quant_method 'fp8'"
            )
