"""Opening a checkpoint and loading its routed experts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from dsv4.checkpoints.base import ExpertFormat, ExpertShape, ExpertWeights, LayerWeights, MissingScalePolicy
from dsv4.checkpoints.checks import check_decodable
from dsv4.checkpoints.compressed_tensors import CompressedTensorsNvfp4
from dsv4.checkpoints.dense_format import DenseExperts
from dsv4.checkpoints.files import locate, read_json
from dsv4.checkpoints.hub import resolve
from dsv4.checkpoints.index import ExpertIndex, ExpertLocation
from dsv4.checkpoints.modelopt import ModelOptNvfp4
from dsv4.checkpoints.mxfp4 import Mxfp4
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.progress import progress_bar
from dsv4.checkpoints.quantization import QuantizationInfo, read_quantization
from dsv4.checkpoints.source import TensorSource
from dsv4.checkpoints.stacking import stack_experts
from dsv4.errors import CheckpointError, ConfigError, InputError

_log = logging.getLogger(__name__)

# MXFP4 first: ModelOpt's takes any uint8 weight for its own, so that a missing scale is named.
FORMATS: tuple[ExpertFormat, ...] = (Mxfp4(), CompressedTensorsNvfp4(), ModelOptNvfp4(), DenseExperts())
"""The formats that are tried, in this order. A new format is one file and its line here."""

# Every model family has its own word for the same number; the first that is there counts.
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k")


def open_checkpoint(path: str | Path, *, revision: str | None = None, four_over_six: bool = False) -> Checkpoint:
    """Open the checkpoint at ``path``: a ``.safetensors`` file, a folder of them, or a Hugging Face id.

    Headers and JSON files are read and checked; no weights yet.

    Args:
        path: what to open. An id (``owner/name``, where no such path exists) is downloaded into the Hugging Face
            cache, or found there.
        revision: branch, tag or commit of an id.
        four_over_six: for floating-point experts, which are quantized while they are read: choose each block's scale
            between two (see :mod:`dsv4.nvfp4`).

    Raises:
        CheckpointError: no checkpoint there, no routed experts in it, an unknown format, missing experts, shards
            missing or outside the folder, a tensor in two files, or a configuration that contradicts the tensors; an
            id that cannot be had.
        ConfigError: an option that does not apply to what is opened.
    """
    return Checkpoint(resolve(path, revision), four_over_six=four_over_six)


class Checkpoint:
    """A checkpoint's routed experts, read layer by layer. See :func:`open_checkpoint`.

    Attributes:
        path: what was opened.
        folder: the folder of the files.
        source: all tensors by name, for whoever loads the rest of the model.
        config: ``config.json`` as a dict, ``{}`` where there is none.
        quantization: what the configuration says about quantization.
        format: the format of the experts.
        num_experts: E of every layer.
        shape: H and I of every expert.
        top_k: experts per token, None where the configuration does not say.
        swiglu_limit: the clamp before SwiGLU, None where the configuration has none.
    """

    def __init__(self, path: Path, *, four_over_six: bool = False) -> None:
        files = locate(path)
        self.path = path
        self.folder = files.folder
        self.config: dict[str, Any] = read_json(files.folder / "config.json")
        self.quantization: QuantizationInfo = read_quantization(files.folder, self.config)
        self.source = TensorSource.open(files)
        self._index = ExpertIndex(self.source, files.folder)
        self.num_experts = self._index.check_complete(self._positive_int(_NUM_EXPERTS_KEYS))
        first = self._index.location(self.moe_layers[0], 0)
        self.format = self._detect(first, four_over_six)
        self.shape: ExpertShape = self.format.shape(self.source, first)
        self._check_config_shape(first)
        self.top_k = self._positive_int(_TOP_K_KEYS)
        self.swiglu_limit = self._limit()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder layers that have routed experts, ascending."""
        return self._index.layers

    def other_tensors(self) -> list[str]:
        """The names of all tensors that are not a routed expert's, sorted: attention, shared experts, head, ..."""
        return sorted(name for name in self.source if name not in self._index.names)

    def location(self, layer: int, expert: int) -> ExpertLocation:
        """Where the tensors of one expert are.

        Raises:
            CheckpointError: there is no such layer or expert.
        """
        return self._index.location(layer, expert)

    def read_expert(self, layer: int, expert: int, device: str | torch.device = "cpu") -> ExpertWeights:
        """Read and check one expert: for conversion, or to replace one expert of a layer.

        Its tensors may be views of the file; ``device`` is where a format that has to compute does so.

        Raises:
            CheckpointError: as :meth:`load_layer`; unusable input scales are marked, not refused.
        """
        location = self._index.location(layer, expert)
        weights = self.format.read_expert(self.source, location, torch.device(device))
        check_decodable(self.source, location, {name: weights.projection(name) for name in PROJECTIONS})
        return weights

    def load_layer(
        self,
        layer: int,
        experts: Sequence[int] | None = None,
        *,
        device: str | torch.device = "cpu",
        on_missing_input_scale: MissingScalePolicy = "error",
        progress: bool = False,
    ) -> LayerWeights:
        """Read one layer's experts, stacked on ``device``. Takes the memory of the result and of one expert.

        Args:
            layer: a decoder layer of :attr:`moe_layers`.
            experts: the global ids to read, in the order of the result's rows: a ``range`` or a list, without
                repeats. None reads all. An expert-parallel rank passes its own.
            on_missing_input_scale: what to do where an expert's ``input_scale`` is missing, zero, negative, NaN or
                Inf. ``"error"`` raises, unless the configuration records one of the next two (as ``dsv4 convert``
                does); ``"weight-only"`` and ``"dynamic"`` leave out all input scales of the layer,
                say so in ``notes`` (and in the log), and set ``activation_format`` and ``activation_scale`` of the
                result to W4A16 or to scales per token. ``"ignore"`` leaves them out without a word.
            progress: draw a progress bar (needs rich).

        Raises:
            CheckpointError: a tensor that is missing or has the wrong shape, dtype or values. A NaN or negative block
                scale and a zero, negative, NaN or Inf global scale are never accepted; a zero block scale is.
            InputError: ``experts`` that repeat or do not exist.
        """
        ids = self._expert_ids(experts)
        with progress_bar(progress, f"layer {layer}", len(ids)) as advance:
            return self._load(layer, ids, torch.device(device), on_missing_input_scale, advance)

    def iter_layers(
        self,
        layers: Iterable[int] | None = None,
        experts: Sequence[int] | None = None,
        *,
        device: str | torch.device = "cpu",
        on_missing_input_scale: MissingScalePolicy = "error",
        progress: bool = False,
    ) -> Iterator[LayerWeights]:
        """:meth:`load_layer` for several layers (default: all of :attr:`moe_layers`), with one progress bar."""
        wanted = self.moe_layers if layers is None else tuple(layers)
        ids = self._expert_ids(experts)
        with progress_bar(progress, f"{len(wanted)} layers", len(wanted) * len(ids)) as advance:
            for layer in wanted:
                yield self._load(layer, ids, torch.device(device), on_missing_input_scale, advance)

    def close(self) -> None:
        """Let go of the mapped files."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {self.format.name}, {len(self.moe_layers)} MoE layers of "
            f"{self.num_experts} experts, {self.shape})"
        )

    def _load(
        self,
        layer: int,
        ids: Sequence[int],
        device: torch.device,
        policy: MissingScalePolicy,
        advance: Callable[[], None],
    ) -> LayerWeights:
        for expert in ids:
            # Before anything is allocated: one expert's size times the number of small ones may be any size at all.
            location = self._index.location(layer, expert)
            shape = self.format.shape(self.source, location)
            if shape != self.shape:
                raise CheckpointError(f"{self.folder}: {location}: found {shape}; expected {self.shape} as elsewhere")
        # A converted checkpoint says what was decided for it; then no scale is missing, and nothing is to be warned of.
        recorded = self.quantization.activations
        decided = policy == "error" and recorded in ("weight-only", "dynamic")
        weights = stack_experts(
            layer,
            ids,
            self.shape,
            lambda expert: self.read_expert(layer, expert, device),
            device=device,
            on_missing_input_scale=cast(MissingScalePolicy, recorded) if decided else policy,
            advance=advance,
        )
        for note in () if decided else weights.notes:
            _log.warning("%s: layer %d: %s", self.path, layer, note)
        return weights

    def _expert_ids(self, experts: Sequence[int] | None) -> Sequence[int]:
        if experts is None:
            return range(self.num_experts)
        ids = list(experts)
        outside = [expert for expert in ids if not 0 <= expert < self.num_experts]
        if outside or len(set(ids)) != len(ids) or not ids:
            raise InputError(
                f"experts must be distinct ids in [0, {self.num_experts}), at least one; found {ids[:16]}"
                + (f", outside: {outside[:8]}" if outside else "")
            )
        return ids

    def _detect(self, location: ExpertLocation, four_over_six: bool) -> ExpertFormat:
        for candidate in FORMATS:
            if candidate.detect(self.source, location, self.config):
                if four_over_six and not isinstance(candidate, DenseExperts):
                    raise ConfigError(
                        f"{self.path}: four_over_six is for floating-point experts, which are quantized while they "
                        f"are read; found {candidate.name}"
                    )
                return DenseExperts(four_over_six=True) if four_over_six else candidate
        found = {name: self.source[name].dtype for name in location.tensors.values()}
        raise CheckpointError(
            f"{self.folder}: {location} is in no format that can be read; expected one of "
            f"{[candidate.name for candidate in FORMATS]}, found {found}"
        )

    def _config_value(self, keys: Iterable[str]) -> tuple[str, Any]:
        """The first of ``keys`` that the configuration has, with its value; multimodal models nest it."""
        nested = self.config.get("text_config")
        for section in (self.config, nested if isinstance(nested, dict) else {}):
            for key in keys:
                if section.get(key) is not None:
                    return key, section[key]
        return "", None

    def _positive_int(self, keys: Iterable[str]) -> int | None:
        key, value = self._config_value(keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {key} must be a positive integer, found {value!r:.80}"
            )
        return value

    def _limit(self) -> float | None:
        key, value = self._config_value(("swiglu_limit",))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(
                f"{self.folder / 'config.json'}: {key} must be a positive number, found {value!r:.80}"
            )
        return float(value)

    def _check_config_shape(self, location: ExpertLocation) -> None:
        found = {"hidden_size": self.shape.hidden_size, "moe_intermediate_size": self.shape.intermediate_size}
        for key, size in found.items():
            stated = self._positive_int((key,))
            if stated is not None and stated != size:
                raise CheckpointError(
                    f"{self.folder}: the tensors of {location} have {key} {size}, but config.json says {stated}"
                )
