"""What a checkpoint is, stated a second time: plain Python over the bytes, without dsv4, torch or safetensors.

:func:`judge` follows the definition of the safetensors format (its README, section "Format"), of the index file, and of
the expert formats, and says whether a folder must be refused. For what may be accepted, ``decode`` of the format's
oracle gives the values that a reader must find.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .hostile_folder import INDEX, Folder, Link, Stored

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
EXPERT = re.compile(
    r"(?:(?:model|language_model)\.)*layers\.(0|[1-9]\d{0,4})\.(?:ffn|mlp)\.experts\.(0|[1-9]\d{0,4})\."
    r"(w1|w2|w3|gate_proj|up_proj|down_proj)\.([A-Za-z0-9_.]+)",
    re.ASCII,
)
FUSED = re.compile(
    r"(?:(?:model|language_model)\.)*layers\.(0|[1-9]\d{0,4})\.mlp\.experts\.(gate_up_proj|down_proj)", re.ASCII
)
PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

FUSED_PROJECTIONS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class Expert(dict[tuple[str, str], str]):
    """(projection, suffix) -> tensor name of one expert; ``number`` is its row in fused tensors."""

    def __init__(self, number: int, names: Mapping[tuple[str, str], str] | None = None) -> None:
        super().__init__(names or {})
        self.number = number


@dataclass(frozen=True)
class Decoded:
    """float64 ``[out, in]``; how far a reader may be from it, 0 for not at all; why a reader may refuse it."""

    values: np.ndarray
    tolerance: np.ndarray | float = 0.0
    doubt: str = ""


class Refuse(Exception):
    """The folder must be refused, for this reason. ``tensor`` is the one at fault where a single one is."""

    def __init__(self, reason: str, tensor: str = "") -> None:
        super().__init__(reason)
        self.tensor = tensor


class FormatOracle(Protocol):
    """A second statement of an expert format."""

    def shape(self, expert: Expert, tensors: Mapping[str, Stored]) -> tuple[int, int]:
        """(hidden, intermediate); raises Refuse."""

    def decode(self, expert: Expert, tensors: Mapping[str, Stored], projection: str) -> Decoded:
        """The values of one matrix; raises Refuse where they must not be computed with."""


@dataclass(frozen=True)
class Judgement:
    """A verdict.

    Attributes:
        refuse: why the folder must be refused, empty if it need not be.
        tensor: the tensor at fault, where a single one is.
        doubt: why it may be refused all the same, empty if it must be accepted.
        layers: layer -> expert -> its tensors, of what may be accepted.
        tensors: all tensors.
    """

    refuse: str = ""
    tensor: str = ""
    doubt: str = ""
    layers: Mapping[int, Mapping[int, Expert]] | None = None
    tensors: Mapping[str, Stored] | None = None


def judge(folder: Folder, oracle: FormatOracle) -> Judgement:
    """Whether ``folder`` may be opened and all its layers loaded (without input scales) in the format of ``oracle``."""
    doubts: list[str] = []
    try:
        config = _json_file(folder, "config.json", doubts)
        _json_file(folder, "hf_quant_config.json", doubts)
        tensors = _tensors(folder, doubts)
        layers = _experts(tensors, doubts)
        shapes = {oracle.shape(expert, tensors) for experts in layers.values() for expert in experts.values()}
        if len(shapes) != 1:
            raise Refuse(f"experts of several shapes: {shapes}")
        _numbers(config, layers, shapes.pop(), doubts)
        for experts in layers.values():
            for expert in experts.values():
                for projection in ("gate", "up", "down"):
                    doubts += filter(None, [oracle.decode(expert, tensors, projection).doubt])
    except Refuse as problem:
        return Judgement(str(problem) or "no reason given", problem.tensor)
    return Judgement("", "", "; ".join(doubts), layers, tensors)


def shard(file: bytes, doubts: list[str]) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    if len(file) < 8:
        raise Refuse("no room for the header's length")
    (length,) = struct.unpack("<Q", file[:8])
    if length > 100_000_000 or 8 + length > len(file):
        raise Refuse(f"a header of {length} bytes in a file of {len(file)}")
    header, data = file[8 : 8 + length], file[8 + length :]
    if header[:1] != b"{":
        raise Refuse("the header does not begin with {")
    entries = parse(header)
    metadata = entries.pop("__metadata__", {})
    if metadata is None:
        doubts.append("null metadata")
    elif not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refuse("metadata that is no map of strings")
    found: dict[str, Stored] = {}
    spans = []
    for name, entry in entries.items():
        begin, end, stored = _entry(name, entry, data)
        if len(stored.shape) > 64:
            doubts.append("more dimensions than tensor libraries have")
        spans.append((begin, end))
        found[name] = stored
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise Refuse(f"a hole or an overlap at {position}")
        position = end
    if position != len(data):
        raise Refuse(f"{len(data) - position} bytes that belong to no tensor")
    return found


def parse(text: bytes) -> Any:
    """JSON as RFC 8259 and a careful reader have it."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise Refuse("a name twice in one object")
        return dict(pairs)

    def constant(name: str) -> Any:
        raise Refuse(f"{name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Refuse(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refuse("not a JSON object")
    return value


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(name: str, entry: Any, data: bytes) -> tuple[int, int, Stored]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refuse("an entry that is none", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refuse(f"no such dtype: {dtype!r:.80}", name)
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(map(_natural, numbers)):
            raise Refuse("sizes that are no natural numbers", name)
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        raise Refuse(f"offsets {offsets} in {len(data)} bytes", name)
    if math.prod(max(size, 1) for size in shape) >= 2**63:
        raise Refuse("a shape beyond what can be counted", name)
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise Refuse("a shape that does not fit the offsets", name)
    return offsets[0], offsets[1], Stored(dtype, tuple(shape), data[offsets[0] : offsets[1]])


def _content(folder: Folder, name: str) -> bytes:
    content = folder.get(name)
    if isinstance(content, Link) and isinstance(folder.get(content.target), bytes):
        return folder[content.target]
    if not isinstance(content, bytes):
        raise Refuse(f"{name} is no regular file inside the folder")
    return content


def _json_file(folder: Folder, name: str, doubts: list[str]) -> dict[str, Any]:
    if name not in folder:
        return {}
    text = _content(folder, name)
    try:
        value = parse(text)
        if _depth(value) > 64:
            doubts.append(f"{name}: deeper than a configuration is")
        return value
    except Refuse as problem:
        # Python's reader, on which all of Transformers stands, takes NaN, Infinity and half surrogate pairs.
        lenient = ("is not JSON", "surrogates not allowed")
        if not any(part in str(problem) for part in lenient):
            raise
        doubts.append(f"{name}: {problem}")
        return {}


def _tensors(folder: Folder, doubts: list[str]) -> dict[str, Stored]:
    weight_map: dict[str, Any] = {}
    files = [name for name in folder if name.endswith(".safetensors")]
    if INDEX in folder:
        weight_map = _json_file(folder, INDEX, doubts).get("weight_map")  # type: ignore[assignment]
        if not isinstance(weight_map, dict) or not weight_map:
            raise Refuse("no weight map")
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise Refuse("a shard's name that is no string")
        files = sorted(set(weight_map.values()))
    if not files:
        raise Refuse("no shards")
    tensors: dict[str, Stored] = {}
    place: dict[str, str] = {}
    for file in files:
        plain = posixpath.normpath(file)
        if plain != file:
            doubts.append(f"shard {file!r}")
        for name, tensor in shard(_content(folder, plain), doubts).items():
            if name in tensors:
                raise Refuse("a tensor in two files")
            tensors[name] = tensor
            place[name] = file
    for name, file in weight_map.items():
        if place.get(name) != file:
            raise Refuse(f"the index places {name!r:.80} in {file!r:.80}")
    return tensors


def _experts(tensors: Mapping[str, Stored], doubts: list[str]) -> dict[int, dict[int, Expert]]:
    layers: dict[int, dict[int, Expert]] = {}
    ways: dict[int, set[str]] = {}
    rows: dict[int, dict[tuple[str, str], str]] = {}
    for name in tensors:
        fused = FUSED.fullmatch(name)
        if fused is not None:
            ways.setdefault(int(fused[1]), set()).add(name[: fused.start(2)] + "fused")
            rows.setdefault(int(fused[1]), {})[FUSED_PROJECTIONS[fused[2]], ""] = name
            continue
        match = EXPERT.fullmatch(name)
        if match is None:
            if FUSED.match(name):
                doubts.append(f"what belongs to a fused tensor: {name!r:.80}")
            continue
        layer, expert, projection, suffix = match.groups()
        way = name[: match.start(2)] + ("w" if projection in ("w1", "w2", "w3") else "proj")
        ways.setdefault(int(layer), set()).add(way)
        key = (PROJECTIONS[projection], suffix)
        layers.setdefault(int(layer), {}).setdefault(int(expert), Expert(int(expert)))[key] = name
    for layer, names in rows.items():
        counts = {tensors[name].shape[:1] for name in names.values()}
        if len(counts) != 1 or counts & {(), (0,)}:
            raise Refuse(f"fused tensors of {counts} experts")
        if max(counts)[0] > 1000:
            raise Refuse("more experts than the file can have")
        layers.setdefault(layer, {}).update({number: Expert(number, names) for number in range(max(counts)[0])})
    if not layers:
        raise Refuse("no experts")
    if any(len(found) > 1 for found in ways.values()):
        raise Refuse("a layer whose experts are named in two ways")
    if any((".ffn." in way) != way.endswith("w") for found in ways.values() for way in found if way[-5:] != "fused"):
        # Names of neither family are no experts' names to a reader; what then remains is not judged here.
        doubts.append("names of no family")
    return layers


def _numbers(
    config: dict[str, Any], layers: dict[int, dict[int, Expert]], shape: tuple[int, int], doubts: list[str]
) -> None:
    count = 1 + max(max(experts) for experts in layers.values())
    if any(sorted(experts) != list(range(count)) for experts in layers.values()):
        raise Refuse("experts that are not numbered 0, 1, ... in every layer")
    for key, found in zip(("n_routed_experts", "hidden_size", "moe_intermediate_size"), (count, *shape), strict=True):
        stated = config.get(key, found)
        if stated is not None and (isinstance(stated, bool) or stated != found):
            raise Refuse(f"config.json: {key} is {stated!r:.80}, the tensors have {found}")
        if isinstance(stated, float):
            doubts.append(f"{key} {stated}")
    limit = config.get("swiglu_limit")
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= sys.float_info.max
    ):
        raise Refuse(f"config.json: swiglu_limit {limit!r:.80}")
    top_k = config.get("num_experts_per_tok")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise Refuse(f"config.json: num_experts_per_tok {top_k!r:.80}")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise Refuse("config.json: quantization_config")
    stated = (quantization or {}).get("group_size")
    if (quantization or {}).get("quant_algo") == "NVFP4" and stated is not None and stated != 16:
        raise Refuse(f"config.json: group_size {stated!r:.80}")
    for group in _objects((quantization or {}).get("config_groups")):
        size = _object(group.get("weights")).get("group_size")
        packed = (group.get("format") or (quantization or {}).get("format")) == "nvfp4-pack-quantized"
        if packed and size is not None and size != 16:
            raise Refuse(f"config.json: group_size {size!r:.80}")
    if config.keys() & {"num_local_experts", "num_experts", "text_config", "top_k", "num_experts_per_token"}:
        doubts.append("other names for what is stated")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in _object(value).values() if isinstance(entry, dict)]


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
