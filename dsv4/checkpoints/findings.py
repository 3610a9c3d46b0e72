"""What is wrong, or looks wrong, with a checkpoint's experts: one sentence each.

A *problem* is an expert that cannot be loaded. A *warning* is legal and loads, but is what damaged, mis-converted or
badly calibrated checkpoints look like. A *note* is what a user should know and nobody need repair. Each rule is one
function below; it sees all layers and gives at most one finding, with the worst place as the example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.index import shown
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.statistics import LayerStatistics, MatrixStatistics, sum_reports
from dsv4.nvfp4 import GS_DIVISOR

Severity = Literal["problem", "warning", "note"]

SHARE_LIMIT = 0.01
"""Share of a layer's blocks that may be saturated, subnormal or zero. Scales from amax saturate one block of a matrix,
and such as are within 4 % of it."""

SATURATED_PER_MATRIX = 8
"""Saturated blocks of a matrix that are no sign of anything, however small the matrix."""

INPUT_RATIO_LIMIT = 100.0
"""Largest over smallest input scale of a layer's experts: beyond it an expert has seen hardly any calibration data."""

WEIGHT_LIMIT = 1000.0
"""Weights of trained models are far below; a reciprocal global scale gives values far above."""


@dataclass(frozen=True)
class Finding:
    """One sentence about a checkpoint.

    Attributes:
        severity: ``"problem"``, ``"warning"`` or ``"note"``.
        kind: a short name that scripts can look for.
        message: the sentence.
        layers: the layers it concerns; empty for the checkpoint as a whole.
    """

    severity: Severity
    kind: str
    message: str
    layers: tuple[int, ...] = ()


def findings(checkpoint: Checkpoint, layers: Sequence[LayerStatistics]) -> list[Finding]:
    """Everything there is to say about the layers that were looked at, problems first."""
    found = [
        *_unreadable(layers),
        *_missing_layers(checkpoint),
        *_configuration(checkpoint, layers),
        *_missing_input_scales(checkpoint, layers),
        *_unusable_input_scales(layers),
        *_placeholder_input_scales(layers),
        *_large_input_scales(layers),
        *_uneven_input_scales(layers),
        *_gate_up_input_scales(layers),
        *_gate_up_global_scales(layers),
        *_block_shares(layers),
        *_zero_experts(layers),
        *_large_weights(layers),
        *_recoded(layers),
    ]
    order = ("problem", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _unreadable(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    for layer in layers:
        for message in layer.unreadable.values():
            yield Finding("problem", "unreadable", message, (layer.layer,))


def _missing_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    present = checkpoint.moe_layers
    stated = checkpoint.config.get("num_hidden_layers")
    # Leading layers may be dense by design; a gap, or an end before the model's, is no design.
    end = max(stated if isinstance(stated, int) else 0, present[-1] + 1)
    missing = tuple(layer for layer in range(present[0], end) if layer not in present)
    if missing:
        yield Finding(
            "warning",
            "missing-layers",
            f"layers {shown(missing)} have no routed experts, though layers before or after them do or "
            f"num_hidden_layers ({stated}) includes them: shards may be missing",
            missing,
        )


def _configuration(checkpoint: Checkpoint, layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    if not checkpoint.config:
        yield Finding("note", "no-config", "there is no config.json: top-k and the SwiGLU limit are not known")
        return
    stated = checkpoint.quantization.expert_algorithm
    if any(layer.scaled for layer in layers) and stated not in ("", "NVFP4", "MIXED_PRECISION"):
        yield Finding(
            "warning",
            "configuration",
            f"the configuration calls the experts {stated!r}, the tensors are {checkpoint.format.name}: engines that "
            f"believe the configuration will misread them",
        )


def _missing_input_scales(checkpoint: Checkpoint, layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    without = {
        layer.layer: sorted({expert for scales in layer.input_scales.values() for expert in scales.missing})
        for layer in layers
    }
    count, there = (
        sum(map(len, without.values())),
        any(s.present for layer in layers for s in layer.input_scales.values()),
    )
    if not count:
        return
    where = tuple(layer for layer, experts in without.items() if experts)
    remedy = "W4A4 with static scales is not possible; W4A16 and scales per token are"
    if not there:
        chosen = checkpoint.quantization.activations
        if chosen in ("weight-only", "dynamic"):
            yield Finding("note", "no-input-scales", f"no expert has input scales, by choice ({chosen!r}): {remedy}")
        elif any(layer.scaled for layer in layers):
            yield Finding("warning", "missing-input-scales", f"no expert has input scales: {remedy}", where)
        else:
            yield Finding("note", "no-input-scales", f"this format has no input scales: {remedy}")
        return
    yield Finding(
        "warning",
        "missing-input-scales",
        f"an input scale that others have is missing for {_count(count, 'expert')} (first: layer {where[0]}, expert "
        f"{without[where[0]][0]}): in their layers {remedy}",
        where,
    )


def _unusable_input_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    problems = [
        (layer.layer, problem)
        for layer in layers
        for scales in layer.input_scales.values()
        for problem in scales.unusable.values()
    ]
    if problems:
        yield Finding(
            "warning",
            "unusable-input-scales",
            f"there is no using {_count(len(problems), 'input scale')} (first: {problems[0][1]})",
            tuple(dict.fromkeys(layer for layer, _ in problems)),
        )


def _is_placeholder(layers: Sequence[LayerStatistics], projection: str) -> float | None:
    """The value that stands for all, where data cannot have given it."""
    values = {value for layer in layers for value in layer.input_scales[projection].values.values()}
    measured_layers = sum(bool(layer.input_scales[projection].values) for layer in layers)
    # One value for all experts of one layer is legitimate (calibrated together); 1 never is, nor one for all layers.
    if len(values) == 1 and (measured_layers > 1 or values == {1.0}):
        return values.pop()
    return None


def _placeholder_input_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    constant = {name: value for name in PROJECTIONS if (value := _is_placeholder(layers, name)) is not None}
    if constant:
        stated = ", ".join(f"{name} {value:g}" for name, value in constant.items())
        yield Finding(
            "warning",
            "placeholder-input-scales",
            f"every expert of every layer has the same input scale ({stated}): a placeholder rather than calibration; "
            f"W4A4 with static scales will lose accuracy",
            tuple(layer.layer for layer in layers),
        )


def _large_input_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    large = [
        (value, layer.layer, expert, projection)
        for projection in PROJECTIONS
        if _is_placeholder(layers, projection) is None
        for layer in layers
        for expert, value in layer.input_scales[projection].values.items()
        if value >= 1
    ]
    if large:
        value, number, expert, projection = max(large)
        yield Finding(
            "warning",
            "large-input-scales",
            f"input scales of 1 or more: {len(large)} (largest: {value:g} of {projection} in layer {number}, expert "
            f"{expert}, for activations up to {value * GS_DIVISOR:g}): they may be reciprocals (2688 / amax), or not "
            f"calibrated",
            tuple(sorted({entry[1] for entry in large})),
        )


def _uneven_input_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    ratios = [
        (max(values) / min(values), layer.layer, projection)
        for layer in layers
        for projection in PROJECTIONS
        if (values := list(layer.input_scales[projection].values.values()))
    ]
    uneven = [entry for entry in ratios if entry[0] > INPUT_RATIO_LIMIT]
    if uneven:
        ratio, number, projection = max(uneven)
        yield Finding(
            "warning",
            "uneven-input-scales",
            f"input scales differ by up to {ratio:.3g} times between experts of a layer (layer {number}, "
            f"{projection}); beyond {INPUT_RATIO_LIMIT:g} times, experts have probably seen hardly any data",
            tuple(sorted({entry[1] for entry in uneven})),
        )


def _gate_up_input_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    differing = {
        layer.layer: [
            expert
            for expert, value in layer.input_scales["gate"].values.items()
            if layer.input_scales["up"].values.get(expert, value) != value
        ]
        for layer in layers
    }
    count = sum(map(len, differing.values()))
    if count:
        where = tuple(layer for layer, experts in differing.items() if experts)
        yield Finding(
            "warning",
            "gate-up-input-scales",
            f"input scales of gate and up differ for {_count(count, 'expert')} (first: layer {where[0]}, expert "
            f"{differing[where[0]][0]}), which read the same activation: the larger is used for both",
            where,
        )


def _gate_up_global_scales(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    ratios = [(ratio, layer.layer, expert) for layer in layers for expert, ratio in layer.gate_up_ratios.items()]
    if ratios:
        ratio, number, expert = max(ratios)
        yield Finding(
            "warning",
            "gate-up-global-scales",
            f"global scales of gate and up differ for {_count(len(ratios), 'expert')} (by up to {ratio:.4g} times: "
            f"layer {number}, expert {expert}): both are honoured here, but engines that take one for both go wrong",
            tuple(sorted({entry[1] for entry in ratios})),
        )


def _block_shares(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    def saturated(matrix: MatrixStatistics) -> int:
        tolerated = SATURATED_PER_MATRIX * len(matrix.global_scales)
        return matrix.saturated_blocks if matrix.saturated_blocks > tolerated else 0

    def subnormal(matrix: MatrixStatistics) -> int:
        return 0 if matrix.all_powers_of_two else matrix.subnormal_blocks

    rules = (
        ("saturated-blocks", saturated, "have the largest scale, 448: their values were probably cut off"),
        ("subnormal-blocks", subnormal, "have a subnormal scale (below 2^-6): precision is lost"),
        ("zero-blocks", lambda m: m.zero_blocks, "have scale 0, so that all their values are 0: pruned, or underflow"),
    )
    for kind, count, meaning in rules:
        shares = [
            (count(matrix) / matrix.blocks, layer.layer, projection)
            for layer in layers
            for projection, matrix in layer.matrices.items()
            if matrix.blocks
        ]
        beyond = [entry for entry in shares if entry[0] > SHARE_LIMIT]
        if beyond:
            share, number, projection = max(beyond)
            yield Finding(
                "warning",
                kind,
                f"up to {share:.2%} of a projection's blocks (layer {number}, {projection}) {meaning}",
                tuple(sorted({entry[1] for entry in beyond})),
            )


def _zero_experts(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    zero = [
        (layer.layer, expert, projection)
        for layer in layers
        for projection, matrix in layer.matrices.items()
        for expert in matrix.zero_experts
    ]
    if zero:
        number, expert, projection = zero[0]
        yield Finding(
            "warning",
            "zero-experts",
            f"expert matrices that are all zero: {len(zero)} (first: layer {number}, expert {expert}, {projection})",
            tuple(dict.fromkeys(entry[0] for entry in zero)),
        )


def _large_weights(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    large = [
        (magnitude, layer.layer, expert, projection)
        for layer in layers
        for projection, matrix in layer.matrices.items()
        for expert, magnitude in matrix.magnitudes.items()
        if magnitude > WEIGHT_LIMIT
    ]
    if large:
        magnitude, number, expert, projection = max(large)
        yield Finding(
            "warning",
            "large-weights",
            f"expert matrices with implausibly large weights: {len(large)} (up to {magnitude:.3g}: layer "
            f"{number}, expert {expert}, {projection}): the global scale may be a reciprocal",
            tuple(sorted({entry[1] for entry in large})),
        )


def _recoded(layers: Sequence[LayerStatistics]) -> Iterator[Finding]:
    total = sum_reports(layer.recoded for layer in layers)
    if total is not None and total.requantized:
        yield Finding(
            "warning",
            "requantized-blocks",
            f"{total.requantized} of {total.blocks} MXFP4 blocks have no exact NVFP4 form beside the rest of "
            "their tensor, and are rounded",
            tuple(layer.layer for layer in layers if layer.recoded is not None and layer.recoded.requantized),
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
