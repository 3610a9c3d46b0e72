"""Folders as values, valid checkpoints to start from, and safetensors bytes without the safetensors library.

A folder is a dict from file name to content, so that a mutation is a dict operation and nothing touches a disk before
:func:`write`. A further format joins the fuzzing with a :class:`Maker` here and its oracle in ``hostile_oracle``.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

INDEX = "model.safetensors.index.json"
HIDDEN, INTER, EXPERTS, LAYERS = 64, 32, 2, (0, 3)


@dataclass(frozen=True)
class Link:
    """A symbolic link; ``{outside}`` in the target stands for a folder beside the checkpoint that holds a valid one."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe that nobody writes to: opening it to read waits for ever."""


@dataclass(frozen=True)
class Directory:
    """An empty folder."""


Folder = dict[str, "bytes | Link | Pipe | Directory"]
Pairs = list[tuple[str, Any]]


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Maker:
    """A source of valid checkpoints.

    Attributes:
        name: shown with a failure.
        tensors: random -> tensor name -> tensor; all experts of all layers, and some tensors that are none.
        config: ``config.json``.
    """

    name: str
    tensors: Callable[[Random], dict[str, Stored]]
    config: Mapping[str, Any]


def write(folder: Folder, path: Path, outside: Path) -> None:
    """Put ``folder`` on the disk at ``path``, which must not exist."""
    path.mkdir()
    for name, content in folder.items():
        file = path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, Link):
            os.symlink(content.target.replace("{outside}", str(outside)), file)
        elif isinstance(content, Pipe):
            os.mkfifo(file)
        else:
            file.mkdir()


def pack(pairs: Pairs, data: bytes) -> bytes:
    """A safetensors file; ``pairs`` may hold a name twice, and anything for an entry. Padded to 8 as writers do."""
    header = object_text(pairs).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def object_text(pairs: Pairs) -> str:
    """A JSON object with exactly these names in this order, repeated ones included."""
    return "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"


def unpack(file: bytes) -> tuple[Pairs, bytes]:
    """The inverse of :func:`pack`, for files that are still in order; raises ValueError or TypeError for others."""
    if len(file) < 8:
        raise ValueError("too short")
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end].decode())
    if not isinstance(header, dict):
        raise TypeError("not an object")
    return list(header.items()), file[end:]


def pack_tensors(tensors: Mapping[str, Stored]) -> bytes:
    """A valid safetensors file with these tensors, in this order."""
    pairs: Pairs = [("__metadata__", {"format": "pt"})]
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        pairs.append((name, {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}))
        data += tensor.data
    return pack(pairs, data)


def unpack_tensors(file: bytes) -> dict[str, Stored]:
    """The inverse of :func:`pack_tensors`; raises for files that are not in order."""
    pairs, data = unpack(file)
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in pairs
        if name != "__metadata__"
    }


def build(maker: Maker, rng: Random) -> Folder:
    """A valid checkpoint of ``maker``: one file, two without an index, or two with one."""
    tensors = maker.tensors(rng)
    folder: Folder = {}
    if rng.random() < 0.8:
        folder["config.json"] = json.dumps(maker.config).encode()
    if rng.random() < 0.4:
        return folder | {"model.safetensors": pack_tensors(tensors)}
    files = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
    names = list(tensors)
    cut = rng.randrange(1, len(names))
    parts = [names[:cut], names[cut:]]
    for file, part in zip(files, parts, strict=True):
        folder[file] = pack_tensors({name: tensors[name] for name in part})
    if rng.random() < 0.8:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        folder[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return folder


# The block scales of real tensors: positive, up to 448, some of them zero of either sign.
_LEGAL = bytes([*range(0x7F), 0x80] * 2)
_EXPONENTS = bytes(115 + byte % 15 for byte in range(256))  # of e8m0: 2^-12 to 2^2
_MODERATE = bytes((0x38 + byte % 7) | (byte & 0x80) for byte in range(256))  # a float's sign and exponent, 2^-15 to 1/2
_NAMINGS = [("ffn", ("w1", "w3", "w2")), ("mlp", ("gate_proj", "up_proj", "down_proj"))]
_SIZES = ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
Parts = Callable[[Random, int, int], dict[str, Stored]]


def _fp32(rng: Random, value: float) -> Stored:
    return Stored("F32", rng.choice([(), (1,)]), struct.pack("<f", value))


def _modelopt(rng: Random, rows: int, columns: int) -> dict[str, Stored]:
    return {
        "weight": Stored("U8", (rows, columns // 2), rng.randbytes(rows * columns // 2)),
        "weight_scale": _block_scales(rng, rows, columns),
        "weight_scale_2": _fp32(rng, rng.uniform(1e-4, 1e-2)),
        "input_scale": _fp32(rng, 0.01),
    }


def _compressed_tensors(rng: Random, rows: int, columns: int) -> dict[str, Stored]:
    return {
        "weight_packed": Stored("U8", (rows, columns // 2), rng.randbytes(rows * columns // 2)),
        "weight_scale": _block_scales(rng, rows, columns),
        "weight_global_scale": _fp32(rng, rng.uniform(1e2, 1e4)),
        "input_global_scale": _fp32(rng, 100.0),
    }


def _mxfp4(rng: Random, rows: int, columns: int) -> dict[str, Stored]:
    scales = rng.randbytes(rows * columns // 32).translate(_EXPONENTS)
    return {
        "weight": Stored(rng.choice(["I8", "U8"]), (rows, columns // 2), rng.randbytes(rows * columns // 2)),
        "scale": Stored(rng.choice(["F8_E8M0", "U8"]), (rows, columns // 32), scales),
    }


def _dense(rng: Random, rows: int, columns: int) -> dict[str, Stored]:
    return {"weight": _floats(rng, (rows, columns))}


def _block_scales(rng: Random, rows: int, columns: int) -> Stored:
    return Stored("F8_E4M3", (rows, columns // 16), rng.randbytes(rows * columns // 16).translate(_LEGAL))


def _floats(rng: Random, shape: tuple[int, ...]) -> Stored:
    """fp32 or bf16 of either sign and moderate size, any mantissa."""
    dtype, width = rng.choice([("F32", 4), ("BF16", 2)])
    data = bytearray(rng.randbytes(math.prod(shape) * width))
    data[width - 1 :: width] = rng.randbytes(math.prod(shape)).translate(_MODERATE)
    return Stored(dtype, shape, bytes(data))


def _per_expert(parts: Parts) -> Callable[[Random], dict[str, Stored]]:
    def tensors(rng: Random) -> dict[str, Stored]:
        found = _others(rng)
        block, names = rng.choice(_NAMINGS)
        for layer in LAYERS:
            for expert in range(EXPERTS):
                for name, (rows, columns) in zip(names, _SIZES, strict=True):
                    start = f"model.layers.{layer}.{block}.experts.{expert}.{name}."
                    found |= {start + suffix: tensor for suffix, tensor in parts(rng, rows, columns).items()}
        return found

    return tensors


def _fused(rng: Random) -> dict[str, Stored]:
    found = _others(rng)
    for layer in LAYERS:
        start = f"model.layers.{layer}.mlp.experts."
        found[f"{start}gate_up_proj"] = _floats(rng, (EXPERTS, 2 * INTER, HIDDEN))
        found[f"{start}down_proj"] = _floats(rng, (EXPERTS, HIDDEN, INTER))
    return found


def _others(rng: Random) -> dict[str, Stored]:
    """What else is in a model."""
    empty = {"model.empty": Stored("F32", (0, 4), b"")} if rng.random() < 0.3 else {}
    return {"model.embed.weight": Stored("BF16", (4, 8), rng.randbytes(64))} | empty


_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTER,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "swiglu_limit": 10.0,
}
_PACKED = "nvfp4-pack-quantized"


def _config(**quantization: Any) -> dict[str, Any]:
    return _CONFIG | {"quantization_config": quantization}


# Named as dsv4 names the formats, for the oracle of each.
MODELOPT = Maker(
    "modelopt-nvfp4", _per_expert(_modelopt), _config(quant_method="modelopt", quant_algo="NVFP4", group_size=16)
)
MAKERS = (
    MODELOPT,
    Maker(
        "compressed-tensors-nvfp4",
        _per_expert(_compressed_tensors),
        _config(format=_PACKED, config_groups={"group_0": {"format": _PACKED, "weights": {"group_size": 16}}}),
    ),
    Maker("mxfp4", _per_expert(_mxfp4), _config(quant_method="fp8", weight_block_size=[128, 128])),
    Maker("dense", _per_expert(_dense), _CONFIG),
    Maker("dense", _fused, _CONFIG),
)
