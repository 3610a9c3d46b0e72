"""``dsv4 generate`` with the model that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from typer.testing import CliRunner

from dsv4.cli._generation import Sampling, clean_prompt, generate_text, load_model, load_tokenizer
from dsv4.cli.app import app
from dsv4.cli.generate import Format, Scale
from dsv4.config import ActivationFormat, ActivationScale
from dsv4.errors import CheckpointError, ConfigError

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-deepseek-v4" / "nvfp4"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def run(*arguments: str):
    return CliRunner().invoke(
        app, ["generate", str(MODEL), "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6", *arguments]
    )


def test_streamed_text_is_the_documents():
    """What is streamed to stdout is the prompt and the text that --json reports for the same seed; speed is told."""
    arguments = ["--prompt", "import os\n", "--temperature", "0.9", "--seed", "3"]
    document = json.loads(run(*arguments, "--json").stdout)
    streamed = run(*arguments)
    assert streamed.stdout == f"{document['prompt']}{document['text']}\n"
    assert "tokens, the first after" in streamed.stderr
    assert document["tokens"] == 6
    assert document["tokens_per_s"] > 0


@pytest.mark.parametrize("mode", [["--activation-format", "bf16"], ["--activation-scale", "token"]])
def test_modes(mode):
    """Other modes than the checkpoint's are an option away, and what was used is in the document."""
    document = json.loads(run(*mode, "--temperature", "0", "--json").stdout)
    assert document[mode[0].lstrip("-").replace("-", "_")] == mode[1]


def test_greedy_is_the_models_own(model, tokenizer):
    """At temperature 0 every token is the most likely one of a full forward pass, and the seed has no effect."""
    result = generate_text(model, tokenizer, "class Parser", 6, Sampling(temperature=0, repetition_penalty=1.0))
    ids = tokenizer("class Parser", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert result.prompt + result.text == tokenizer.decode(ids[0])
    again = generate_text(model, tokenizer, "class Parser", 6, Sampling(0, None, 1.0, seed=7))
    assert again.text == result.text


def test_seeds(model, tokenizer):
    """A seed fixes the text, and another one changes it."""
    texts = [generate_text(model, tokenizer, "def", 12, Sampling(temperature=1.0, seed=s)).text for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_trailing_blanks():
    """Blanks at the end of a prompt, after which models go on badly, are dropped with a word about it."""
    assert clean_prompt("def \t ") == "def"
    assert clean_prompt("import os\n") == "import os\n"
    assert "trailing blanks" in run("--prompt", "class ").stderr
    assert "trailing blanks" not in run("--prompt", "class").stderr


def test_refusals(model, tokenizer, tmp_path):
    """An empty prompt, a text beyond the model's positions and a folder without a tokenizer are named."""
    with pytest.raises(ConfigError, match="empty"):
        generate_text(model, tokenizer, "  ", 4, Sampling())
    with pytest.raises(ConfigError, match="1024 positions"):
        generate_text(model, tokenizer, "def", 1024, Sampling())
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_names_agree():
    """The names that options accept are those of the library; "calibrated" needs data, which a command line has not."""
    assert tuple(item.value for item in Format) == get_args(ActivationFormat)
    assert {item.value for item in Scale} == set(get_args(ActivationScale)) - {"calibrated"}
