"""What a peer is: other people's code for the same layer, timed beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from harness import Contender
from torch import Tensor

from dsv4.cli._layer import Call, Weights
from dsv4.cli._machine import free_memory
from dsv4.cli._output import human_bytes
from dsv4.cli._shapes import LayerShape
from dsv4.nvfp4 import Nvfp4Tensor


class Unavailable(Exception):
    """This peer cannot run here; the text says why."""


@dataclass(frozen=True)
class Setup:
    """What every contender is given.

    Attributes:
        shape: of the layer.
        weights: the same for all.
        tokens: all numbers of tokens that will be asked for.
        device: where.
        folder: of unpacked third-party code, or None.
    """

    shape: LayerShape
    weights: Weights
    tokens: tuple[int, ...]
    device: torch.device
    folder: Path | None = None

    @cached_property
    def bf16_weights(self) -> tuple[Tensor, Tensor]:
        """bf16 ``[E, 2I, H]`` and ``[E, H, I]``, decoded one expert at a time and shared by the peers that want them.

        Raises:
            Unavailable: they do not fit.
        """
        needed, free = self.shape.bf16_bytes, free_memory(self.device)
        if free is not None and needed * 1.1 > free:
            raise Unavailable(f"bf16 weights take {human_bytes(needed)}, {human_bytes(free)} are free")
        return self._decoded(self.weights.l1), self._decoded(self.weights.l2)

    def _decoded(self, weights: Nvfp4Tensor) -> Tensor:
        out = torch.empty(weights.shape, dtype=torch.bfloat16, device=self.device)
        for expert in range(len(out)):
            one = Nvfp4Tensor(weights.codes[expert], weights.sf[expert], weights.gs[expert])
            out[expert] = one.dequantize(torch.bfloat16)
        return out


class Peer(Protocol):
    """A peer that can run here. Making one raises :class:`Unavailable` where it cannot."""

    facts: dict[str, Any]
    """What a reader of its times must know: versions, which of its kernels, what is left out."""

    def __init__(self, setup: Setup) -> None: ...

    def contenders(self, calls: Sequence[Call]) -> list[Contender]:
        """Ways to run ``calls``, which all have the same number of tokens. They stay valid until the next call."""
