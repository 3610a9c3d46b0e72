"""What a backend is: the protocol that the layer speaks, and the data that crosses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv4.config import MoEConfig
from dsv4.weights import MoEWeights

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a layer's result can be."""


@dataclass(frozen=True)
class Verdict:
    """A backend's own word on one configuration and device.

    Attributes:
        usable: whether it can run it.
        reason: why not, or what it will do.
    """

    usable: bool
    reason: str


@dataclass(frozen=True)
class Packed:
    """A layer's weights in a backend's own layout.

    Attributes:
        experts: uint8 ``[E, bytes]``: all that one expert needs stands in its row, so that one expert can be replaced,
            copied or sent without touching another.
        l1_gs: fp32 ``[E, 2]``, global scales of gate and up.
        l2_gs: fp32 ``[E]``.
    """

    experts: Tensor
    l1_gs: Tensor
    l2_gs: Tensor

    @classmethod
    def empty(cls, num_experts: int, expert_bytes: int, device: torch.device) -> Packed:
        """Room for ``num_experts`` of ``expert_bytes`` each; contents undefined."""
        return cls(
            experts=torch.empty(num_experts, expert_bytes, dtype=torch.uint8, device=device),
            l1_gs=torch.empty(num_experts, 2, dtype=torch.float32, device=device),
            l2_gs=torch.empty(num_experts, dtype=torch.float32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, scales included."""
        return sum(t.numel() * t.element_size() for t in (self.experts, self.l1_gs, self.l2_gs))


@dataclass(frozen=True)
class InputScales:
    """Global scales for activations that were fixed ahead: ``static`` and ``calibrated``.

    Attributes:
        l1: fp32 ``[E]``, for GEMM 1's operand.
        l1_merged: fp32 ``[1]``, their maximum: the scale under which a token is quantized once for all its experts.
        l2: fp32 ``[E]``, for GEMM 2's operand.
    """

    l1: Tensor
    l1_merged: Tensor
    l2: Tensor

    @classmethod
    def updated(cls, current: InputScales | None, l1: Tensor, l2: Tensor) -> InputScales:
        """New values, written over ``current`` if there is one, so that captured graphs see them."""
        scales = current or cls(torch.empty_like(l1), l1.new_empty(1), torch.empty_like(l2))
        scales.l1.copy_(l1)
        scales.l1_merged.copy_(l1.amax().reshape(1))
        scales.l2.copy_(l2)
        return scales


@dataclass(frozen=True)
class Call:
    """The input of one run, ``T >= 1``, checked.

    Attributes:
        hidden_states: bf16 ``[T, H]``.
        topk_weights: fp32 ``[T, k]``.
        topk_ids: int32 or int64 ``[T, k]``, global.
        expert_map: int32 ``[global]`` -> local id or -1, or None for the configuration's contiguous range.
        num_valid_tokens: integer ``[1]`` on the device, or None: tokens from there on are padding.
        input_scales: for static and calibrated activation scales, else None.
    """

    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None = None
    num_valid_tokens: Tensor | None = None
    input_scales: InputScales | None = None


def packing_parts(fp4: Tensor, sf: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A projection of all experts as a pack kernel takes it: ``(which experts, codes, scale bytes)``, on the device.

    All at once where nothing has to be copied for that; else one expert at a time, which is the peak of memory then.
    """
    ready = fp4.device == device and fp4.is_contiguous() and sf.is_contiguous()
    step = len(fp4) if ready else 1
    for first in range(0, len(fp4), step):
        part = slice(first, first + step)
        yield part, fp4[part].to(device).contiguous(), sf[part].to(device).contiguous().view(torch.uint8)


class Backend(Protocol):
    """One way to run the layer. Instances belong to one layer; they hold its configuration and nothing that changes.

    ``run`` keeps the rounding points of the numbers' contract: gate and up fp32 out of GEMM 1; clamp, SiLU, product and
    a ``before_down`` weight in fp32, rounded once to bf16; slot rows fp32 or bf16; an fp32 combine, rounded once.
    """

    name: str

    def __init__(self, config: MoEConfig, device: torch.device) -> None: ...

    @classmethod
    def explain(cls, config: MoEConfig, device: torch.device) -> Verdict:
        """Whether this backend can run that configuration there, or why not."""

    def pack(self, weights: MoEWeights, into: Packed | None = None) -> Packed:
        """Weights to this backend's layout; ``into`` takes them in place, keeping captured graphs valid."""

    def unpack(self, packed: Packed) -> MoEWeights:
        """The inverse of :meth:`pack`."""

    @classmethod
    def workspace_bytes(cls, config: MoEConfig, device: torch.device) -> int:
        """Scratch for ``max_num_tokens``, from the capacity bound."""

    def budgets(self) -> Sequence[int]:
        """Numbers of tokens that, warmed up, leave nothing to compile for any other, up to ``max_num_tokens``."""

    def warmup(self, packed: Packed, scratch: Tensor, calls: Sequence[Call]) -> None:
        """Do everything that may compile or allocate, for calls like these and results of every dtype."""

    def run(self, packed: Packed, call: Call, scratch: Tensor, out: Tensor) -> None:
        """Write the combined expert output to ``out [T, H]``, using ``scratch`` (uint8 of :meth:`workspace_bytes`)."""

    def activation_amax(self, packed: Packed, call: Call, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """Largest magnitudes that reach each expert's two GEMMs when activations are not quantized.

        Returns:
            fp32 ``[E]`` for GEMM 1 and for GEMM 2; 0 for an expert without rows. Non-finite rows are left out.
        """
