"""Layers of a checkpoint through a backend, stage by stage beside the float64 oracle of :mod:`dsv4.cli._oracle`.

===============  ====================================================================================================
``gate``, ``up`` GEMM 1 and what follows it, with the other of the two held constant (:mod:`dsv4.cli._probes`)
``activation``   GEMM 2's operand: clamp, SwiGLU, rounding to bf16 and, in W4A4, quantization
``down``         GEMM 2 with its real weights, of an intermediate that hardly needs GEMM 1
``output``       the whole layer: routing, real top-k, combine, rounding to bf16
===============  ====================================================================================================

The first three are seen through GEMM 2: where they fail and ``down`` passes, GEMM 1 is at fault; where all fail, GEMM 2
or a scale is.

The error of a stage is the largest relative L2 of any expert's rows (for ``output``, of all rows). Where there is a
clamp, a quarter of the tokens is loud enough that it acts; these are judged apart, so that they cannot hide the others.
An intermediate within 1e-5 of a midpoint may round either way: the nearer result counts.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsv4 import backends
from dsv4.backends.proof import QUANTIZED_TOLERANCE
from dsv4.checkpoints.base import LayerWeights
from dsv4.checkpoints.checkpoint import Checkpoint
from dsv4.checkpoints.naming import PROJECTIONS
from dsv4.checkpoints.stacking import stack_experts
from dsv4.cli._layer import random_topk_ids
from dsv4.cli._machine import cpu_model, versions
from dsv4.cli._modes import MODES, Mode
from dsv4.cli._oracle import ActivationMode, down_rows, gate_up, operands
from dsv4.cli._probes import probing_tokens, with_constant, with_pattern, with_selection
from dsv4.config import MoEConfig
from dsv4.errors import ConfigError
from dsv4.moe import Nvfp4MoE

BAR = 3e-3
"""Relative L2 that a stage may be from the oracle (docs/numerics.md)."""

STAGES = ("gate", "up", "activation", "down", "output")

_SAME_VALUE = 2.0**-8
"""Relative difference of two operand values that are the same code and scale: backends may hand rows on in bf16."""

_DEFAULT_TOP_K = 2  # where the configuration does not say


@dataclass(frozen=True)
class Plan:
    """What to verify.

    Attributes:
        layers: decoder layers.
        modes: keys of :data:`dsv4.cli._modes.MODES` (not ``"w4a4-tensor"``, whose scale depends on the batch).
        tokens: T of each call.
        experts: how many of a layer's experts, evenly spread; None for all.
        device: where the backend runs; the oracle runs on the CPU.
        backend: ``"auto"`` or a backend's name.
        seed: of the tokens and the routing.
    """

    layers: Sequence[int]
    modes: Sequence[str]
    tokens: int
    experts: int | None
    device: torch.device
    backend: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage of one layer in one mode.

    Attributes:
        error: relative L2, None where the backend's result is not finite.
        passed: ``error`` is within the bar.
        expert: the expert with the largest error, None for ``output``.
        agreement: share of the quantized operand's values whose code and scale are the oracle's; W4A4 alone.
        near_ties: share of those that are not, within 1e-5 of a midpoint.
        problem: the exception, if the backend raised one.
    """

    error: float | None
    passed: bool
    expert: int | None = None
    agreement: float | None = None
    near_ties: float | None = None
    problem: str = ""


def verify_checkpoint(checkpoint: Checkpoint, plan: Plan, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Every layer of ``plan`` in every mode, as one JSON document with all that a stranger needs to judge it.

    Args:
        checkpoint: an open checkpoint.
        plan: what to verify.
        advance: called after each layer.

    Raises:
        CheckpointError, BackendError: as :func:`verify_layer`.
        ConfigError: there is nothing to verify.
    """
    results = []
    for layer in plan.layers:
        results += verify_layer(checkpoint, layer, plan)
        advance()
    verdicts = [entry["passed"] for entry in results if "passed" in entry]
    if not verdicts:
        raise ConfigError(
            f"nothing was verified: {results[0]['skipped'] if results else 'no layer was chosen'}; choose w4a16 or "
            f"w4a4-token"
        )
    device, shape = plan.device, checkpoint.shape
    config = MoEConfig(
        min(plan.experts or checkpoint.num_experts, checkpoint.num_experts),
        shape.hidden_size,
        shape.intermediate_size,
        top_k=checkpoint.top_k or _DEFAULT_TOP_K,
    )
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format.name,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_experts": checkpoint.num_experts,
        "top_k": checkpoint.top_k,
        "swiglu_limit": checkpoint.swiglu_limit,
        "tokens": plan.tokens,
        "seed": plan.seed,
        "bar": BAR,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "versions": versions(),
        "backends": {name: verdict.reason for name, verdict in backends.explain_all(config, device).items()},
        "results": results,
        "passed": all(verdicts),
    }


def verify_layer(checkpoint: Checkpoint, layer: int, plan: Plan) -> list[dict[str, Any]]:
    """One entry a mode: which backend ran, its stages, and whether all passed; or why the mode was skipped.

    Raises:
        CheckpointError: an expert cannot be read.
        BackendError: no backend can run the layer.
    """
    count = checkpoint.num_experts
    wanted = min(plan.experts or count, count)
    ids = [number * count // wanted for number in range(wanted)]
    experts = {expert: checkpoint.read_expert(layer, expert) for expert in ids}
    usable = all(
        (scale := weights.input_scales.get(name)) is not None and scale.value is not None
        for weights in experts.values()
        for name in PROJECTIONS
    )
    weights = stack_experts(
        layer,
        ids,
        checkpoint.shape,
        experts.__getitem__,
        device=torch.device("cpu"),
        on_missing_input_scale="error" if usable else "ignore",
    )
    results = []
    declined = _declined_modes(checkpoint, wanted, plan)
    for name in plan.modes:
        entry: dict[str, Any] = {"layer": layer, "mode": name, "experts": ids}
        if weights.recoded is not None:
            entry["recoded"] = asdict(weights.recoded)
        if MODES[name].activation_format == "nvfp4" and MODES[name].activation_scale == "static" and not usable:
            results.append(entry | {"skipped": "not every expert has a usable input scale"})
            continue
        if name in declined:
            results.append(entry | {"skipped": declined[name]})
            continue
        results.append(entry | _Verification(checkpoint, weights, MODES[name], plan).run())
    return results


def _declined_modes(checkpoint: Checkpoint, num_experts: int, plan: Plan) -> dict[str, str]:
    """What the backend asked for by name does not do, and why; nothing if it does none of it: then that is an error."""
    backend = next((b for b in backends.BACKENDS if b.name == plan.backend), None)
    if backend is None:
        return {}
    shape, reasons = checkpoint.shape, {}
    for name in plan.modes:
        mode = MODES[name]
        config = MoEConfig(
            num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            activation_format=mode.activation_format,
            activation_scale=mode.activation_scale,
        )
        verdict = backend.explain(config, plan.device)
        if not verdict.usable:
            reasons[name] = f"{plan.backend}: {verdict.reason}"
    return reasons if len(reasons) < len(plan.modes) else {}


class _Verification:
    """One layer in one mode."""

    def __init__(self, checkpoint: Checkpoint, weights: LayerWeights, mode: Mode, plan: Plan) -> None:
        self._weights = weights
        self._mode = mode
        self._plan = plan
        self._limit = checkpoint.swiglu_limit
        self._top_k = min(checkpoint.top_k or _DEFAULT_TOP_K, weights.num_experts)
        self._activation = _activation_mode(weights, mode)
        generator = torch.Generator().manual_seed(plan.seed + weights.layer)
        self._hidden = probing_tokens(plan.tokens, checkpoint.shape.hidden_size, generator)
        self._loud = torch.zeros(plan.tokens, dtype=torch.bool)
        if self._limit is not None:
            self._loud[3::4] = True
            self._make_loud()
        # Each expert in turn, so that few tokens reach all of them; then shuffled.
        order = torch.randperm(plan.tokens, generator=generator)
        self._slot_experts = (torch.arange(plan.tokens) % weights.num_experts)[order]
        self._topk_ids = random_topk_ids(plan.tokens, weights.num_experts, self._top_k, "uniform", generator)
        self._topk_weights = torch.rand(plan.tokens, self._top_k, generator=generator) + 0.1

    def run(self) -> dict[str, Any]:
        weights = self._weights
        single = self._layer(top_k=1)
        self._library = any(b.name == single.backend_name and _has_library_numerics(b) for b in backends.BACKENDS)
        stages = {
            "gate": self._operand_stage(single, with_constant(weights, 1)),
            "up": self._operand_stage(single, with_constant(weights, 0)),
            "activation": self._operand_stage(single, weights),
            "down": self._down_stage(single),
        }
        layer = self._layer(self._top_k)
        stages["output"] = self._output_stage(layer)
        library = {"numerics": "library", "bar": self._bar} if self._library else {}
        return library | {
            "backend": layer.backend_name,
            "stages": {name: asdict(stages[name]) for name in STAGES},
            "passed": all(stage.passed for stage in stages.values()),
        }

    @property
    def _bar(self) -> float:
        """A library that rounds gate and up to bf16 is held to what its self-check holds it to."""
        return QUANTIZED_TOLERANCE if self._library else BAR

    def _judged(self, error: float) -> Stage:
        finite = math.isfinite(error)
        return Stage(error if finite else None, finite and error <= self._bar)

    # Stages.

    def _operand_stage(self, layer: Nvfp4MoE, weights: LayerWeights) -> Stage:
        """The operand of GEMM 2 under ``weights``' gate and up."""
        want = operands(weights, self._hidden, self._slot_experts, self._activation, self._limit)
        width, inter = weights.shape.hidden_size, weights.shape.intermediate_size
        parts = []
        for first in range(0, inter, width):
            out = self._slot_rows(layer, with_selection(weights, first))
            if isinstance(out, str):
                return Stage(None, False, problem=out)
            parts.append(out[:, : inter - first])
        got = torch.cat(parts, dim=1)
        nearest = want.gather(0, (want - got).abs().argmin(dim=0, keepdim=True))[0]
        same, near = _same(got, want[0]), _same(got, nearest)
        stage = self._slot_stage(got, nearest)
        if self._activation.quantized:
            stage = replace(stage, agreement=_share(same), near_ties=_share(near & ~same))
        return stage

    def _down_stage(self, layer: Nvfp4MoE) -> Stage:
        weights = with_pattern(self._weights, self._limit)
        out = self._slot_rows(layer, weights)
        if isinstance(out, str):
            return Stage(None, False, problem=out)
        operand = operands(weights, self._hidden, self._slot_experts, self._activation, self._limit)
        return self._slot_stage(out, _nearest_rows(down_rows(weights, operand, self._slot_experts), out))

    def _output_stage(self, layer: Nvfp4MoE) -> Stage:
        out = self._call(layer, self._weights, self._topk_weights, self._topk_ids, torch.bfloat16)
        if isinstance(out, str):
            return Stage(None, False, problem=out)
        hidden = self._hidden.repeat_interleave(self._top_k, dim=0)
        experts = self._topk_ids.flatten()
        operand = operands(self._weights, hidden, experts, self._activation, self._limit)
        rows = down_rows(self._weights, operand, experts).unflatten(1, (-1, self._top_k))
        candidates = (rows * self._topk_weights.double().unsqueeze(2)).sum(dim=2)
        want = _nearest_rows(candidates, out)
        errors = [_relative_l2(out[part], want[part]) for part in (self._loud, ~self._loud) if part.any()]
        return self._judged(max(errors, key=_order))

    def _slot_stage(self, got: Tensor, want: Tensor) -> Stage:
        """The worst of all experts, loud tokens apart from the others."""
        worst, where = 0.0, int(self._slot_experts[0])
        for expert in self._slot_experts.unique().tolist():
            for part in (self._loud, ~self._loud):
                rows = (self._slot_experts == expert) & part
                error = _relative_l2(got[rows], want[rows])
                if _order(error) > _order(worst):
                    worst, where = error, expert
        return replace(self._judged(worst), expert=self._weights.experts[where])

    # Running the backend.

    def _layer(self, top_k: int) -> Nvfp4MoE:
        shape = self._weights.shape
        return Nvfp4MoE(
            self._weights.num_experts,
            shape.hidden_size,
            shape.intermediate_size,
            self._plan.tokens,
            top_k,
            self._plan.device,
            backend=self._plan.backend,
            activation_format=self._mode.activation_format,
            activation_scale=self._mode.activation_scale,
            swiglu_limit=self._limit,
        )

    def _slot_rows(self, layer: Nvfp4MoE, weights: LayerWeights) -> Tensor | str:
        """Every token through one expert with weight 1, without rounding: float64 ``[S, H]``."""
        ones = torch.ones(self._plan.tokens, 1)
        return self._call(layer, weights, ones, self._slot_experts.unsqueeze(1), torch.float32)

    def _call(
        self, layer: Nvfp4MoE, weights: LayerWeights, topk_weights: Tensor, topk_ids: Tensor, dtype: torch.dtype
    ) -> Tensor | str:
        """The layer's output as float64 on the CPU, or the exception that it raised."""
        device = self._plan.device
        out = torch.full(self._hidden.shape, torch.nan, dtype=dtype, device=device)
        try:
            layer.prepare_weights_from_stacked(**_moved(weights, device, self._activation.static_l1 is not None))
            layer.run(self._hidden.to(device), topk_weights.to(device), topk_ids.to(device), out=out)
            return out.cpu().double()
        except Exception as error:  # whatever a compiler, a driver or a kernel throws belongs into the report
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def _make_loud(self) -> None:
        """Scale the loud tokens so that gate and up are about as large as the limit."""
        assert self._limit is not None
        rows = self._hidden[self._loud]
        if not len(rows):
            return
        gate, up = gate_up(self._weights, 0, rows.double())
        size = torch.cat((gate, up)).square().mean().sqrt().item()
        if size > 0 and math.isfinite(size):
            self._hidden[self._loud] = (rows.double() * (1.5 * self._limit / size)).bfloat16()
            self._hidden[:, :16] = 1  # the constant that probes read


def _activation_mode(weights: LayerWeights, mode: Mode) -> ActivationMode:
    if mode.activation_format == "bf16":
        return ActivationMode(quantized=False)
    if mode.activation_scale == "token" or weights.l1_input_scale is None:
        return ActivationMode(quantized=True)
    return ActivationMode(True, float(weights.l1_input_scale.max()), weights.l2_input_scale)


def _moved(weights: LayerWeights, device: torch.device, static: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(weights.prepare_arguments())
    if not static:
        arguments |= {"l1_input_scale": None, "l2_input_scale": None}
    return {name: value if value is None else value.to(device) for name, value in arguments.items()}


def _same(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs() <= _SAME_VALUE * want.abs()


def _nearest_rows(candidates: Tensor, got: Tensor) -> Tensor:
    """Of ``candidates [N, S, H]``, for each row the first, unless another is nearer to ``got [S, H]`` by a factor of 2.

    Only a moved code or scale is worth that much: lesser differences stay errors.
    """
    distance = (candidates - got).norm(dim=2)
    chosen = torch.where(distance.amin(dim=0) < 0.5 * distance[0], distance.argmin(dim=0), 0)
    return candidates[chosen, torch.arange(len(got))]


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _relative_l2(got: Tensor, want: Tensor) -> float:
    error, size = float((got - want).norm()), float(want.norm())
    if error == 0:
        return 0.0
    return error / size if size else math.inf


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _has_library_numerics(backend: type[backends.Backend]) -> bool:
    """Whether its rounding points are a library's own (:mod:`dsv4.backends.library`)."""
    return getattr(backend, "library_numerics", False)
