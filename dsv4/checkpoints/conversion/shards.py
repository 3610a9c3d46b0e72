"""Writing one shard, and comparing one shard with its source."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertWeights
from dsv4.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsv4.checkpoints.conversion.journal import replacing, write_all
from dsv4.checkpoints.conversion.plan import ExpertPart, ShardPlan, target_family
from dsv4.checkpoints.conversion.scales import Activations, LayerScales, with_input_scales
from dsv4.checkpoints.modelopt import expert_tensors
from dsv4.errors import CheckpointError

_CHUNK = 4 << 20

Advance = Callable[[int], None]
"""Told how many more bytes of the target are there."""


@dataclass(frozen=True)
class WriteShard:
    """Converts one shard into ``target``.

    Attributes:
        target: the folder.
        activations, calibrated: see :mod:`~dsv4.checkpoints.conversion.scales`.
    """

    target: Path
    activations: Activations
    calibrated: Mapping[int, LayerScales] | None

    def __call__(self, checkpoint: Checkpoint, plan: ShardPlan, advance: Advance) -> dict[str, int]:
        """Write it; returns what was counted.

        Raises:
            CheckpointError: the source cannot be read, or the target cannot be written.
        """
        counts = _Counts()
        with replacing(self.target / plan.name) as handle:
            _reserve(handle, plan.size)
            write_all(handle, plan.header, 0)
            advance(len(plan.header))
            for copy in plan.copies:
                with _reading(copy.source) as source:
                    for start in range(0, copy.nbytes, _CHUNK):
                        data = _read_all(source, copy.source, copy.start + start, min(_CHUNK, copy.nbytes - start))
                        write_all(handle, data, copy.target + start)
                        advance(len(data))
                counts.add({"passed_tensors": 1, "passed_bytes": copy.nbytes})
            for part in plan.experts:
                weights = checkpoint.read_expert(part.layer, part.expert)
                self._write_expert(handle, checkpoint, part, weights)
                advance(sum(nbytes for _, nbytes in part.places.values()))
                counts.add_expert(part, weights)
        checkpoint.source.close()  # lets go of this shard's pages
        return counts.values

    def _write_expert(self, handle: int, checkpoint: Checkpoint, part: ExpertPart, weights: ExpertWeights) -> None:
        weights = with_input_scales(weights, part.layer, part.expert, self.activations, self.calibrated)
        location = checkpoint.location(part.layer, part.expert)
        if weights.shape != checkpoint.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {location}: found {weights.shape}; expected {checkpoint.shape}"
            )
        tensors = expert_tensors(
            weights, part.layer, part.expert, family=target_family(location.family), prefix=location.prefix
        )
        for name, (offset, nbytes) in part.places.items():
            with _bytes_of(tensors[name]) as data:
                if len(data) != nbytes:
                    raise CheckpointError(f"{name}: {len(data)} bytes where {nbytes} were planned")
                write_all(handle, data, offset)


@dataclass(frozen=True)
class CheckShard:
    """Reads one shard of ``target`` again and compares it with the source.

    Attributes:
        target, activations, calibrated: as in :class:`WriteShard`; without ``calibrated`` scales, those of a calibrated
            target are only required to be usable.
        calibration: whether the target's input scales were calibrated.
    """

    target: Path
    activations: Activations
    calibrated: Mapping[int, LayerScales] | None
    calibration: bool

    def __call__(self, checkpoint: Checkpoint, plan: ShardPlan, advance: Advance) -> dict[str, int]:
        """Compare it; returns how many tensors and experts were.

        Raises:
            CheckpointError: something differs, or the target cannot be read.
        """
        file = self.target / plan.name
        counts = _Counts()
        with _reading(file) as handle:
            size = os.fstat(handle).st_size
            if size != plan.size:
                raise CheckpointError(f"{file}: {size} bytes; expected {plan.size}")
            if _read_all(handle, file, 0, len(plan.header)) != plan.header:
                raise CheckpointError(f"{file}: the header is not that of a conversion of this source")
            advance(len(plan.header))
            for copy in plan.copies:
                with _reading(copy.source) as source:
                    for start in range(0, copy.nbytes, _CHUNK):
                        length = min(_CHUNK, copy.nbytes - start)
                        found = _read_all(handle, file, copy.target + start, length)
                        if found != _read_all(source, copy.source, copy.start + start, length):
                            raise CheckpointError(f"{file}: tensor {copy.name!r} differs from that in {copy.source}")
                        advance(length)
                counts.add({"passed_tensors": 1, "passed_bytes": copy.nbytes})
        with open_checkpoint(self.target) as converted:
            for part in plan.experts:
                source_weights = checkpoint.read_expert(part.layer, part.expert)
                self._compare(file, part, source_weights, converted.read_expert(part.layer, part.expert))
                advance(sum(nbytes for _, nbytes in part.places.values()))
                counts.add_expert(part, source_weights)
        checkpoint.source.close()
        return counts.values

    def _compare(self, file: Path, part: ExpertPart, source: ExpertWeights, found: ExpertWeights) -> None:
        expected = source
        if not self.calibration or self.calibrated is not None:
            expected = with_input_scales(source, part.layer, part.expert, self.activations, self.calibrated)
        for projection in part.projections:
            where = f"{file}: layer {part.layer}, expert {part.expert}: {projection}"
            left, right = expected.projection(projection), found.projection(projection)
            for what, a, b in (
                ("codes", left.codes, right.codes),
                ("block scales", left.sf.view(torch.uint8), right.sf.view(torch.uint8)),
                ("global scale", left.gs.float().reshape(()), right.gs.reshape(())),
            ):
                if not torch.equal(a, b):
                    raise CheckpointError(f"{where}: {what} differ from those of the source")
            scale = found.input_scales.get(projection)
            value = scale.value if scale is not None else None
            if self.activations == "static" and value is None:
                raise CheckpointError(f"{where}: no input scale; expected one")
            if expected is not source or not self.calibration:
                wanted = expected.input_scales.get(projection)
                if value != (_fp32(wanted.value) if wanted is not None and wanted.value is not None else None):
                    raise CheckpointError(f"{where}: input scale {value}, expected {wanted}")


class _Counts:
    """Running sums by name."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add(self, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self.values[name] = self.values.get(name, 0) + count

    def add_expert(self, part: ExpertPart, weights: ExpertWeights) -> None:
        self.add(
            {
                "experts": int(part.counted),
                "expert_source_bytes": part.source_bytes,
                "expert_bytes": sum(nbytes for _, nbytes in part.places.values()),
            }
        )
        recoded = getattr(weights, "recoded", None)
        if part.counted and recoded is not None:
            self.add({f"recoded_{entry.name}": int(getattr(recoded, entry.name)) for entry in fields(recoded)})


@contextmanager
def _reading(file: Path) -> Iterator[int]:
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        yield handle
    finally:
        os.close(handle)


def _read_all(handle: int, file: Path, offset: int, nbytes: int) -> bytes:
    """``nbytes`` from ``offset``.

    Raises:
        CheckpointError: the file ends before that, or cannot be read.
    """
    parts: list[bytes] = []
    while nbytes:
        try:
            data = os.pread(handle, nbytes, offset)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        if not data:
            raise CheckpointError(f"{file}: ends {nbytes} bytes early; was it changed meanwhile?")
        parts.append(data)
        offset, nbytes = offset + len(data), nbytes - len(data)
    return b"".join(parts)


def _reserve(handle: int, size: int) -> None:
    """Claim the disk space before the work is done, where the file system can."""
    try:
        os.posix_fallocate(handle, 0, size)
    except AttributeError:  # a system without the call
        os.ftruncate(handle, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, size)


@contextmanager
def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The memory of a contiguous CPU tensor, which lives as long as the block."""
    nbytes = tensor.numel() * tensor.element_size()
    yield memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B") if nbytes else memoryview(b"")


def _fp32(value: float) -> float:
    """``value`` as it is read back from an fp32 tensor."""
    return torch.tensor(value, dtype=torch.float32).item()
