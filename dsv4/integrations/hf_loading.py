"""Loading a Transformers model without its routed experts: for :mod:`dsv4.integrations.transformers`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dsv4.checkpoints import Checkpoint
from dsv4.checkpoints.source import torch_dtype
from dsv4.errors import CheckpointError, ConfigError, Dsv4Error
from dsv4.integrations.hf_experts import IMPLEMENTATION, ExpertsModule, find_experts, strip


def load_without_experts(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel] | None,
    dtype: str | torch.dtype,
    kwargs: Mapping[str, Any],
) -> tuple[PreTrainedModel, list[ExpertsModule]]:
    """The model with everything but its experts, which are stripped, and the experts modules to fill.

    Transformers loads from a state dict without the experts, into a subclass of the model whose experts lose their
    parameters while the model is still on the meta device: nothing of their size is ever allocated.
    """
    if "model_type" not in checkpoint.config:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: expected a model configuration with 'model_type'")
    _check_num_layers(checkpoint)
    with _reading(checkpoint.folder / "config.json"):
        # Never code that comes with the checkpoint: without an answer, Transformers would ask the terminal.
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    rest = _rest_quantization(checkpoint)
    if rest is not None:
        config.quantization_config = rest
    original = model_class or _causal_lm_class(config)
    found: list[ExpertsModule] = []

    def init(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
        super(stripped, self).__init__(config, *args, **options)
        found[:] = find_experts(self)
        for experts in found:
            _check_fits(checkpoint, experts)
            strip(experts.module)

    # Transformers looks at a model class's name and module, so the subclass bears those of the original.
    names = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    stripped: Any = type(original.__name__, (original,), {**names, "__init__": init})
    rest_dtype = _rest_dtype(checkpoint, config) if dtype == "auto" else dtype
    with _reading(checkpoint.path):
        model, info = stripped.from_pretrained(
            None,
            config=config,
            state_dict={name: checkpoint.source.slice(name) for name in checkpoint.other_tensors()},
            dtype=rest_dtype,
            experts_implementation=IMPLEMENTATION,
            output_loading_info=True,
            **kwargs,
        )
    model.__class__ = original
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} weights of {original.__name__} are missing: {missing[:8]}"
        )
    _settle_norms(model)
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    if model.can_generate() and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.folder)
    return model, found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What Transformers raises about a checkpoint's files, of whatever kind, is an error of the checkpoint."""
    try:
        yield
    except (Dsv4Error, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path}: Transformers cannot load it ({type(error).__name__}: {first:.500})") from error


def _generation_config(folder: Path) -> GenerationConfig:
    """``generation_config.json``, of the right types: Transformers looks at them only when text is generated.

    Whole numbers are taken for temperatures and the like, which Transformers refuses; a temperature of 0 is greedy.
    """
    file = folder / "generation_config.json"
    with _reading(file):
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for key, most in (("temperature", math.inf), ("repetition_penalty", math.inf), ("top_p", 1.0)):
        value = getattr(config, key, None)
        if value is None:
            continue
        number = float(value) if type(value) in (int, float) and abs(value) < 1e9 else math.nan
        if key == "temperature" and number == 0:
            config.do_sample, number = False, 1.0
        if not 0 < number <= most:
            raise CheckpointError(f"{file}: {key} must be a positive number, {most:g} at most, found {value!r:.80}")
        setattr(config, key, number)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or abs(token) >= 2**31 for token in ids):
            raise CheckpointError(f"{file}: {key} must be a token id, or a list of them, found {value!r:.80}")
    return config


def _check_num_layers(checkpoint: Checkpoint) -> None:
    """Refuse more layers than the tensors have: Transformers makes a module, or a list entry, for every one."""
    names = (re.search(r"(?:^|\.)layers\.(\d{1,5})\.", name) for name in checkpoint.source)
    there = 1 + max((int(match[1]) for match in names if match), default=0)
    nested = checkpoint.config.get("text_config")
    for section in (checkpoint.config, nested if isinstance(nested, dict) else {}):
        stated = section.get("num_hidden_layers")
        if stated is not None and (type(stated) is not int or not 0 < stated <= there):
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: num_hidden_layers is {stated!r:.80}, but the tensors are those "
                f"of {there} layers"
            )


def _causal_lm_class(config: Any) -> type[PreTrainedModel]:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{type(config).__name__} has no causal language model in Transformers; pass model_class")
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _rest_quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The quantization config for what is not an expert; None where that is not quantized.

    NVFP4 releases of DeepSeek-V4 keep the rest of the model in FP8 blocks under the same ``quantization_config``.
    """
    fp8 = next((name for name in checkpoint.other_tensors() if checkpoint.source[name].dtype == "F8_E4M3"), None)
    if fp8 is None:
        return None
    section = checkpoint.config.get("quantization_config") or {}
    if section.get("quant_method") != "fp8":
        raise ConfigError(
            f"{checkpoint.source[fp8]}: stored in FP8, but config.json has no quantization_config with quant_method "
            f"'fp8' (found {section.get('quant_method')!r}); only FP8 blocks as Transformers reads them are supported"
        )
    known = ("quant_method", "activation_scheme", "weight_block_size", "scale_fmt")
    skipped = section.get("modules_to_not_convert") or section.get("ignored_layers") or ["lm_head"]
    # The second is a pattern, by which the FP8 quantizer leaves the experts modules alone.
    return {key: section[key] for key in known if key in section} | {
        "modules_to_not_convert": [*skipped, r".*\.experts"]
    }


def _rest_dtype(checkpoint: Checkpoint, config: Any) -> torch.dtype:
    """The dtype that the configuration states, else that of the first floating-point tensor."""
    stated = getattr(config, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    dtypes = (torch_dtype(checkpoint.source[name]) for name in checkpoint.other_tensors())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)


def _settle_norms(model: PreTrainedModel) -> None:
    """Give norms that return another dtype than they are given weights of the model's dtype.

    Transformers keeps DeepSeek-V4's norm weights in fp32. Its RMSNorm of 5.17 then returns fp32, which the bf16 matrix
    behind it refuses; later versions cast. The probe tells them apart without a list of versions.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
            continue
        probe = torch.zeros(1, weight.numel(), dtype=model.dtype, device=weight.device)
        if weight.dtype != model.dtype and module(probe).dtype != model.dtype:
            module.to(model.dtype)


def _check_fits(checkpoint: Checkpoint, experts: ExpertsModule) -> None:
    if experts.layer not in checkpoint.moe_layers:
        raise CheckpointError(
            f"{checkpoint.path}: the model has experts in layer {experts.layer} ({experts.name}), the checkpoint only "
            f"in layers {list(checkpoint.moe_layers)}"
        )
    expected = (experts.num_experts, experts.shape)
    if (checkpoint.num_experts, checkpoint.shape) != expected:
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.num_experts} experts ({checkpoint.shape}), but config.json makes a model "
            f"with {experts.num_experts} ({experts.shape}) in {experts.name}"
        )
