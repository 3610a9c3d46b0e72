"""Observing input scales on a text, for ``dsv4 convert --calibrate``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dsv4.checkpoints.conversion import Calibration, LayerScales
from dsv4.errors import InputError

_BATCH = 8


def calibration(source: str, text: Path, tokens: int, device: str | None) -> Calibration:
    """Input scales from what reaches the experts while the model, with its experts in NVFP4, reads ``text``.

    Args:
        source: a checkpoint with a tokenizer, of a model that Transformers has.
        text: a UTF-8 file.
        tokens: of it, at most.
        device: where to compute; None takes a GPU where there is one.

    Raises:
        InputError: ``text`` is not a UTF-8 file.
    """
    try:
        raw = text.read_bytes()
        content = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{text}: expected a text file in UTF-8 ({error})") from error

    def run() -> Mapping[int, LayerScales]:
        from dsv4.cli._output import quiet_transformers

        quiet_transformers()
        from dsv4.cli._evaluate import WINDOW, read_windows
        from dsv4.cli._generation import load_model, load_tokenizer
        from dsv4.cli._machine import torch_device
        from dsv4.integrations.transformers import calibrate

        folder = Path(source)
        windows = read_windows(load_tokenizer(folder), content, WINDOW, max(1, tokens // WINDOW))
        if not len(windows):
            raise InputError(f"{text}: too short to calibrate on: expected at least {WINDOW} tokens")
        target = torch_device(device)
        model = load_model(folder, activation_scale="calibrated", device=target)
        observed = calibrate(model, (batch.to(target) for batch in windows.split(_BATCH)))
        return {
            layer: (tuple(scales.l1.tolist()), tuple(scales.l2.tolist())) for layer, scales in sorted(observed.items())
        }

    return Calibration(f"{hashlib.sha256(raw).hexdigest()}, {tokens} tokens", run)
