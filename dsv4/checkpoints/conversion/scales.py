"""Activation scales of a converted checkpoint: where they come from, and what it means to have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from dsv4.checkpoints.base import ExpertWeights, InputScale
from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.errors import CheckpointError, ConfigError

Activations = Literal["static", "weight-only", "dynamic"]
"""``"static"``: each projection has an ``input_scale``. The other two: none has, and the configuration says how the
experts are to be run, in the words of :data:`~dsv4.checkpoints.base.MissingScalePolicy`."""

LayerScales = tuple[tuple[float, ...], tuple[float, ...]]
"""Of one layer: gate's and up's scale, then down's, by expert."""


@dataclass(frozen=True)
class Calibration:
    """Input scales that have to be observed.

    Attributes:
        identity: what the result depends on (a digest of the text, ...); a conversion is only continued with the same.
        run: observes them in the checkpoint at a path: layer -> scales. Called once for a conversion, however often it
            is interrupted after that.
    """

    identity: str
    run: Callable[[Path], Mapping[int, LayerScales]]


def choose_activations(
    checkpoint: Checkpoint, wanted: Activations | None, calibration: Calibration | None
) -> Activations:
    """What the target's experts get.

    Raises:
        ConfigError: the source has no input scales and no choice was made, or contradictory ones.
    """
    if calibration is not None:
        if wanted not in (None, "static"):
            raise ConfigError(f"calibrated input scales are static ones, found activations={wanted!r}; choose one")
        return "static"
    if wanted in ("weight-only", "dynamic"):
        return wanted
    first = checkpoint.read_expert(checkpoint.moe_layers[0], 0)
    scales = [first.input_scales.get(projection) for projection in PROJECTIONS]
    if all(scale is not None and scale.value is not None for scale in scales):
        return "static"
    recorded = checkpoint.quantization.activations
    if wanted is None and recorded in ("weight-only", "dynamic"):
        return cast(Activations, recorded)
    problem = next((scale.problem for scale in scales if scale is not None and scale.problem), "")
    raise ConfigError(
        f"{checkpoint.folder}: the experts have no input scales{f' ({problem})' if problem else ''}, and W4A4 with "
        f"static scales needs them: observe them on a text (--calibrate TEXT), or choose to go without "
        f"(--activations weight-only, or --activations dynamic: a scale for each token)"
    )


def with_input_scales(
    weights: ExpertWeights,
    layer: int,
    expert: int,
    activations: Activations,
    calibrated: Mapping[int, LayerScales] | None,
) -> ExpertWeights:
    """``weights`` with the input scales that the target has.

    Raises:
        CheckpointError: static scales are wanted, and this expert has none.
    """
    if activations != "static":
        return replace(weights, input_scales={})
    if calibrated is not None:
        if layer not in calibrated:
            raise CheckpointError(f"layer {layer}: calibration observed nothing; it has layers {sorted(calibrated)}")
        l1, l2 = (scales[expert] for scales in calibrated[layer])
        return replace(weights, input_scales={"gate": InputScale(l1), "up": InputScale(l1), "down": InputScale(l2)})
    for projection in PROJECTIONS:
        scale = weights.input_scales.get(projection)
        if scale is None or scale.value is None:
            problem = scale.problem if scale is not None else ""
            raise CheckpointError(
                f"{problem or f'layer {layer}, expert {expert}: {projection} has no input scale'}, though others have; "
                f"convert into an empty folder with --calibrate TEXT, or --activations weight-only or dynamic"
            )
    return weights
