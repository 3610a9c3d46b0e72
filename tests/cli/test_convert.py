"""``dsv4 convert`` with the model that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsv4.checkpoints import open_checkpoint
from dsv4.cli._generation import load_model
from dsv4.cli.app import app
from dsv4.cli.convert import _progress

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "tiny-deepseek-v4"
TEXT = ROOT / "models" / "heldout.txt"


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="dsv4")


def test_the_report(tmp_path):
    """The table says what was converted and passed through; --json says it as one document; a second run has nothing
    to do."""
    result = run(MODEL / "nvfp4", tmp_path / "a", "--check")
    assert result.exit_code == 0, result.stderr
    for text in ("modelopt-nvfp4", "64 in 4 layers, 886 kB to 886 kB", "static", "103 tensors", "equal to the source"):
        assert text in result.stdout
    document = json.loads(run(MODEL / "nvfp4", tmp_path / "b", "--json").stdout)
    assert (document["experts"], document["layers"], document["passed_tensors"]) == (64, 4, 103)
    assert document["written_bytes"] == (tmp_path / "b" / "model.safetensors").stat().st_size
    assert set(document["files"]) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    again = run(MODEL / "nvfp4", tmp_path / "a")
    assert "converted already, nothing to do" in again.stdout


def test_the_converted_model_computes_what_its_source_does(tmp_path):
    """bf16, converted, and loaded through Transformers: the logits are those of the source, quantized at load."""
    result = run(MODEL / "bf16", tmp_path / "target", "--activations", "weight-only")
    assert result.exit_code == 0, result.stderr
    assert "weight-only" in result.stdout
    assert result.stderr.startswith("note: no input scales")
    ids = torch.randint(0, 2048, (2, 48), generator=torch.Generator().manual_seed(0))
    source = load_model(MODEL / "bf16", "bf16", "token", dtype="float32")
    # Nothing is said about activations here: the target's configuration does.
    converted = load_model(tmp_path / "target", dtype="float32")
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, source(ids).logits)


def test_calibration_gives_static_scales(tmp_path):
    """--calibrate: every expert has usable input scales, near those of the released NVFP4 model (another text)."""
    result = run(MODEL / "bf16", tmp_path / "t", "--calibrate", TEXT, "--calibration-tokens", "2048", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    with open_checkpoint(tmp_path / "t") as found, open_checkpoint(MODEL / "nvfp4") as released:
        for layer in found.moe_layers:
            ours, theirs = found.load_layer(layer), released.load_layer(layer)
            assert ours.activation_scale == "static"
            for a, b in ((ours.l1_input_scale, theirs.l1_input_scale), (ours.l2_input_scale, theirs.l2_input_scale)):
                # 2048 tokens see less than 32,768 did: maxima are lower, within an order of magnitude
                ratio = (a.max() / b.max()).item()
                assert 0.1 < ratio < 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no/such/folder", "{target}"], 1, "no such file or folder"),
        ([str(MODEL / "bf16"), "{target}"], 1, "--calibrate TEXT"),
        ([str(MODEL / "bf16"), "{target}", "--calibrate", "no/such/text"], 1, "expected a text file"),
        ([str(MODEL / "nvfp4"), str(MODEL)], 1, "must not lie in each other"),
        ([str(MODEL / "nvfp4"), str(ROOT / "docs")], 1, "expected a new or empty folder"),
        ([str(MODEL / "nvfp4"), "/proc/nowhere"], 1, "cannot be written"),
        ([str(MODEL / "nvfp4"), "{target}", "--four-over-six"], 1, "four_over_six"),
        ([str(MODEL / "nvfp4"), "{target}", "--jobs", "0"], 2, "--jobs"),
        ([str(MODEL / "nvfp4"), "{target}", "--activations", "token"], 2, "--activations"),
    ],
    ids=lambda value: str(value)[-24:],
)
def test_errors_are_one_line(arguments, code, says, tmp_path):
    """What is wrong is one line on stderr, with the exit code of its kind, and nothing is left in the target."""
    target = tmp_path / "target"
    result = run(*(argument.format(target=target) for argument in arguments))
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not target.exists()


def test_the_bar_shows_rate_and_time_left(capsys):
    """On a terminal: bytes done and in all, a rate, the time left."""
    with _progress(True) as update:
        assert update is not None
        update("convert", 2_000_000, 10_000_000)
        update("convert", 10_000_000, 10_000_000)
    shown = capsys.readouterr().err
    assert "convert" in shown
    assert "8.0/8.0 MB" in shown
    assert "0:00:00" in shown
