"""Named tensors over one or many safetensors files.

Headers are read once, when the source is opened; tensors are read when asked for. safetensors maps a file into memory,
so that a tensor read from here is a view of the file: reading costs no memory of its own until somebody copies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4.checkpoints.files import CheckpointFiles
from dsv4.checkpoints.header import TensorInfo, read_header
from dsv4.errors import CheckpointError


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
            raise CheckpointError(f"{info}: cannot be read as {info.dtype} ({_one_line(error)})") from error
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
                raise CheckpointError(f"{file}: not a readable safetensors file ({_one_line(error)})") from error
            self._handles[file] = handle
        return handle

    def _read_header(self, file: Path) -> None:
        for name, info in read_header(file).items():
            if name in self._infos:
                raise CheckpointError(
                    f"{file}: tensor {name!r:.300} is also in {self._infos[name].file}; expected every tensor in one "
                    f"file"
                )
            self._infos[name] = info


def _one_line(error: Exception) -> str:
    """What the library says, on one line and without what a terminal would obey: it quotes the file."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return "".join(char if char.isprintable() else "?" for char in text[:500])


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
