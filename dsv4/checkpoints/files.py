"""Which safetensors files make up a checkpoint, and the JSON files beside them.

Three layouts are read: one ``*.safetensors`` file, a folder with ``model.safetensors.index.json`` (the index names the
shards), and a folder of ``*.safetensors`` files without an index (all of them belong).

A checkpoint is something downloaded, so a shard must lie inside the checkpoint's folder: an index that names
``../elsewhere`` or an absolute path, or a link that leads out, is refused. The one exception is the Hugging Face cache,
whose ``snapshots/<revision>/`` folders consist of links into ``blobs/`` of the same repository. The same holds for the
JSON files. Nothing but regular files is ever opened: a pipe or a device would make the reader wait, or never end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dsv4.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"

# The index of the largest release there is, DeepSeek-V4-Pro in NVFP4, has 281,000 entries of about 105 bytes.
_MAX_JSON_BYTES = 64_000_000
_MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    Attributes:
        folder: the folder that holds them (and ``config.json``, where there is one).
        shards: the safetensors files, sorted by name, not resolved (a cache shows links under readable names).
        weight_map: tensor name -> shard as the index states it; empty without an index.
    """

    folder: Path
    shards: tuple[Path, ...]
    weight_map: dict[str, Path]


def locate(path: str | Path) -> CheckpointFiles:
    """Find the files of the checkpoint at ``path`` (a ``.safetensors`` file or a folder).

    Raises:
        CheckpointError: nothing is there, an index is malformed, or a shard is missing or outside the folder.
    """
    path = Path(path)
    mode = _mode(path)
    if stat.S_ISREG(mode):
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: expected a .safetensors file or a folder of them, found a file ending in {path.suffix!r}"
            )
        return CheckpointFiles(path.parent, (path,), {})
    if not stat.S_ISDIR(mode):
        found = "found something else" if mode else "no such file or folder"
        raise CheckpointError(f"{path}: {found}; expected a .safetensors file or a folder of them")
    if os.path.lexists(path / INDEX_NAME):
        return _from_index(path)
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{path}: the folder cannot be listed ({error.strerror})") from error
    shards = tuple(path / name for name in names if name.endswith(".safetensors"))
    if not shards:
        raise CheckpointError(f"{path}: no .safetensors file and no {INDEX_NAME}; the folder holds {names[:8]}")
    for shard in shards:
        _check_printable(shard.name, path)
        check_inside(path, shard, "the folder")
        if not stat.S_ISREG(_mode(shard)):
            raise CheckpointError(f"{shard}: expected a file, found a folder, a pipe, a device or a broken link")
    return CheckpointFiles(path, shards, {})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, ``{}`` if there is no such file.

    Raises:
        CheckpointError: not valid JSON, a name that occurs twice in one object, not an object, too large (64 MB) or
            too deep (64 levels), not a regular file, or a link that leads out of the file's folder.
    """
    if not os.path.lexists(path):
        return {}
    mode = _mode(path)
    check_inside(path.parent, path, "the folder")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: expected a file, found a folder, a pipe, a device or a broken link")
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; expected {_MAX_JSON_BYTES} at most")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: bytes) -> Any:
    """The value of UTF-8 JSON ``text``.

    Stricter than :func:`json.loads`, which takes the last of several equal names: two readers would see two files.

    Raises:
        ValueError: not UTF-8, not JSON, a name that occurs twice in one object, more than 64 levels, or lists and
            objects of hardly any content, which take many times the memory of their text.
    """
    if text.count(b"[") + text.count(b"{") > 10_000 + len(text) // 16:
        raise ValueError("more lists and objects than content")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Whoever prints or copies the value later recurses as well, with less room than the parser had.
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH} levels")


def check_inside(folder: Path, file: Path, named_by: str) -> None:
    """Refuse a ``file`` that is, or lies behind, a link out of ``folder``; the Hugging Face cache's are its own.

    Args:
        folder: the checkpoint's folder.
        file: a path below it.
        named_by: what led to the file, for the message.

    Raises:
        CheckpointError: the file is elsewhere, or its links go round in a circle.
    """
    try:
        real = file.resolve()
        root = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: named by {named_by}, but cannot be followed ({error})") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise CheckpointError(
            f"{file}: named by {named_by}, but a link to {real}, outside the checkpoint; "
            f"copy the file into {folder}, or open the folder that holds it"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice!r:.200} occurs twice in one object")
    return value


def _mode(path: Path) -> int:
    """``st_mode`` of what is at ``path``, links followed; 0 where there is nothing, or nothing that can be named.

    Raises:
        CheckpointError: the system will not say, for want of permission or because the disk fails.
    """
    try:
        return path.stat().st_mode
    except ValueError:
        return 0
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return 0
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _check_printable(name: str, named_by: Path) -> None:
    # A name goes into messages, and a terminal obeys control characters.
    if not name.isprintable():
        raise CheckpointError(f"{named_by}: shard {name!r:.200}: expected a name of printable characters")


def _from_index(folder: Path) -> CheckpointFiles:
    index_path = folder / INDEX_NAME
    entries = read_json(index_path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(
            f"{index_path}: expected a non-empty object under 'weight_map', found {type(entries).__name__}"
        )
    shards: dict[str, Path] = {}
    weight_map: dict[str, Path] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index_path}: tensor {tensor!r:.200}: expected a file name, found {file!r:.80}")
        if file not in shards:
            shards[file] = _shard(folder, index_path, file)
        weight_map[tensor] = shards[file]
    return CheckpointFiles(folder, tuple(shards[file] for file in sorted(shards)), weight_map)


def _shard(folder: Path, index_path: Path, file: str) -> Path:
    # Both flavours of path: an index is written on any system, and "C:\x" or "..\x" are ordinary names to POSIX.
    for flavour in (PurePosixPath(file), PureWindowsPath(file)):
        if flavour.anchor or ".." in flavour.parts:
            raise CheckpointError(
                f"{index_path}: shard {file!r:.200} lies outside the checkpoint; expected a path inside {folder}"
            )
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{index_path}: shard {file!r:.200}: expected a name ending in .safetensors")
    _check_printable(file, index_path)
    shard = folder / file
    if not stat.S_ISREG(_mode(shard)):
        raise CheckpointError(
            f"{index_path}: shard {file!r:.200} is listed but missing from {folder}; the download is probably "
            f"incomplete"
        )
    check_inside(folder, shard, str(index_path))
    return shard
