"""Checkpoints for the tests, written with safetensors alone, and a float64 decoder that shares no code with dsv4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTER, EXPERTS = 64, 32, 4
DEEPSEEK = ("ffn", {"gate": "w1", "up": "w3", "down": "w2"})
QWEN = ("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


def expert(seed: int, hidden: int = HIDDEN, inter: int = INTER, scales: bool = True) -> dict[str, dict[str, Tensor]]:
    """projection -> suffix -> tensor: random codes, random legal block scales (zeros included), distinct scalars."""
    g = torch.Generator().manual_seed(seed)
    result = {}
    for number, (projection, rows, columns) in enumerate(
        (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter))
    ):
        parts = {
            "weight": torch.randint(0, 256, (rows, columns // 2), generator=g, dtype=torch.uint8),
            "weight_scale": torch.randint(0, 0x7F, (rows, columns // 16), generator=g, dtype=torch.uint8).view(
                torch.float8_e4m3fn
            ),
            "weight_scale_2": torch.tensor(0.001 * (1 + seed) + 0.0001 * number),
        }
        if scales:
            # gate and up share one activation, hence one scale
            parts["input_scale"] = torch.tensor(0.01 * (1 + seed) + (0.005 if projection == "down" else 0.0))
        result[projection] = parts
    return result


def names(
    parts: dict[str, dict[str, Tensor]], layer: int, expert: int, family=DEEPSEEK, prefix: str = "model."
) -> dict[str, Tensor]:
    """Full tensor names of one expert."""
    block, projections = family
    return {
        f"{prefix}layers.{layer}.{block}.experts.{expert}.{projections[projection]}.{suffix}": tensor
        for projection, tensors in parts.items()
        for suffix, tensor in tensors.items()
    }


def layer_tensors(layer: int, experts: int = EXPERTS, family=DEEPSEEK, prefix: str = "model.") -> dict[str, Tensor]:
    """All experts of a layer; expert e of layer n has seed ``100 n + e``."""
    tensors: dict[str, Tensor] = {}
    for e in range(experts):
        tensors |= names(expert(100 * layer + e), layer, e, family, prefix)
    return tensors


def write(
    folder: Path, tensors: dict[str, Tensor], config: dict | None = None, file: str = "model.safetensors"
) -> Path:
    """One file (and config.json) in ``folder``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, tensors: dict[str, Tensor], shards: int = 2) -> Path:
    """Tensors dealt round-robin over shards, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % shards == shard}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def decode64(codes: Tensor, sf: Tensor, gs: float) -> Tensor:
    """float64 values of one matrix, from the definitions of e2m1 and e4m3, byte by byte."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
    table = torch.tensor(_E2M1 + [-v for v in _E2M1], dtype=torch.float64)
    scale_table = torch.tensor(
        [(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)],
        dtype=torch.float64,
    )
    scales = scale_table[sf.view(torch.uint8).long()].repeat_interleave(16, dim=-1)
    return table[nibbles] * scales * float(gs)


def decode_parts(parts: dict[str, Tensor]) -> Tensor:
    """float64 values of one projection of :func:`expert`."""
    return decode64(parts["weight"], parts["weight_scale"], float(parts["weight_scale_2"]))
