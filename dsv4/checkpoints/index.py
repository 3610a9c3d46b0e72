"""Where every routed expert of a checkpoint is: layer -> expert -> its tensors, from the tensor names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from dsv4.checkpoints.naming import FAMILIES, NameFamily, parse
from dsv4.checkpoints.source import TensorSource
from dsv4.errors import CheckpointError

_SHOWN = 8  # ids listed in a message before "..."
_MAX_EXPERTS = 100_000  # what the five digits of a per-expert name can tell apart


@dataclass(frozen=True)
class ExpertLocation:
    """The tensors of one expert.

    Attributes:
        layer: the decoder layer.
        expert: the global expert id (the row in a fused tensor).
        family: how the tensors are named.
        prefix: what stands before ``layers`` in their names.
        tensors: (projection, suffix) -> full tensor name.
    """

    layer: int
    expert: int
    family: NameFamily
    prefix: str
    tensors: Mapping[tuple[str, str], str]

    def expected_name(self, projection: str, suffix: str) -> str:
        """The name that a tensor of this expert has, or would have if it were there."""
        return self.family.tensor_name(self.prefix, self.layer, self.expert, projection, suffix)

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}"


@dataclass
class _Layer:
    family: NameFamily
    prefix: str
    experts: dict[int, dict[tuple[str, str], str]] = field(default_factory=dict)
    fused: dict[tuple[str, str], str] = field(default_factory=dict)


class ExpertIndex:
    """All routed experts of a checkpoint.

    Args:
        source: the checkpoint's tensors.
        folder: named in messages.

    Raises:
        CheckpointError: no routed experts at all, one layer named in two ways, or fused tensors that disagree.
    """

    def __init__(self, source: TensorSource, folder: Path) -> None:
        self._folder = folder
        self._layers: dict[int, _Layer] = {}
        self.names: set[str] = set()
        for name in source:
            self._add(name)
        if not self._layers:
            patterns = [family.tensor_name("model.", 0, 0, "down", "weight") for family in FAMILIES]
            raise CheckpointError(
                f"{folder}: no routed experts among {len(source)} tensors; expected names such as {patterns}"
            )
        for layer, entry in self._layers.items():
            if entry.fused:
                self._expand_fused(source, layer, entry)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have routed experts, ascending."""
        return tuple(sorted(self._layers))

    def experts(self, layer: int) -> tuple[int, ...]:
        """The expert ids that ``layer`` has, ascending."""
        return tuple(sorted(self._entry(layer).experts))

    def location(self, layer: int, expert: int) -> ExpertLocation:
        """The tensors of one expert.

        Raises:
            CheckpointError: there is no such layer or expert.
        """
        entry = self._entry(layer)
        if expert not in entry.experts:
            raise CheckpointError(
                f"{self._folder}: layer {layer} has no expert {expert}; it has {shown(self.experts(layer))}"
            )
        return ExpertLocation(layer, expert, entry.family, entry.prefix, entry.experts[expert])

    def check_complete(self, num_experts: int | None) -> int:
        """Require every layer to have the experts 0 ... E-1; returns E.

        Args:
            num_experts: E as the model's configuration states it; None takes the largest id found, plus one.

        Raises:
            CheckpointError: holes in the numbering, ids beyond E, or layers that differ.
        """
        expected = num_experts
        if expected is None:
            expected = 1 + max(max(entry.experts) for entry in self._layers.values())
        for layer in self.layers:
            experts = self._layers[layer].experts
            if len(experts) == expected and max(experts) < expected:
                continue
            # Found lazily: what a configuration states may be any number.
            missing = list(islice((expert for expert in range(expected) if expert not in experts), _SHOWN + 1))
            beyond = sorted(expert for expert in experts if expert >= expected)
            why = "the configuration says" if num_experts is not None else "the largest id of any layer implies"
            raise CheckpointError(
                f"{self._folder}: layer {layer} has {len(experts)} experts where {why} {expected}: "
                + (
                    f"missing {shown(missing, expected - len(experts) + len(beyond))}"
                    if missing
                    else f"unexpected {shown(beyond)}"
                )
            )
        return expected

    def _entry(self, layer: int) -> _Layer:
        if layer not in self._layers:
            raise CheckpointError(
                f"{self._folder}: layer {layer} has no routed experts; layers that have: {shown(self.layers)}"
            )
        return self._layers[layer]

    def _add(self, name: str) -> None:
        parsed = parse(name)
        if parsed is None:
            return
        entry = self._layers.setdefault(parsed.layer, _Layer(parsed.family, parsed.prefix))
        if (entry.family, entry.prefix) != (parsed.family, parsed.prefix):
            raise CheckpointError(
                f"{self._folder}: tensor {name!r:.300} names an expert of layer {parsed.layer} in the way of "
                f"{parsed.family.name!r} with prefix {parsed.prefix!r}, other tensors of this layer follow "
                f"{entry.family.name!r} with prefix {entry.prefix!r}; expected one way"
            )
        self.names.add(name)
        key = (parsed.projection, parsed.suffix)
        if parsed.expert is None:
            entry.fused[key] = name
        else:
            entry.experts.setdefault(parsed.expert, {})[key] = name

    def _expand_fused(self, source: TensorSource, layer: int, entry: _Layer) -> None:
        """A fused layer's experts are the rows of its tensors."""
        counts = {name: source[name].shape[0] if source[name].shape else 0 for name in entry.fused.values()}
        if len(set(counts.values())) != 1 or not 0 < min(counts.values()) <= _MAX_EXPERTS:
            raise CheckpointError(
                f"{self._folder}: layer {layer}: fused expert tensors must agree on a first dimension of 1 to "
                f"{_MAX_EXPERTS}, found {counts}"
            )
        entry.experts = dict.fromkeys(range(next(iter(counts.values()))), entry.fused)


def shown(ids: Iterable[int], count: int | None = None) -> str:
    """Ids for a message: all of a few, the first ones of many. ``count`` is how many there are if not all are given."""
    ids = list(ids)
    count = len(ids) if count is None else count
    head = ", ".join(str(i) for i in ids[:_SHOWN])
    return f"[{head}]" if count <= _SHOWN else f"[{head}, ...] ({count} in all)"
