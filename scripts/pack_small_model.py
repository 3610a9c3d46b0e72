#!/usr/bin/env python3
"""Quantize the small model's routed experts to NVFP4, in ModelOpt's layout, with calibrated input scales.

    python scripts/pack_small_model.py models/tiny-deepseek-v4/bf16 models/tiny-deepseek-v4/nvfp4

Everything that is not a routed expert is copied from the source tensor by tensor, in its own dtype. Input scales are
the running maximum of what reaches each expert while the NVFP4 model (activations in bf16) reads training text, the
held-out files excluded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from train_small_model import CONTEXT, is_held_out, stdlib_files, token_stream
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dsv4.integrations.transformers as dsv4_hf
from dsv4.checkpoints import InputScale
from dsv4.checkpoints.dense import quantize_expert
from dsv4.checkpoints.modelopt import expert_tensors, quantization_config
from dsv4.checkpoints.naming import DEEPSEEK_V4


def calibration_batches(folder: Path, windows: int, batch_size: int = 8) -> Iterator[torch.Tensor]:
    """Windows of training text, evenly spaced over all of it: int64 ``[batch_size, CONTEXT]``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    stream = token_stream(tokenizer, [text for name, text in stdlib_files() if not is_held_out(name)])
    starts = torch.linspace(0, stream.numel() - CONTEXT - 1, windows).long()
    yield from torch.stack([stream[start : start + CONTEXT] for start in starts]).split(batch_size)


def calibrated_scales(folder: Path, windows: int) -> dict[int, dsv4_hf.ActivationScales]:
    """Layer -> input scales of its experts, observed in the quantized model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    dsv4_hf.quantize_experts(model, activation_scale="calibrated", max_num_tokens=8 * CONTEXT)
    return dsv4_hf.calibrate(model, calibration_batches(folder, windows))


def pack(folder: Path, scales: dict[int, dsv4_hf.ActivationScales]) -> dict[str, torch.Tensor]:
    """All tensors of the NVFP4 checkpoint by name."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(folder / "model.safetensors", framework="pt") as source:
        names = set(source.keys())
        for layer, observed in scales.items():
            for expert in range(observed.l1.numel()):
                gate, up, down = (
                    DEEPSEEK_V4.tensor_name("model.", layer, expert, projection, "weight")
                    for projection in ("gate", "up", "down")
                )
                l1, l2 = (InputScale(scale[expert].item()) for scale in (observed.l1, observed.l2))
                weights = quantize_expert(*(source.get_tensor(name) for name in (gate, up, down)))
                weights = type(weights)(weights.gate, weights.up, weights.down, {"gate": l1, "up": l1, "down": l2})
                tensors |= expert_tensors(weights, layer, expert)
                names -= {gate, up, down}
        tensors |= {name: source.get_tensor(name) for name in names}
    return dict(sorted(tensors.items()))


def write(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint beside ``target`` and rename it into place, so that none is ever half there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = quantization_config()
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in source.iterdir():
            if file.suffix == ".json" and file.name != "config.json":
                shutil.copyfile(file, beside / file.name)
        if target.exists():
            shutil.rmtree(target)
        beside.chmod(0o755)
        for file in beside.iterdir():
            file.chmod(0o644)  # safetensors and mkdtemp create what only their owner can read
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the bf16 model")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--windows", type=int, default=128, help=f"calibration windows of {CONTEXT} tokens")
    args = parser.parse_args()
    tensors = pack(args.source, calibrated_scales(args.source, args.windows))
    write(args.source, args.target, tensors)
    size = (args.target / "model.safetensors").stat().st_size
    print(f"{args.target}: {len(tensors)} tensors, {size:,} bytes")


if __name__ == "__main__":
    main()
