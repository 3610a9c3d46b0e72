"""MoEConfig: the shapes, modes and limits of one layer, and the one statement of which combinations are allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dsv4.errors import ConfigError
from dsv4.nvfp4 import BLOCK

ActivationFormat = Literal["nvfp4", "bf16"]
ActivationScale = Literal["static", "token", "tensor", "calibrated"]
RouteWeight = Literal["output", "before_down", "input"]
L1ScalePolicy = Literal["max", "per_expert"]

_CHOICES = {
    "activation_format": get_args(ActivationFormat),
    "activation_scale": get_args(ActivationScale),
    "route_weight": get_args(RouteWeight),
    "l1_scale_policy": get_args(L1ScalePolicy),
}


@dataclass(frozen=True)
class MoEConfig:
    """What one layer computes. Immutable: a changed setting is a new config.

    Attributes:
        num_experts: experts held by this rank (local), E.
        hidden_size: H, a multiple of 16.
        intermediate_size: I, of one expert, a multiple of 16.
        max_num_tokens: the most tokens of one call; every buffer is sized from it.
        top_k: routed experts a token, k.
        experts_start_idx: global id of local expert 0, when ids are mapped by a contiguous range.
        activation_format: ``"nvfp4"`` is W4A4 (activations are quantized), ``"bf16"`` W4A16.
        activation_scale: where W4A4 takes the activations' global scales from.
        swiglu_limit: L of the clamped SwiGLU, None for off.
        route_weight: where the routing weight is applied.
        batch_invariant: a token's result may not depend on the rest of its batch.
        l1_scale_policy: static scales of GEMM 1 that differ by expert are merged by ``"max"`` (a token is quantized
            once) or kept, ``"per_expert"`` (a token is quantized once for each of its slots).
        fused_swiglu: let a backend apply SwiGLU in GEMM 1's epilogue. No effect on the numbers.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    max_num_tokens: int = 8192
    top_k: int = 8
    experts_start_idx: int = 0
    activation_format: ActivationFormat = "nvfp4"
    activation_scale: ActivationScale = "static"
    swiglu_limit: float | None = None
    route_weight: RouteWeight = "output"
    batch_invariant: bool = False
    l1_scale_policy: L1ScalePolicy = "max"
    fused_swiglu: bool = True

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size", "max_num_tokens", "top_k"):
            self._require_int(name, minimum=1)
        self._require_int("experts_start_idx", minimum=0)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % BLOCK:
                raise ConfigError(
                    f"{name} must be a multiple of {BLOCK} (one NVFP4 block scale), found {getattr(self, name)}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        if self.swiglu_limit is not None and not (self.swiglu_limit > 0 and math.isfinite(self.swiglu_limit)):
            raise ConfigError(
                f"swiglu_limit must be a positive finite number, or None for no limit, found {self.swiglu_limit}"
            )
        if self.route_weight == "input" and self.top_k != 1:
            raise ConfigError(
                f'route_weight="input" scales the hidden state itself, which needs top_k = 1, found {self.top_k}'
            )
        if self.batch_invariant and self.quantizes_activations and self.activation_scale == "tensor":
            raise ConfigError(
                'batch_invariant=True excludes activation_scale="tensor": its scale depends on every token of the '
                'batch. Use "token", "static" or "calibrated"'
            )

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{name} must be an integer of at least {minimum}, found {value!r}")

    @property
    def quantizes_activations(self) -> bool:
        """True for W4A4."""
        return self.activation_format == "nvfp4"

    @property
    def max_slots(self) -> int:
        """Slots (token, choice) of the largest call, S = T * k."""
        return self.max_num_tokens * self.top_k


def capacity(num_slots: int, num_experts: int, row_tile: int) -> int:
    """Rows that any routing of ``num_slots`` slots over ``num_experts`` experts needs, each expert padded to a tile.

    An expert with ``c > 0`` rows takes at most ``c + row_tile - 1`` of them, and at most ``min(E, S)`` experts have
    rows, so ``S + min(E, S) * (P - 1)`` rows suffice; whole tiles only, so round down to P. The bound is reached when
    that many experts hold ``1 mod P`` rows each. Sizing by the mean load instead overflows under any real routing.

    Args:
        num_slots: S, at least 0.
        num_experts: E, at least 1.
        row_tile: P, at least 1.
    """
    return (num_slots + min(num_experts, num_slots) * (row_tile - 1)) // row_tile * row_tile
