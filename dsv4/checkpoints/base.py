"""What passes between a checkpoint format and the rest: one expert, one layer, and the protocol of a format.

Adding a format is one file with a class that follows :class:`ExpertFormat`, and its line in ``checkpoint.FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor

from dsv4.checkpoints.index import ExpertLocation
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.source import TensorSource
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import Nvfp4Tensor

MissingScalePolicy = Literal["error", "weight-only", "dynamic", "ignore"]
"""What a missing (or unusable) activation scale leads to.

``"error"``: an exception. ``"weight-only"``: the layer runs as W4A16. ``"dynamic"``: the layer runs with a scale per
token. Both of these report it. ``"ignore"``: nothing, for a caller who has chosen a mode that needs no input scales;
the result then has none, even where the checkpoint does.
"""


@dataclass(frozen=True)
class InputScale:
    """The activation scale of one projection, or why there is none.

    Attributes:
        value: a positive finite multiplier (``amax / 2688``), None if there is none to use.
        problem: what is wrong, naming file and tensor; empty where ``value`` is set.
    """

    value: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class RecodeReport:
    """What a cast from MXFP4 to NVFP4 did to the blocks of 32 values; reports add up.

    Attributes:
        blocks: all blocks.
        exact: kept their codes; only the scale is written in another way.
        shifted: keep their values, with other codes and another exponent.
        requantized: have a value that NVFP4 could not hold beside the rest of the tensor, and was rounded.
    """

    blocks: int = 0
    exact: int = 0
    shifted: int = 0
    requantized: int = 0

    def __add__(self, other: RecodeReport) -> RecodeReport:
        return RecodeReport(
            self.blocks + other.blocks,
            self.exact + other.exact,
            self.shifted + other.shifted,
            self.requantized + other.requantized,
        )


@dataclass(frozen=True)
class ExpertShape:
    """The dimensions of an expert: gate and up are ``[intermediate_size, hidden_size]``, down is the transpose."""

    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        return f"hidden {self.hidden_size}, intermediate {self.intermediate_size}"


@dataclass(frozen=True)
class ExpertWeights:
    """One expert in NVFP4.

    Attributes:
        gate, up: ``[I, H]`` with a 0-d global scale each.
        down: ``[H, I]`` with a 0-d global scale.
        input_scales: one :class:`InputScale` per projection; empty where the format has none.
        recoded: what the cast to NVFP4 did; None where the format is NVFP4 already, or floating point.
    """

    gate: Nvfp4Tensor
    up: Nvfp4Tensor
    down: Nvfp4Tensor
    input_scales: Mapping[str, InputScale] = field(default_factory=dict)
    recoded: RecodeReport | None = None

    def __post_init__(self) -> None:
        gate, up, down = (tuple(self.projection(name).shape) for name in PROJECTIONS)
        if gate != up or gate != tuple(reversed(down)):
            raise CheckpointError(
                f"an expert's matrices do not fit together: gate {gate}, up {up}, down {down}; "
                f"expected [I, H], [I, H] and [H, I]"
            )

    def projection(self, name: str) -> Nvfp4Tensor:
        """``gate``, ``up`` or ``down``."""
        tensor: Nvfp4Tensor = getattr(self, name)
        return tensor

    @property
    def shape(self) -> ExpertShape:
        """H and I of this expert."""
        intermediate_size, hidden_size = self.gate.shape
        return ExpertShape(hidden_size, intermediate_size)


class PrepareArguments(TypedDict):
    """The keyword arguments of ``Nvfp4MoE.prepare_weights_from_stacked``; shapes as in :class:`LayerWeights`."""

    l1_fp4_stacked: Tensor
    l1_sf_stacked: Tensor
    l1_gs: Tensor
    l2_fp4_stacked: Tensor
    l2_sf_stacked: Tensor
    l2_gs: Tensor
    l1_input_scale: Tensor | None
    l2_input_scale: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """The experts of one layer, stacked as ``Nvfp4MoE.prepare_weights_from_stacked`` takes them.

    Attributes:
        layer: the decoder layer.
        experts: the global id of each of the E rows.
        l1_fp4: uint8 ``[E, 2I, H/2]``, gate rows then up rows.
        l1_sf: float8_e4m3fn ``[E, 2I, H/16]``.
        l1_gs: float32 ``[E, 2]``, gate's and up's.
        l2_fp4: uint8 ``[E, H, I/2]``.
        l2_sf: float8_e4m3fn ``[E, H, I/16]``.
        l2_gs: float32 ``[E]``.
        l1_input_scale, l2_input_scale: float32 ``[E]``; both None where any expert lacks a usable one.
        activation_format, activation_scale: the arguments of ``Nvfp4MoE`` that these weights call for: ``("nvfp4",
            "static")`` with input scales, else what the policy chose: ``("bf16", "static")`` for weight-only (the scale
            mode then has no effect), ``("nvfp4", "token")`` otherwise.
        notes: what a user should hear about this layer, one sentence each; empty most of the time.
        recoded: the sum of the experts' reports; None where no expert has one.
    """

    layer: int
    experts: tuple[int, ...]
    l1_fp4: Tensor
    l1_sf: Tensor
    l1_gs: Tensor
    l2_fp4: Tensor
    l2_sf: Tensor
    l2_gs: Tensor
    l1_input_scale: Tensor | None = None
    l2_input_scale: Tensor | None = None
    activation_format: str = "nvfp4"
    activation_scale: str = "token"
    notes: tuple[str, ...] = ()
    recoded: RecodeReport | None = None

    @property
    def num_experts(self) -> int:
        """E, the number of experts held here."""
        return self.l1_fp4.shape[0]

    @property
    def shape(self) -> ExpertShape:
        """H and I."""
        return ExpertShape(self.l2_fp4.shape[1], self.l1_fp4.shape[1] // 2)

    def prepare_arguments(self) -> PrepareArguments:
        """Keyword arguments for ``Nvfp4MoE.prepare_weights_from_stacked``."""
        return {
            "l1_fp4_stacked": self.l1_fp4,
            "l1_sf_stacked": self.l1_sf,
            "l1_gs": self.l1_gs,
            "l2_fp4_stacked": self.l2_fp4,
            "l2_sf_stacked": self.l2_sf,
            "l2_gs": self.l2_gs,
            "l1_input_scale": self.l1_input_scale,
            "l2_input_scale": self.l2_input_scale,
        }


class ExpertFormat(Protocol):
    """A way to store experts. Implementations hold no state: one instance serves every checkpoint."""

    @property
    def name(self) -> str:
        """What the format is called in messages and listings."""

    def detect(self, source: TensorSource, location: ExpertLocation, config: Mapping[str, Any]) -> bool:
        """Whether ``location``, an expert of the checkpoint, is stored in this format. Reads headers only."""

    def shape(self, source: TensorSource, location: ExpertLocation) -> ExpertShape:
        """The dimensions of the expert at ``location``. Reads headers only.

        Raises:
            CheckpointError: a tensor is missing, or shapes and dtypes do not fit each other.
        """

    def read_expert(self, source: TensorSource, location: ExpertLocation, device: torch.device) -> ExpertWeights:
        """Read and check one expert.

        ``device`` is where the weights will be used: a format that computes does so there, one that only reads may
        return views of the file.

        Raises:
            CheckpointError: as :meth:`shape`, and for values that must not be computed with. A missing or unusable
                input scale is not an error here but an :class:`InputScale` with a ``problem``.
        """
