"""Which safetensors files make up a checkpoint, and the JSON files beside them.

Three layouts are read: one ``*.safetensors`` file, a folder with ``model.safetensors.index.json`` (the index names the
shards), and a folder of ``*.safetensors`` files without an index (all of them belong).

A checkpoint is something downloaded, so a shard must lie inside the checkpoint's folder: an index that names
``../elsewhere`` or an absolute path, or a link that leads out, is refused. The one exception is the Hugging Face cache,
whose ``snapshots/<revision>/`` folders consist of links into ``blobs/`` of the same repository.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dsv4.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


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
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: expected a .safetensors file or a folder of them, found a file ending in {path.suffix!r}"
            )
        return CheckpointFiles(path.parent, (path,), {})
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; expected a .safetensors file or a folder of them")
    if (path / INDEX_NAME).is_file():
        return _from_index(path)
    shards = tuple(sorted(entry for entry in path.iterdir() if entry.suffix == ".safetensors"))
    if not shards:
        found = sorted(entry.name for entry in path.iterdir())[:8]
        raise CheckpointError(f"{path}: no .safetensors file and no {INDEX_NAME}; the folder holds {found}")
    for shard in shards:
        _check_inside(path, shard, "the folder")
    return CheckpointFiles(path, shards, {})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, ``{}`` if there is no such file.

    Raises:
        CheckpointError: not valid JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _from_index(folder: Path) -> CheckpointFiles:
    index_path = folder / INDEX_NAME
    entries = read_json(index_path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index_path}: expected a non-empty object under 'weight_map', found {entries!r:.80}")
    shards: dict[str, Path] = {}
    weight_map: dict[str, Path] = {}
    for tensor, file in entries.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index_path}: tensor {tensor!r}: expected a file name, found {file!r:.80}")
        if file not in shards:
            shards[file] = _shard(folder, index_path, file)
        weight_map[tensor] = shards[file]
    return CheckpointFiles(folder, tuple(shards[file] for file in sorted(shards)), weight_map)


def _shard(folder: Path, index_path: Path, file: str) -> Path:
    # Both flavours of path: an index is written on any system, and "C:\x" or "..\x" are ordinary names to POSIX.
    for flavour in (PurePosixPath(file), PureWindowsPath(file)):
        if flavour.anchor or ".." in flavour.parts:
            raise CheckpointError(
                f"{index_path}: shard {file!r} lies outside the checkpoint; expected a path inside {folder}"
            )
    if not file.endswith(".safetensors") or "\0" in file:
        raise CheckpointError(f"{index_path}: shard {file!r}: expected a name ending in .safetensors")
    shard = folder / file
    if not shard.is_file():
        raise CheckpointError(
            f"{index_path}: shard {file!r} is listed but missing from {folder}; the download is probably incomplete"
        )
    _check_inside(folder, shard, str(index_path))
    return shard


def _check_inside(folder: Path, shard: Path, named_by: str) -> None:
    real = shard.resolve()
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise CheckpointError(
            f"{shard}: named by {named_by}, but a link to {real}, outside the checkpoint; "
            f"copy the file into {folder}, or open the folder that holds it"
        )
