"""Checkpoints to convert, in each readable format, with all that is not a routed expert; and their raw bytes.

Sources are written with safetensors and json alone.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4.checkpoints.conversion import convert

from . import make

LAYERS = (0, 2)
STATIC = ("modelopt", "compressed-tensors")
"""The kinds that have input scales."""

KINDS = ("dense", "dense-fused", "mxfp4", "modelopt", "compressed-tensors")

FP8_SECTION = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "scale_fmt": "ue8m0",
}


def dense_matrices(layer: int, expert: int) -> dict[str, Tensor]:
    """gate, up ``[I, H]`` and down ``[H, I]`` in bf16."""
    g = torch.Generator().manual_seed(1000 * layer + expert)
    sizes = {"gate": (make.INTER, make.HIDDEN), "up": (make.INTER, make.HIDDEN), "down": (make.HIDDEN, make.INTER)}
    return {name: (torch.randn(size, generator=g) * 0.05).bfloat16() for name, size in sizes.items()}


def _parts(kind: str, layer: int, expert: int) -> dict[str, dict[str, Tensor]]:
    """projection -> suffix -> tensor."""
    if kind == "dense":
        return {name: {"weight": matrix} for name, matrix in dense_matrices(layer, expert).items()}
    parts = make.expert(100 * layer + expert)
    if kind == "modelopt":
        return parts
    if kind == "compressed-tensors":
        return {
            name: {
                "weight_packed": part["weight"],
                "weight_scale": part["weight_scale"],
                "weight_global_scale": 1 / part["weight_scale_2"].reshape(1),
                "input_global_scale": 1 / part["input_scale"].reshape(1),
            }
            for name, part in parts.items()
        }
    g = torch.Generator().manual_seed(1000 * layer + expert)
    return {
        name: {
            "weight": part["weight"].view(torch.int8),
            "scale": torch.randint(115, 127, (part["weight"].shape[0], part["weight"].shape[1] // 16), generator=g).to(
                torch.uint8
            ),
        }
        for name, part in parts.items()
    }


def expert_tensors(kind: str, family=make.DEEPSEEK) -> dict[str, Tensor]:
    """All routed experts by name."""
    tensors: dict[str, Tensor] = {}
    for layer in LAYERS:
        if kind == "dense-fused":
            experts = [dense_matrices(layer, e) for e in range(make.EXPERTS)]
            start = f"model.layers.{layer}.mlp.experts"
            tensors[f"{start}.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in experts])
            tensors[f"{start}.down_proj"] = torch.stack([e["down"] for e in experts])
            continue
        for e in range(make.EXPERTS):
            tensors |= make.names(_parts(kind, layer, e), layer, e, family)
    return tensors


def other_tensors(*, fp8: bool = False) -> dict[str, Tensor]:
    """Attention, shared experts, norms, a table, an empty tensor; with ``fp8``, FP8 blocks and a prediction head."""
    g = torch.Generator().manual_seed(9)
    tensors = {
        "model.embed_tokens.weight": torch.randn(7, make.HIDDEN, generator=g).bfloat16(),
        "model.layers.0.attn.wq.weight": torch.randn(6, make.HIDDEN, generator=g).half(),
        "model.layers.1.ffn.w1.weight": torch.randn(5, make.HIDDEN, generator=g).bfloat16(),
        "model.layers.2.ffn.gate.weight": torch.randn(make.EXPERTS, make.HIDDEN, generator=g),
        "model.layers.2.ffn.gate.tid2eid": torch.randint(0, 4, (11, 2), generator=g),
        "model.layers.2.ffn.shared_experts.w1.weight": torch.randn(3, make.HIDDEN, generator=g).bfloat16(),
        "model.norm.weight": torch.randn(make.HIDDEN, generator=g),
        "model.flags": torch.tensor([True, False, True]),
        "model.empty": torch.empty(0, 3),
        "lm_head.weight": torch.randn(7, make.HIDDEN, generator=g).bfloat16(),
    }
    if fp8:
        random = torch.randint(0, 120, (128, make.HIDDEN), generator=g, dtype=torch.uint8)
        tensors["model.layers.0.attn.wk.weight"] = random.view(torch.float8_e4m3fn)
        tensors["model.layers.0.attn.wk.scale"] = torch.tensor([[121]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
        tensors["mtp.0.ffn.experts.0.w1.weight"] = random.view(torch.int8).clone()
        tensors["mtp.0.ffn.experts.0.w1.scale"] = torch.full((128, 2), 120, dtype=torch.uint8)
    return tensors


def write_source(
    folder: Path, kind: str, *, shards: int = 3, fp8: bool = False, section: dict | None = None, config: bool = True
) -> Path:
    """A checkpoint of ``kind`` with other tensors, tokenizer and other files.

    Tensors are dealt round-robin, so that experts lie across shards; one shard has no index.
    """
    folder.mkdir(parents=True)
    tensors = expert_tensors(kind) | other_tensors(fp8=fp8)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt", "note": f"shard {number}"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1, "total_parameters": 12}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config:
        document: dict = {"model_type": "deepseek_v4", "n_routed_experts": make.EXPERTS, "name": "größer"}
        if fp8:
            document |= {"quantization_config": FP8_SECTION, "expert_dtype": "fp8"}
        if kind == "compressed-tensors":
            document["quantization_config"] = {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
            }
        if section is not None:
            document["quantization_config"] = section
        (folder / "config.json").write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text('{"a": "\\u00e9"}')
    (folder / "encoding").mkdir()
    (folder / "encoding" / "template.py").write_bytes(b"\x00\xffnot text")
    (folder / ".hidden").write_text("a tool's")
    (folder / "leftover.safetensors.bak").write_text("kept")
    return folder


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes, str]]:
    """name -> (dtype, shape, bytes, file) of all files, from the format's definition."""
    result = {}
    for file in sorted(folder.rglob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        ends = 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            assert 8 + length + start == ends, "a hole, or an overlap"
            ends = 8 + length + end
            assert name not in result
            result[name] = (entry["dtype"], tuple(entry["shape"]), data[8 + length + start : ends], file.name)
        assert ends == len(data)
    return result


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def convert_freely(source, target, kind: str = "", **options):
    """Convert; a source without input scales goes without them."""
    if kind not in STATIC and "calibration" not in options:
        options.setdefault("activations", "dynamic")
    return convert(source, target, **options)


def failing_after(calls: int, code: int = errno.ENOSPC):
    """``os.pwrite`` on a disk that fills up: half of one write, then nothing more."""
    real, count = os.pwrite, 0

    def pwrite(handle, data, offset):
        nonlocal count
        count += 1
        if count == calls and len(data) > 1:
            return real(handle, bytes(data)[: len(data) // 2], offset)
        if count > calls:
            raise OSError(code, os.strerror(code))
        return real(handle, data, offset)

    return pwrite


def overwrite(file, name: str, data: bytes) -> None:
    """Replace the bytes of one tensor in its file."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    assert end - start == len(data)
    raw[8 + length + start : 8 + length + end] = data
    file.write_bytes(raw)
