"""Observing input scales on a text, for ``dsv4 convert --calibrate``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dsv4.checkpoints.conversion import Calibration, LayerScales
from dsv4.errors import InputError

_BATCH = 8


def calibration(text: Path, tokens: int, device: str | None, *, four_over_six: bool = False) -> Calibration:
    """Input scales from what reaches the experts while a model, with its experts in NVFP4, reads ``text``.

    The checkpoint needs a tokenizer, and a model that Transformers has.

    Args:
        text: a UTF-8 file.
        tokens: of it, at most.
        device: where to compute; None takes a GPU where there is one.
        four_over_six: how floating-point experts are quantized.

    Raises:
        InputError: ``text`` is not a UTF-8 file.
    """
    try:
        raw = text.read_bytes()
        content = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{text}: expected a text file in UTF-8 ({error})") from error

    def run(folder: Path) -> Mapping[int, LayerScales]:
        from dsv4.cli._output import quiet_transformers

        quiet_transformers()
        from dsv4.cli._evaluate import WINDOW, read_windows
        from dsv4.cli._generation import load_tokenizer
        from dsv4.cli._machine import torch_device
        from dsv4.integrations.transformers import calibrate, from_pretrained

        windows = read_windows(load_tokenizer(folder), content, WINDOW, max(1, tokens // WINDOW))
        if not len(windows):
            raise InputError(f"{text}: too short to calibrate on: expected at least {WINDOW} tokens")
        target = torch_device(device)
        model = from_pretrained(
            folder,
            activation_scale="calibrated",
            four_over_six=four_over_six,
            device=target,
            max_num_tokens=_BATCH * WINDOW,
            local_files_only=True,
        ).eval()
        observed = calibrate(model, (batch.to(target) for batch in windows.split(_BATCH)))
        return {
            layer: (tuple(scales.l1.tolist()), tuple(scales.l2.tolist())) for layer, scales in sorted(observed.items())
        }

    return Calibration(f"{hashlib.sha256(raw).hexdigest()}, {tokens} tokens", run)
