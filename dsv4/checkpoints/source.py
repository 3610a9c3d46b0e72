"""Named tensors over one or many safetensors files.

Headers are read once, when the source is opened; tensors are read when asked for. safetensors maps a file into memory,
so that a tensor read from here is a view of the file: reading costs no memory of its own until somebody copies it.

The safetensors library checks a header's types, that the offsets lie inside the file and leave no holes, and that every
tensor has the bytes that its shape and dtype need. What it lets pass and the format forbids is checked here: a name
that occurs twice (it takes the last), and shapes that no tensor library can represent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.checkpoints.files import CheckpointFiles, parse_json
from dsv4.errors import CheckpointError

_HEADER_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_ELEMENTS = 2**63 - 1
_MAX_DIMS = 64


@dataclass(frozen=True)
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


class TensorSource(Mapping[str, TensorInfo]):
    """A mapping from tensor name to :class:`TensorInfo` that can also read the tensors.

    Args:
        files: safetensors files.
        weight_map: what an index claims, tensor name -> file; checked against the headers.

    Raises:
        CheckpointError: a file is not safetensors, a tensor is in two files, or the index and the headers disagree.
    """

    def __init__(self, files: Sequence[Path], weight_map: Mapping[str, Path] | None = None) -> None:
        self._handles: dict[Path, Any] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            self._read_header(file)
        for name, file in (weight_map or {}).items():
            info = self._infos.get(name)
            if info is None or info.file != file:
                found = "no file has it" if info is None else f"it is in {info.file}"
                raise CheckpointError(f"{file}: the index places tensor {name!r:.300} in this file, but {found}")

    @classmethod
    def open(cls, files: CheckpointFiles) -> TensorSource:
        """The tensors of a checkpoint found by :func:`dsv4.checkpoints.files.locate`."""
        return cls(files.shards, files.weight_map)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def read(self, name: str) -> Tensor:
        """The whole tensor on the CPU: a view of the mapped file, to be copied and never written to."""
        info = self._infos[name]
        try:
            tensor: Tensor = self._handle(info.file).get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{info}: cannot be read as {info.dtype} ({_first_line(error)})") from error
        return tensor

    def slice(self, name: str) -> Any:
        """A lazy safetensors slice: nothing is read until it is indexed (``slice[...]``, ``slice[3]``)."""
        return self._handle(self._infos[name].file).get_slice(name)

    def close(self) -> None:
        """Let go of the mapped files. Tensors already read stay valid; a later read maps its file again."""
        self._handles.clear()

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, file: Path) -> Any:
        handle = self._handles.get(file)
        if handle is None:
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
            self._handles[file] = handle
        return handle

    def _read_header(self, file: Path) -> None:
        handle = self._handle(file)
        _check_header(file)
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            if name in self._infos:
                raise CheckpointError(
                    f"{file}: tensor {name!r:.300} is also in {self._infos[name].file}; expected every tensor in one "
                    f"file"
                )
            entry = handle.get_slice(name)
            info = TensorInfo(name, file, tuple(entry.get_shape()), entry.get_dtype())
            # A dimension of 0 makes any shape fit no bytes at all, and the others could be anything.
            if len(info.shape) > _MAX_DIMS or math.prod(max(size, 1) for size in info.shape) > _MAX_ELEMENTS:
                raise CheckpointError(f"{info}: no tensor can have the shape {list(info.shape)!s:.200}")
            self._infos[name] = info


def _check_header(file: Path) -> None:
    """Refuse what the library lets pass; it has found the header's length and types to be in order."""
    try:
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        if not header.startswith(b"{"):
            raise ValueError("the header does not begin with '{'")
        entries = parse_json(header)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not a well-formed safetensors header ({error})") from error
    for name, entry in entries.items():
        if name != "__metadata__" and (not isinstance(entry, dict) or entry.keys() != _HEADER_FIELDS):
            raise CheckpointError(
                f"{file}: tensor {name!r:.300}: expected a header entry of {sorted(_HEADER_FIELDS)}, "
                f"found {entry!s:.200}"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The torch dtype of a stored tensor.

    Raises:
        CheckpointError: a dtype that this build of torch does not have.
    """
    dtype = _TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise CheckpointError(f"{info}: dtype {info.dtype} is unknown; expected one of {sorted(_TORCH_DTYPES)}")
    return dtype


_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
