"""The layer shapes that commands know by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4.config import MoEConfig


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one expert.
        top_k: k, experts a token.
        swiglu_limit: the clamp before SwiGLU, None for none.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    swiglu_limit: float | None = None

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def bf16_bytes(self) -> int:
        """Bytes of all experts' weights in bf16."""
        return 2 * self.num_experts * self.expert_parameters

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one call: two for each weight that each of a token's k experts applies."""
        return 2 * tokens * self.top_k * self.expert_parameters

    def config(self, **settings: Any) -> MoEConfig:
        """A layer of this shape; ``settings`` are further arguments of ``MoEConfig``, or replace the shape's."""
        sizes = {
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "top_k": self.top_k,
            "swiglu_limit": self.swiglu_limit,
        }
        return MoEConfig(**(sizes | settings))

    def __str__(self) -> str:
        return f"{self.num_experts} experts, {self.hidden_size} x {self.intermediate_size}, top-{self.top_k}"


SHAPES = {
    "small": LayerShape(64, 1024, 512, 6, 10.0),
    "v4-flash": LayerShape(256, 4096, 2048, 6, 10.0),
    "v4-pro": LayerShape(384, 7168, 3072, 6, 10.0),
    "qwen3-30b": LayerShape(128, 2048, 768, 8),
}
