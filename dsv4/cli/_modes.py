"""The number formats that are measured beside each other, under one name, label and colour each, everywhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4.config import ActivationFormat, ActivationScale


@dataclass(frozen=True)
class Mode:
    """How weights and activations are represented.

    Attributes:
        label: what a table or a picture calls it.
        color: of its bars and lines (from the palette of Okabe and Ito, which colour-blind readers can tell apart).
        activation_format: argument of ``Nvfp4MoE``.
        activation_scale: argument of ``Nvfp4MoE``; of no effect in W4A16.
    """

    label: str
    color: str
    activation_format: ActivationFormat
    activation_scale: ActivationScale


MODES = {
    "w4a16": Mode("W4A16", "#0072B2", "bf16", "static"),
    "w4a4-static": Mode("W4A4 static", "#E69F00", "nvfp4", "static"),
    "w4a4-token": Mode("W4A4 token", "#009E73", "nvfp4", "token"),
    "w4a4-tensor": Mode("W4A4 tensor", "#CC79A7", "nvfp4", "tensor"),
}


def mode_names(text: str, allowed: Collection[str]) -> list[str]:
    """The value of ``--mode``: names separated by commas, each once.

    Raises:
        typer.BadParameter: one of them is not allowed.
    """
    import typer

    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise typer.BadParameter(f"--mode: expected any of {', '.join(allowed)}, found {unknown[0]!r}")
    return names


BASELINE = "bf16"
BASELINE_COLOR = "#666666"
