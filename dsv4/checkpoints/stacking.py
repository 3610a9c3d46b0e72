"""Experts, one at a time, into the stacked tensors of a layer.

The result is allocated first and filled expert by expert, so that loading a layer takes the memory of the layer and of
one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from dsv4.checkpoints.base import ExpertShape, ExpertWeights, LayerWeights, MissingScalePolicy, RecodeReport
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.errors import CheckpointError, ConfigError
from dsv4.nvfp4 import BLOCK

# What the weights then call for; see LayerWeights.
_ADVICE = {"weight-only": ("bf16", "static"), "dynamic": ("nvfp4", "token"), "ignore": ("nvfp4", "token")}


def stack_experts(
    layer: int,
    experts: Sequence[int],
    shape: ExpertShape,
    read: Callable[[int], ExpertWeights],
    *,
    device: torch.device,
    on_missing_input_scale: MissingScalePolicy,
    advance: Callable[[], None] = lambda: None,
) -> LayerWeights:
    """Read the experts of a layer into stacked tensors on ``device``.

    Args:
        layer: the decoder layer, for messages and the result.
        experts: global ids in the order of the rows.
        shape: H and I that every expert must have.
        read: global id -> weights.
        on_missing_input_scale: see :class:`dsv4.checkpoints.Checkpoint`.
        advance: called after each expert.

    Raises:
        CheckpointError: an expert of another shape, or a missing input scale under ``"error"``.
        ConfigError: an unknown policy.
    """
    if on_missing_input_scale not in get_args(MissingScalePolicy):
        raise ConfigError(
            f"on_missing_input_scale must be one of {get_args(MissingScalePolicy)}, found {on_missing_input_scale!r}"
        )
    count, hidden, inter = len(experts), shape.hidden_size, shape.intermediate_size
    l1_fp4 = torch.empty(count, 2 * inter, hidden // 2, dtype=torch.uint8, device=device)
    l1_sf = torch.empty(count, 2 * inter, hidden // BLOCK, dtype=torch.float8_e4m3fn, device=device)
    l2_fp4 = torch.empty(count, hidden, inter // 2, dtype=torch.uint8, device=device)
    l2_sf = torch.empty(count, hidden, inter // BLOCK, dtype=torch.float8_e4m3fn, device=device)
    l1_gs = torch.empty(count, 2, dtype=torch.float32, device=device)
    l2_gs = torch.empty(count, dtype=torch.float32, device=device)
    scales = _InputScales(layer, on_missing_input_scale)
    recoded: RecodeReport | None = None
    for row, expert in enumerate(experts):
        weights = read(expert)
        if weights.shape != shape:
            raise CheckpointError(f"layer {layer}, expert {expert}: found {weights.shape}; expected {shape}")
        for half, part in enumerate((weights.gate, weights.up)):
            rows = slice(half * inter, (half + 1) * inter)
            l1_fp4[row, rows].copy_(part.codes)
            l1_sf[row, rows].copy_(part.sf)
            l1_gs[row, half].copy_(part.gs)
        l2_fp4[row].copy_(weights.down.codes)
        l2_sf[row].copy_(weights.down.sf)
        l2_gs[row].copy_(weights.down.gs)
        scales.add(expert, weights)
        if weights.recoded is not None:
            recoded = weights.recoded + (recoded or RecodeReport())
        advance()
    l1_input, l2_input, notes = scales.result(device)
    if recoded is not None and recoded.requantized:
        notes += (
            f"{recoded.requantized} of {recoded.blocks} MXFP4 blocks do not fit NVFP4 beside the rest of their tensor; "
            f"their values were rounded",
        )
    static = l1_input is not None and l2_input is not None
    activation_format, activation_scale = ("nvfp4", "static") if static else _ADVICE[on_missing_input_scale]
    return LayerWeights(
        layer,
        tuple(experts),
        l1_fp4,
        l1_sf,
        l1_gs,
        l2_fp4,
        l2_sf,
        l2_gs,
        l1_input,
        l2_input,
        activation_format,
        activation_scale,
        notes,
        recoded,
    )


class _InputScales:
    """Collects the experts' activation scales and applies the policy.

    gate and up read the same activation, so a layer has one scale for both: the larger, which loses no range. Scales
    are all there or not used at all: a static scale for some experts and none for others is no mode of the layer.
    """

    def __init__(self, layer: int, policy: MissingScalePolicy) -> None:
        self._layer = layer
        self._policy = policy
        self._l1: list[float] = []
        self._l2: list[float] = []
        self._merged: list[int] = []
        self._missing = 0
        self._first_problem = ""

    def add(self, expert: int, weights: ExpertWeights) -> None:
        """Take note of one expert's scales. Raises CheckpointError for a missing one under ``"error"``."""
        if self._policy == "ignore":
            return
        found = [weights.input_scales.get(name) for name in PROJECTIONS]
        values = [scale.value if scale is not None else None for scale in found]
        gate, up, down = values
        if gate is None or up is None or down is None:
            problems = [scale.problem for scale in found if scale is not None and scale.problem]
            problem = problems[0] if problems else f"layer {self._layer}, expert {expert}: no input scale"
            if self._policy == "error":
                raise CheckpointError(
                    f"{problem}; expected a positive finite number. W4A4 with static scales needs it: to go without, "
                    f"pass on_missing_input_scale='dynamic' (scales per token) or 'weight-only' (W4A16)"
                )
            self._missing += 1
            self._first_problem = self._first_problem or problem
            return
        if gate != up:
            self._merged.append(expert)
        self._l1.append(max(gate, up))
        self._l2.append(down)

    def result(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, tuple[str, ...]]:
        """l1's and l2's scales, ``[E]`` or None, and what to report."""
        if self._policy == "ignore":
            return None, None, ()
        if self._missing:
            note = (
                f"{self._missing} of {self._missing + len(self._l1)} experts have no usable input scale "
                f"(first: {self._first_problem}); the layer is set to '{self._policy}'"
            )
            return None, None, (note,)
        notes: tuple[str, ...] = ()
        if self._merged:
            notes = (
                f"input scales of gate and up differ for {len(self._merged)} experts (first: expert "
                f"{self._merged[0]}); the larger is used for both",
            )
        l1 = torch.tensor(self._l1, dtype=torch.float32, device=device)
        l2 = torch.tensor(self._l2, dtype=torch.float32, device=device)
        return l1, l2, notes
