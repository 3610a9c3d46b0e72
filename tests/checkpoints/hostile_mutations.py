"""What the corpus of ``hostile`` does to valid checkpoints.

A mutation takes ``(random, folder)`` and changes the folder in place; one that does not apply raises. Most do not know
whether what they make is still legal: ``hostile_oracle`` judges the result.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from .hostile_folder import (
    INDEX,
    Directory,
    Folder,
    Link,
    Pairs,
    Pipe,
    Stored,
    object_text,
    pack,
    pack_tensors,
    unpack,
    unpack_tensors,
)

SIZES = [0, 1, -1, 3, 7, 2**31 - 1, 2**31, 2**32, 10**8, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400]
ODD: list[Any] = [None, True, False, 1.5, 1e308, float("nan"), float("inf"), "", "x", "16", "NVFP4", [], {}, [1], [[]]]
ODD += [{"a": 1}, -1, 0, "\ud800", "\0", "\x1b[2J", "é" * 300, [0] * 500]
DTYPES = [
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "BOOL",
    "F16",
    "BF16",
    "F32",
    "I32",
    "F64",
    "I64",
    "F4",
    "F6_E2M3",
]
DTYPES += ["U16", "C64", "F8_E4M3FNUZ", "u8", "", "U7", "F8_E4M3\0"]
_L0 = "model.layers.0."
NAMES = ["", "__metadata__", f"{_L0}ffn.experts.0.w1.weight", f"{_L0}ffn.experts.99999.w1.weight", "x" * 3000]
NAMES += [f"{_L0}ffn.experts.00.w1.weight", f"{_L0}mlp.experts.gate_up_proj", "../../x", "a\0b", "\x1b[2J"]
NAMES += ["model.layers.3.mlp.experts.down_proj", "layers.0.ffn.experts.0.w2.weight", f"{_L0}ffn.experts.1.w2.bias"]
NAMES += [f"{_L0}mlp.experts.1.up_proj.weight_scale_2", "model.layers.99999.ffn.experts.0.w3.weight"]
FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 1e-38, 1e35, 1.3e35, 3e38, 1.0]

Mutation = Callable[[Random, Folder], None]


def _files(folder: Folder, suffix: str) -> list[str]:
    return [name for name, content in folder.items() if name.endswith(suffix) and isinstance(content, bytes)]


def _shard(rng: Random, folder: Folder) -> str:
    return rng.choice(_files(folder, ".safetensors"))


def _header(rng: Random, folder: Folder, edit: Callable[[Pairs, bytes], bytes | None]) -> None:
    """Edit a header's names and entries; the data too, if ``edit`` returns some."""
    file = _shard(rng, folder)
    pairs, data = unpack(folder[file])  # type: ignore[arg-type]
    folder[file] = pack(pairs, data) if (new := edit(pairs, data)) is None else pack(pairs, new)


def _entry(rng: Random, pairs: Pairs) -> dict[str, Any]:
    entry = rng.choice([entry for name, entry in pairs if name != "__metadata__"])
    if not isinstance(entry, dict):
        raise TypeError("not an entry")
    return entry


def _tensors(rng: Random, folder: Folder, edit: Callable[[dict[str, Stored]], None]) -> None:
    """Edit tensors so that the file stays a valid one."""
    file = _shard(rng, folder)
    tensors = unpack_tensors(folder[file])  # type: ignore[arg-type]
    edit(tensors)
    folder[file] = pack_tensors(tensors)


# Bytes.


def truncate(rng: Random, folder: Folder) -> None:
    name = rng.choice(_files(folder, ""))
    content = folder[name]
    cut = rng.choice([rng.randrange(len(content)), rng.randrange(min(16, len(content))), len(content) - 1])
    folder[name] = content[:cut]


def extend(rng: Random, folder: Folder) -> None:
    name = rng.choice(_files(folder, ""))
    folder[name] += rng.choice([b"\0", b" ", b"}", rng.randbytes(rng.randrange(1, 100))])


def flip_bits(rng: Random, folder: Folder) -> None:
    name = rng.choice(_files(folder, ""))
    content = bytearray(folder[name])
    # Half of the flips hit the first bytes or the header, where they matter most.
    end = rng.choice([8, 8 + int.from_bytes(content[:8], "little"), len(content), len(content)])
    for _ in range(rng.choice([1, 1, 1, 4])):
        content[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
    folder[name] = bytes(content)


def overwrite(rng: Random, folder: Folder) -> None:
    name = rng.choice(_files(folder, ""))
    content = bytearray(folder[name])
    start, length = rng.randrange(len(content)), rng.randrange(1, 64)
    other = rng.randrange(len(content))
    content[start : start + length] = rng.choice([bytes(length), b"\xff" * length, content[other : other + length]])
    folder[name] = bytes(content)


def replace_file(rng: Random, folder: Folder) -> None:
    name = rng.choice(_files(folder, ""))
    folder[name] = rng.choice(
        [b"", b"{}", b"[]", b"null", b"\0" * 8, (2).to_bytes(8, "little") + b"{}", rng.randbytes(99)]
    )


def header_length(rng: Random, folder: Folder) -> None:
    name = _shard(rng, folder)
    content = folder[name]
    length = int.from_bytes(content[:8], "little")
    values = [0, 1, 2, length - 1, length + 1, length + 8, len(content) - 8, len(content) - 7, 10**8, 10**8 + 1]
    values += [2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    folder[name] = struct.pack("<Q", rng.choice(values)) + content[8:]


def text_poison(rng: Random, folder: Folder) -> None:
    """Something that is no JSON, or hardly, into a header or a JSON file, where a value or a name can stand."""
    name = rng.choice(_files(folder, ""))
    content = folder[name]
    start = 8 if name.endswith(".safetensors") else 0
    text = content[start : start + int.from_bytes(content[:8], "little")] if start else content
    rest = content[start + len(text) :]
    place = rng.choice([0, len(text), *(i + 1 for i, byte in enumerate(text) if byte in b"{:,[")])
    poison = [
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"NaN,",
        b"Infinity",
        b"-Infinity,",
        b"1e999,",
        b" ",
        b"\0",
    ]
    poison += [b"[" * 200, b"[" * 5000 + b"]" * 5000, b'{"a":' * 3000, b"[" * 70 + b"]" * 70 + b",", b"9" * 5000, b"-"]
    poison += [b'"\\ud800":1,', b'"\\u0000":1,', b"//", b'"a":1,"a":1,', b'"a":1,', b"0", b"'", b'"x', b"{}"]
    text = text[:place] + rng.choice(poison) + text[place:]
    folder[name] = (struct.pack("<Q", len(text)) if start else b"") + text + rest


# Headers.


def header_shape(rng: Random, folder: Folder) -> None:
    def edit(pairs: Pairs, data: bytes) -> None:
        entry = _entry(rng, pairs)
        shape = list(entry["shape"])
        place = rng.randrange(len(shape) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            shape[place] = rng.choice(SIZES)
        elif kind == 1:
            shape.insert(place, rng.choice([1, 1, *SIZES]))
        elif kind == 2:
            del shape[place]
        elif kind == 3:
            shape[place] = rng.choice(ODD)
        else:
            shape = rng.choice([shape[::-1], [2**32, 2**32, *shape], [2**62, 8, 0], [1] * 80, None, "x", {}])
        entry["shape"] = shape

    _header(rng, folder, edit)


def header_dtype(rng: Random, folder: Folder) -> None:
    def edit(pairs: Pairs, data: bytes) -> None:
        _entry(rng, pairs)["dtype"] = rng.choice(DTYPES if rng.random() < 0.8 else ODD)

    _header(rng, folder, edit)


def header_offsets(rng: Random, folder: Folder) -> None:
    def edit(pairs: Pairs, data: bytes) -> None:
        entry, other = _entry(rng, pairs), _entry(rng, pairs)
        begin, end = entry["data_offsets"]
        step = rng.choice([1, 4, 16, end - begin])
        choices: list[Any] = [[begin + step, end + step], [begin - step, end - step], [begin, end + step], [end, begin]]
        choices += [[begin, end - step], [-step, end], other["data_offsets"], [begin], [begin, end, end], [], None]
        choices += [[begin, rng.choice(SIZES)], [rng.choice(SIZES), end], [float(begin), end], [begin, str(end)]]
        choices += [[2**64 - step, end - begin - step], [len(data), len(data) + end - begin], [True, end]]
        entry["data_offsets"] = rng.choice(choices)

    _header(rng, folder, edit)


def header_swap_offsets(rng: Random, folder: Folder) -> None:
    """Two tensors exchange their bytes: legal where the sizes agree."""

    def edit(pairs: Pairs, data: bytes) -> None:
        one, two = _entry(rng, pairs), _entry(rng, pairs)
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]

    _header(rng, folder, edit)


def header_duplicate(rng: Random, folder: Folder) -> None:
    """A name twice, with the same or with another entry."""

    def edit(pairs: Pairs, data: bytes) -> None:
        name, entry = rng.choice(pairs)
        entry = dict(entry)
        if rng.random() < 0.5 and "dtype" in entry:
            entry["dtype"] = rng.choice(DTYPES[:6])
        pairs.insert(rng.randrange(len(pairs) + 1), (name, entry))

    _header(rng, folder, edit)


def header_entry(rng: Random, folder: Folder) -> None:
    """An entry with fields too many or too few, or something else altogether."""

    def edit(pairs: Pairs, data: bytes) -> None:
        place = rng.randrange(len(pairs))
        name, entry = pairs[place]
        field = rng.choice(list(entry))
        others: list[Any] = [{**entry, "extra": 1}, {key: entry[key] for key in entry if key != field}, *ODD]
        pairs[place] = (name, rng.choice([list(entry.values()), {**entry, field: rng.choice(ODD)}, *others]))

    _header(rng, folder, edit)


def header_rename(rng: Random, folder: Folder) -> None:
    def edit(pairs: Pairs, data: bytes) -> None:
        place = rng.randrange(len(pairs))
        pairs[place] = (rng.choice([*NAMES, rng.choice(pairs)[0].replace("0", "1")]), pairs[place][1])

    _header(rng, folder, edit)


def header_drop(rng: Random, folder: Folder) -> None:
    """A tensor's entry goes, its bytes stay."""
    _header(rng, folder, lambda pairs, data: pairs.pop(rng.randrange(len(pairs))) and None)


def header_add(rng: Random, folder: Folder) -> None:
    """A tensor without bytes, whose other dimensions can be anything."""

    def edit(pairs: Pairs, data: bytes) -> None:
        shape = rng.choice([[0], [rng.choice(SIZES), 0], [0, rng.choice(SIZES), 16], [10**12, 0, 32], [0] * 70])
        name = rng.choice([*NAMES, "y"])
        pairs.append((name, {"dtype": rng.choice(DTYPES), "shape": shape, "data_offsets": [len(data)] * 2}))

    _header(rng, folder, edit)


# Tensors, in files that stay valid.


def tensor_value(rng: Random, folder: Folder) -> None:
    """A number that is no scale (or is one) in place of a scale, or other bytes anywhere."""

    def edit(tensors: dict[str, Stored]) -> None:
        name = rng.choice([name for name in tensors if "scale" in name] if rng.random() < 0.8 else list(tensors))
        tensor = tensors[name]
        if tensor.dtype == "F32" and len(tensor.data) == 4:
            data = struct.pack("<f", rng.choice(FLOATS))
        else:
            place = rng.randrange(len(tensor.data))
            byte = rng.choice([0x7F, 0xFF, 0x80, 0x81, 0xFE, 0x7E, 0x00, rng.randrange(256)])
            data = tensor.data[:place] + bytes([byte]) + tensor.data[place + 1 :]
        tensors[name] = replace(tensor, data=data)

    _tensors(rng, folder, edit)


def tensor_drop(rng: Random, folder: Folder) -> None:
    _tensors(rng, folder, lambda tensors: tensors.pop(rng.choice(list(tensors))) and None)


def tensor_shape(rng: Random, folder: Folder) -> None:
    """Rows or columns more or fewer, dimensions more or fewer, with the bytes to match."""

    def edit(tensors: dict[str, Stored]) -> None:
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        width = len(tensor.data) // max(1, _count(tensor.shape))
        shape = list(tensor.shape) or [1]
        place = rng.randrange(len(shape))
        shape[place] = rng.choice([0, 1, shape[place] + 1, 2 * shape[place], max(shape[place] - 8, 0)])
        shape = rng.choice([shape, shape, shape, [1, *shape], [*shape, 1], [_count(tuple(shape))]])
        data = (tensor.data * 8 + bytes(64))[: width * _count(tuple(shape))]
        tensors[name] = Stored(tensor.dtype, tuple(shape), data)

    _tensors(rng, folder, edit)


def tensor_move(rng: Random, folder: Folder) -> None:
    """A tensor also in another file, or moved there while the index says otherwise."""
    one, two = rng.sample(_files(folder, ".safetensors"), 2)
    here, there = (unpack_tensors(folder[file]) for file in (one, two))  # type: ignore[arg-type]
    name = rng.choice(list(here))
    there[name] = here[name]
    if rng.random() < 0.5:
        del here[name]
    folder[one], folder[two] = pack_tensors(here), pack_tensors(there)


def tensor_swap(rng: Random, folder: Folder) -> None:
    """Two tensors exchange their names."""

    def edit(tensors: dict[str, Stored]) -> None:
        one, two = rng.sample(list(tensors), 2)
        tensors[one], tensors[two] = tensors[two], tensors[one]

    _tensors(rng, folder, edit)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# The files beside them.


def index_shard(rng: Random, folder: Folder) -> None:
    """A shard's name that leads elsewhere, to nothing, or is none."""
    index = json.loads(folder[INDEX])
    weight_map = index["weight_map"]
    file = rng.choice(list(weight_map.values()))
    bad: list[Any] = ["../x.safetensors", "/etc/passwd", "/tmp/x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]
    bad += [
        "absent.safetensors",
        "config.json",
        "",
        ".",
        "a/../../x.safetensors",
        "\\\\host\\x.safetensors",
        "x" * 5000,
    ]
    bad += [
        f"./{file}",
        f"{file}/",
        f"{file}\0.safetensors",
        "\x1b[2J.safetensors",
        "~/x.safetensors",
        f"{file}/x.safetensors",
    ]
    bad += ["\ud800.safetensors", "x" * 5000 + ".safetensors", "a/" * 3000 + "x.safetensors", *ODD]
    new = rng.choice(bad)
    if rng.random() < 0.5:
        weight_map[rng.choice(list(weight_map))] = new
    else:
        index["weight_map"] = {name: new if old == file else old for name, old in weight_map.items()}
    folder[INDEX] = json.dumps(index).encode()


def index_names(rng: Random, folder: Folder) -> None:
    """Tensors that are not there, in another shard, twice, or left out; or a weight map that is none."""
    index = json.loads(folder[INDEX])
    weight_map = index["weight_map"]
    pairs = list(weight_map.items())
    place = rng.randrange(len(pairs))
    name, file = pairs[place]
    kind = rng.randrange(6)
    if kind == 0:
        pairs.append((rng.choice(NAMES), file))
    elif kind == 1:
        pairs[place] = (name, rng.choice(pairs)[1])
    elif kind == 2:
        pairs.append((name, rng.choice(pairs)[1]))
    elif kind == 3:
        del pairs[place]
    elif kind == 4:
        pairs = [pair for pair in pairs if pair[1] == file]
    else:
        index["weight_map"] = rng.choice(ODD)
        folder[INDEX] = json.dumps(index).encode()
        return
    folder[INDEX] = f'{{"metadata":{{}},"weight_map":{object_text(pairs)}}}'.encode()


def config_value(rng: Random, folder: Folder) -> None:
    config = json.loads(folder["config.json"])
    section = config if rng.random() < 0.7 else config["quantization_config"]
    section[rng.choice(list(section))] = rng.choice([*ODD, *SIZES, float("nan"), 10**12])
    folder["config.json"] = json.dumps(config).encode()


def config_twice(rng: Random, folder: Folder) -> None:
    pairs = list(json.loads(folder["config.json"]).items())
    pairs.append((rng.choice(pairs)[0], rng.choice([1, 2, 16, 10**12])))
    folder["config.json"] = object_text(pairs).encode()


def other_kind(rng: Random, folder: Folder) -> None:
    """A link, a pipe or a folder where a file should be."""
    name = rng.choice([*_files(folder, ".safetensors"), INDEX, "config.json", "z.safetensors"])
    links = [
        "{outside}/model.safetensors",
        "{outside}/config.json",
        name,
        "absent",
        "/dev/zero",
        "/dev/null",
        "..",
        ".",
    ]
    folder[name] = rng.choice([Pipe(), Directory(), *(Link(target) for target in links)])


def link_inside(rng: Random, folder: Folder) -> None:
    """A shard by another name in the same folder: legal, if nothing lists it twice."""
    name = _shard(rng, folder)
    folder["blob"] = folder[name]
    folder[name] = Link("blob")


def shard_gone(rng: Random, folder: Folder) -> None:
    del folder[_shard(rng, folder)]


MUTATIONS: tuple[Mutation, ...] = (
    *(truncate, extend, flip_bits, flip_bits, overwrite, replace_file, header_length, text_poison),
    *(header_shape, header_dtype, header_offsets, header_swap_offsets, header_duplicate, header_entry, header_rename),
    *(header_drop, header_add, tensor_value, tensor_value, tensor_drop, tensor_shape, tensor_move, tensor_swap),
    *(index_shard, index_names, config_value, config_twice, other_kind, link_inside, shard_gone),
)
