"""The small model in each form, converted, has the perplexity of its source's own decode."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4.checkpoints.conversion import convert

from .test_formats_perplexity import FORMS, ROOT, SAME_LOSS, SOURCE, compare, dsv4_hf, read_windows, transformers, write


@pytest.mark.parametrize(
    "form", [form if form in ("mxfp4", "plain_fused") else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_perplexity_after_conversion(tmp_path, form):
    """Written and decoded by the format's library, converted, loaded: the loss is the same, and so is the format."""
    reference = write(tmp_path / "source", form)
    convert(tmp_path / "source", tmp_path / "target", activations="weight-only", check=True)
    assert dsv4_hf.open_checkpoint(tmp_path / "target").format.name == "modelopt-nvfp4"
    converted = dsv4_hf.from_pretrained(tmp_path / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SOURCE)
    windows = read_windows(tokenizer, (ROOT / "heldout.txt").read_text(), 64, 2)
    scores = compare({"source": reference, "converted": converted}, windows)
    source, ours = (math.log(scores[name].perplexity) for name in ("source", "converted"))
    assert abs(ours - source) < SAME_LOSS, (source, ours)
    assert scores["converted"].kl < SAME_LOSS
    assert source < 4.5
