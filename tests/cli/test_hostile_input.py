"""The commands that read checkpoints, given hostile ones: one line on stderr, no traceback, nothing run or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints.fuzz import time_limit
from checkpoints.hostile import hostile
from checkpoints.hostile_folder import write
from typer.testing import CliRunner

from dsv4.checkpoints import open_checkpoint
from dsv4.cli.app import app
from dsv4.errors import CheckpointError

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-deepseek-v4" / "nvfp4"

# What follows the checkpoint's path; "{out}" is a folder for what is written.
ARGUMENTS = {
    "generate": ["--device", "cpu", "--max-new-tokens", "1"],
    "inspect": [],
    "verify": [],
    "convert": ["{out}"],
}
_REGISTERED = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
COMMANDS = [command for command in ARGUMENTS if command in _REGISTERED]


def run(command: str, path: Path, out: Path):
    arguments = [argument.replace("{out}", str(out)) for argument in ARGUMENTS[command]]
    with time_limit(60):
        return CliRunner().invoke(app, [command, str(path), *arguments])


def assert_orderly(result, statuses: tuple[int, ...]) -> list[str]:
    """An exit status of these, no traceback, nothing that a terminal would obey; returns the lines of errors."""
    assert result.exit_code in statuses, (result.exit_code, result.exception, result.stderr)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert all(line.isprintable() for line in result.output.split("\n"))
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def assert_one_line(result) -> None:
    assert len(assert_orderly(result, (1,))) == 1, result.stderr


def refused(path: Path) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            for _ in checkpoint.iter_layers(on_missing_input_scale="ignore"):
                pass
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize("command", COMMANDS)
def test_the_corpus_at_the_command_line(tmp_path, command):
    """What cannot be read ends in exit status 1 and one line (or, from inspect, findings); the rest does not fail.

    Nothing appears beside the target.
    """
    out = tmp_path / "out"
    examined = 0
    for seed in range(1000, 1030):
        path = tmp_path / "model"
        write(hostile(seed).folder, path, tmp_path / "outside")
        bad = refused(path)
        result = run(command, path, out)
        errors = assert_orderly(result, (1,) if bad else (0, 1))
        if bad:
            examined += 1
            assert len(errors) == 1 or (command == "inspect" and not errors and result.stdout), result.stderr
        assert set(os.listdir(tmp_path)) <= {"model", "out"}
        shutil.rmtree(path)
        shutil.rmtree(out, ignore_errors=True)
    assert examined > 15


def copied(tmp_path: Path, file: str, content) -> Path:
    """The small model with one file replaced; a dict updates the JSON that is there."""
    path = tmp_path / "model"
    shutil.copytree(MODEL, path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((path / file).read_text()) | content).encode()
    (path / file).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "no_such_model"}),
        ("config.json", {"model_type": ["deepseek_v4"]}),
        ("config.json", {"num_hidden_layers": 10**9}),
        ("config.json", {"num_hidden_layers": "4"}),
        ("config.json", {"vocab_size": "many"}),
        ("config.json", {"vocab_size": 17}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"rope_parameters": 7}),
        ("config.json", {"layer_types": ["nothing"]}),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["x", "y"]]}}),
        ("tokenizer_config.json", b"[]"),
        ("generation_config.json", b"{"),
        ("generation_config.json", b"\xff"),
        ("generation_config.json", {"temperature": "x"}),
        ("generation_config.json", {"temperature": -1}),
        ("generation_config.json", {"top_p": 10**400}),
        ("generation_config.json", {"repetition_penalty": [1.0]}),
        ("generation_config.json", {"eos_token_id": {}}),
        ("generation_config.json", {"bos_token_id": "x"}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_files_that_transformers_reads(tmp_path, file, content):
    """A configuration or a tokenizer over which Transformers stumbles is an error of the checkpoint, in one line."""
    assert_one_line(run("generate", copied(tmp_path, file, content), tmp_path / "out"))


@pytest.mark.parametrize("settings", [{"temperature": 1, "top_p": 1}, {"temperature": 0}, {"repetition_penalty": 2}])
def test_whole_numbers_in_a_generation_configuration(tmp_path, settings):
    """Which many a release has: Transformers takes nothing but floats, and no temperature of 0."""
    assert not assert_orderly(run("generate", copied(tmp_path, "generation_config.json", settings), tmp_path), (0,))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}),
        ("tokenizer_config.json", {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}),
    ],
)
def test_code_of_a_checkpoint_is_never_run(tmp_path, monkeypatch, file, content):
    """Python files that a configuration names are not imported, and nobody is asked whether they should be."""
    path = copied(tmp_path, file, content)
    (path / "evil.py").write_text("import os\nos.environ['DSV4_TEST_EVIL'] = 'ran'\nclass C: ...\n")
    monkeypatch.setenv("DSV4_TEST_EVIL", "")
    with time_limit(60):
        result = CliRunner().invoke(app, ["generate", str(path), *ARGUMENTS["generate"]], input="y\n" * 5)
    assert_orderly(result, (0, 1))
    assert os.environ["DSV4_TEST_EVIL"] == ""
    assert "[y/N]" not in result.output


def test_a_whole_process(tmp_path):
    """Not only in a test's process: exit status 1, an empty stdout, one line on stderr, from a file with two names."""
    path = copied(tmp_path, "config.json", b'{"model_type": "deepseek_v4", "model_type": "x\\u001b[2J"}')
    result = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", "generate", str(path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path / 'config.json'}: ")
    assert result.stderr.count("\n") == 1


def test_links_beside_a_checkpoint_that_is_converted(tmp_path):
    """A link out of the folder, one in a circle, a pipe: none is followed or copied, and none stops the conversion."""
    path = copied(tmp_path, "config.json", {})
    (tmp_path / "secret").write_text("secret")
    os.symlink("../secret", path / "secret.txt")
    os.symlink("circle.txt", path / "circle.txt")
    os.mkfifo(path / "pipe.txt")
    assert not assert_orderly(run("convert", path, tmp_path / "out"), (0,))
    assert not list((tmp_path / "out").glob("*.txt"))
