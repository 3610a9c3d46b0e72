"""Headers of safetensors files, read strictly.

A file is 8 bytes with the header's length N (little endian), N bytes of JSON, and the data. The JSON is one object:
tensor name -> ``{"dtype": ..., "shape": [...], "data_offsets": [begin, end]}``, offsets counted from the data's start,
and ``__metadata__``, a map of strings. The tensors cover the data without holes and without overlap.

The safetensors library checks most of this, too, when it maps a file. It is done here first because a file from
anywhere needs more: a message that names the tensor, names that occur once (the library takes the last of several),
shapes that can be represented. And nothing has to be mapped where headers are all that is wanted.

The JSON is taken entry by entry: a parser, the library's included, builds whatever there is before anybody can look at
it, which for 100 MB of ``[[[[...`` is 6 GB.

Source: the format's definition in the README of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.checkpoints.files import parse_json
from dsv4.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_MAX_METADATA = 100_000
_MAX_ENTRY = 2000  # characters; 64 sizes of 19 digits, and room
_MAX_SIZE = 2**63 - 1
_MAX_DIMS = 64
_FIELDS = {"dtype", "shape", "data_offsets"}
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = json.JSONDecoder()
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        name: the full tensor name.
        file: the file that holds it.
        shape: its dimensions.
        dtype: safetensors' name of the dtype: ``"U8"``, ``"F8_E4M3"``, ``"F32"``, ``"BF16"``, ...
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r:.300}"


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of ``file`` by name, in the header's order.

    Raises:
        CheckpointError: the file cannot be read, or breaks a rule of the format.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(
                    f"a header of {length} bytes in a file of {size}; expected {MAX_HEADER_BYTES} at most, and a whole "
                    f"file"
                )
            text = stream.read(length).decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    data_size = size - 8 - length
    try:
        for name, entry in _entries(text):
            if name in infos:
                raise ValueError(f"the name {name!r:.300} occurs twice")
            info, begin, end = _tensor(file, name, entry, data_size)
            infos[name] = info
            spans.append((begin, end, name))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    _check_coverage(file, sorted(spans), data_size)
    return infos


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """(name, JSON text of the value) of all tensors. Raises ValueError where the header is none."""
    if not text.startswith("{"):
        raise ValueError("its header does not begin with '{'")
    metadata = False
    at = _skip(text, 1)
    while text[at : at + 1] != "}":
        name, at = _name(text, at)
        if name == "__metadata__":
            if metadata:
                raise ValueError("the name '__metadata__' occurs twice")
            metadata, at = True, _skip_metadata(text, at)
        else:
            end = text.find("}", at, at + _MAX_ENTRY) + 1 or at + _MAX_ENTRY
            yield name, text[at:end]
            at = end
        at = _next(text, at)
    if _skip(text, at + 1) != len(text):
        raise ValueError(f"its header goes on behind its end, with {text[at + 1 : at + 41]!r}")


def _skip_metadata(text: str, at: int) -> int:
    """The place behind the metadata, a map of strings or null."""
    if text.startswith("null", at):
        return at + 4
    if text[at : at + 1] != "{":
        raise ValueError(f"__metadata__ must be a map of strings, found {text[at : at + 40]!r}")
    names: set[str] = set()
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        name, at = _name(text, at)
        if name in names or len(names) == _MAX_METADATA:
            raise ValueError(f"the name {name!r:.300} occurs twice in __metadata__, or it has over {_MAX_METADATA}")
        names.add(name)
        _, at = _string(text, at)
        at = _next(text, at)
    return at + 1


def _name(text: str, at: int) -> tuple[str, int]:
    """A name at ``at`` and the place of its value."""
    name, at = _string(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise ValueError(f"expected ':' behind the name {name!r:.300}, found {text[at : at + 40]!r}")
    return name, _skip(text, at + 1)


def _string(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise ValueError(f"expected a string, found {text[at : at + 40]!r}")
    value, at = _STRING.raw_decode(text, at)
    value.encode("utf-8")  # half of a surrogate pair is no text
    return value, at


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _next(text: str, at: int) -> int:
    """The place of the next name, or of the closing brace."""
    at = _skip(text, at)
    if text[at : at + 1] == "}":
        return at
    if text[at : at + 1] != ",":
        raise ValueError(f"expected ',' or '}}', found {text[at : at + 40]!r}")
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        raise ValueError("a comma before '}'")
    return at


def _tensor(file: Path, name: str, text: str, data_size: int) -> tuple[TensorInfo, int, int]:
    """The tensor that an entry declares, with the begin and end of its data."""
    where = f"{file}: tensor {name!r:.300}"
    try:
        entry = parse_json(text.encode())
    except ValueError as error:
        raise CheckpointError(f"{where}: expected a header entry, found {text!r:.200} ({error})") from error
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError(f"{where}: expected a header entry of {sorted(_FIELDS)}, found {text!r:.200}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where}: dtype {dtype!r:.80} is unknown; expected one of {sorted(_BITS)}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: expected a shape of {_MAX_DIMS} sizes at most, found {shape!r:.200}")
    # A dimension of 0 makes any shape fit no bytes at all, so that the others could be anything.
    if math.prod(max(size, 1) for size in shape) > _MAX_SIZE:
        raise CheckpointError(f"{where}: no tensor can have the shape {shape!r:.200}")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise CheckpointError(
            f"{where}: expected data_offsets [begin, end] within {data_size} bytes of data, found {offsets!r:.80}; "
            f"the file is damaged or incomplete"
        )
    begin, end = offsets
    needed = math.prod(shape) * _BITS[dtype]
    if needed != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: {dtype} {shape!r:.200} takes {needed / 8:g} bytes, but data_offsets {offsets} gives it "
            f"{end - begin}"
        )
    return TensorInfo(name, file, tuple(shape), dtype), begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _check_coverage(file: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    position, before = 0, "the header"
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps" if begin < position else f"leaves {begin - position} bytes unused behind"
            raise CheckpointError(f"{file}: tensor {name!r:.300} {what} {before:.300}; expected tensors side by side")
        position, before = end, repr(name)
    if position != data_size:
        raise CheckpointError(f"{file}: {data_size - position} bytes at the end belong to no tensor")
