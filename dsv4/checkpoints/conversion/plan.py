"""What every byte of the converted shards will be, from headers alone.

A target shard has the name of its source shard. It holds the source shard's other tensors, and of each routed expert
the projections whose *weight* the source shard holds: an expert that spans two shards in the source spans the same two
in the target. "Weight" is the largest of a projection's tensors, which needs no knowledge of the format; the experts of
a fused tensor all go where that is.

Sizes are known before anything is read, so a shard is written tensor by tensor into its place. Within a shard, tensors
with wide elements come first (readers map files and want aligned tensors), else copies in the order of the source, then
experts by layer and number: the same bytes whoever writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.modelopt import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, WEIGHT
from dsv4.checkpoints.naming import FAMILIES, PROJECTIONS, TRANSFORMERS, NameFamily
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import BLOCK

_WIDE = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor where it lies in its file: ``nbytes`` bytes from ``start``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class SourceHeader:
    """The header of a safetensors file.

    Attributes:
        metadata: its ``__metadata__``.
        tensors: name -> place, in the order in which they lie in the file.
        digest: SHA-256 of the header's bytes.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, SourceTensor]
    digest: str


@dataclass(frozen=True)
class Copy:
    """A tensor that is passed through: its bytes in the source file, and where they go."""

    name: str
    source: Path
    start: int
    nbytes: int
    target: int


@dataclass(frozen=True)
class ExpertPart:
    """What one shard holds of one expert.

    Attributes:
        layer, expert: which.
        projections: the projections that belong here.
        places: target tensor name -> (offset in the file, bytes).
        source_bytes: what these projections take in the source.
        counted: whether reports count the expert here; an expert in two shards is converted in both, and counted once.
    """

    layer: int
    expert: int
    projections: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]
    source_bytes: int
    counted: bool


@dataclass(frozen=True)
class ShardPlan:
    """One target file.

    Attributes:
        name: its path under the target folder.
        header: its first bytes: length, JSON, padding.
        size: bytes of the whole file.
        names: all its tensors.
        copies, experts: what is in it.
    """

    name: str
    header: bytes
    size: int
    names: tuple[str, ...]
    copies: tuple[Copy, ...]
    experts: tuple[ExpertPart, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.size - len(self.header)


def read_header(file: Path) -> SourceHeader:
    """The header of a file that a :class:`~dsv4.checkpoints.source.TensorSource` has opened, hence checked."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length)
        entries: dict[str, Any] = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {
            name: SourceTensor(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: its safetensors header cannot be read ({error})") from error
    return SourceHeader(metadata, tensors, hashlib.sha256(raw).hexdigest())


def target_family(family: NameFamily) -> NameFamily:
    """How the converted experts are named: as in the source, but by expert where that has fused tensors."""
    if not family.fused:
        return family
    return next((other for other in FAMILIES if not other.fused and other.block == family.block), TRANSFORMERS)


def plan_shards(
    checkpoint: Checkpoint, headers: Mapping[Path, SourceHeader], *, input_scales: bool
) -> tuple[ShardPlan, ...]:
    """The target's shards, one for each of ``headers``, in their order.

    Args:
        checkpoint: the source.
        headers: all its files.
        input_scales: whether each projection gets an ``input_scale``.
    """
    expert_names: set[str] = set()
    parts: dict[Path, list[_Part]] = {file: [] for file in headers}
    for layer in checkpoint.moe_layers:
        for expert in range(checkpoint.num_experts):
            location = checkpoint.location(layer, expert)
            expert_names.update(location.tensors.values())
            for file, part in _expert_parts(checkpoint, location, headers).items():
                parts[file].append(part)
    shape = checkpoint.shape
    sizes = {
        "gate": (shape.intermediate_size, shape.hidden_size),
        "up": (shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
    }
    return tuple(
        _plan_shard(checkpoint.folder, file, header, expert_names, parts[file], sizes, input_scales)
        for file, header in headers.items()
    )


@dataclass(frozen=True)
class _Part:
    location: ExpertLocation
    projections: tuple[str, ...]
    source_bytes: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of the target before it has a place: a copy of ``origin``, or a part of an expert."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    origin: SourceTensor | None


def _expert_parts(
    checkpoint: Checkpoint, location: ExpertLocation, headers: Mapping[Path, SourceHeader]
) -> dict[Path, _Part]:
    """The projections of an expert by the file that each belongs to."""
    homes: dict[Path, list[str]] = {}
    for projection in PROJECTIONS:
        # A fused tensor may hold several projections, and is called by all of them: "gate_up".
        candidates = [name for (key, _), name in location.tensors.items() if projection in key.split("_")]
        if not candidates:
            raise CheckpointError(
                f"{checkpoint.folder}: {location}: no tensor of its {projection} projection; "
                f"found {sorted(location.tensors.values())}"
            )
        infos = [checkpoint.source[name] for name in candidates]
        largest = max(infos, key=lambda info: (headers[info.file].tensors[info.name].nbytes, info.name))
        homes.setdefault(largest.file, []).append(projection)
    rows = checkpoint.num_experts if location.family.fused else 1
    result = {}
    for file, projections in homes.items():
        names = {
            name
            for (key, _), name in location.tensors.items()
            if any(projection in key.split("_") for projection in projections)
        }
        nbytes = sum(headers[checkpoint.source[name].file].tensors[name].nbytes for name in names) // rows
        result[file] = _Part(location, tuple(projections), nbytes)
    return result


def _plan_shard(
    folder: Path,
    file: Path,
    header: SourceHeader,
    expert_names: set[str],
    parts: list[_Part],
    sizes: Mapping[str, tuple[int, int]],
    input_scales: bool,
) -> ShardPlan:
    entries = [
        _Entry(name, tensor.dtype, tensor.shape, tensor.nbytes, tensor)
        for name, tensor in header.tensors.items()
        if name not in expert_names
    ]
    names_of: list[list[str]] = []
    for part in parts:
        own = [entry for p in part.projections for entry in _modelopt_entries(part.location, p, sizes[p], input_scales)]
        names_of.append([entry.name for entry in own])
        entries.extend(own)
    entries.sort(key=lambda entry: -_WIDE.get(entry.dtype, 1))  # stable

    places: dict[str, tuple[int, int]] = {}
    described: dict[str, Any] = {"__metadata__": {"format": "pt", **header.metadata}}
    offset = 0
    for entry in entries:
        if entry.name in places:
            raise CheckpointError(f"{file}: tensor {entry.name!r} would be in the result twice")
        places[entry.name] = (offset, entry.nbytes)
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    places = {name: (start + len(raw), nbytes) for name, (start, nbytes) in places.items()}
    return ShardPlan(
        file.relative_to(folder).as_posix(),
        raw,
        len(raw) + offset,
        tuple(places),
        tuple(
            Copy(entry.name, file, entry.origin.start, entry.nbytes, places[entry.name][0])
            for entry in entries
            if entry.origin is not None
        ),
        tuple(
            ExpertPart(
                part.location.layer,
                part.location.expert,
                part.projections,
                {name: places[name] for name in names},
                part.source_bytes,
                PROJECTIONS[0] in part.projections,
            )
            for part, names in zip(parts, names_of, strict=True)
        ),
    )


def _modelopt_entries(
    location: ExpertLocation, projection: str, size: tuple[int, int], input_scales: bool
) -> list[_Entry]:
    """The tensors of one projection as :func:`dsv4.checkpoints.modelopt.expert_tensors` gives them."""
    rows, columns = size
    shapes = {
        WEIGHT: ("U8", (rows, columns // 2)),
        BLOCK_SCALE: ("F8_E4M3", (rows, columns // BLOCK)),
        GLOBAL_SCALE: ("F32", ()),
    }
    if input_scales:
        shapes[INPUT_SCALE] = ("F32", ())
    family = target_family(location.family)
    return [
        _Entry(
            family.tensor_name(location.prefix, location.layer, location.expert, projection, suffix),
            dtype,
            shape,
            prod(shape) * _WIDE.get(dtype, 1),
            None,
        )
        for suffix, (dtype, shape) in shapes.items()
    ]
