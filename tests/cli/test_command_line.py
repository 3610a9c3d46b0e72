"""The command line as a whole: exit codes, one-line errors, one JSON document, a light start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import dsv4
from dsv4.cli import app as command_line
from dsv4.cli import bench, compile, convert, doctor, generate, inspect, verify
from dsv4.cli.app import app
from dsv4.errors import ConfigError

USAGE_ERRORS = [
    ["nonsense"],
    ["bench", "--nonsense"],
    ["bench", "--tokens", "1,zero"],
    ["bench", "--tokens", "0"],
    ["bench", "--mode", "w8a8"],
    ["bench", "--routing", "random"],
    ["bench", "--experts", "4", "--top-k", "5"],
    ["bench", "--threads", "0"],
    ["generate"],
    ["generate", "folder", "--activation-scale", "row"],
    ["generate", "folder", "--top-p", "0"],
    ["generate", "folder", "--dtype", "int8"],
]
ERRORS = [
    ["generate", "no/such/folder"],
    ["bench", "--device", "toaster"],
    ["bench", "--device", "cuda:99"],
    ["bench", "--hidden", "40"],
    ["bench", "--backend", "nonsense"],
    ["bench", "--plot", "picture.docx"],
    ["bench", "--output", "."],
]


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), prog_name="dsv4")


@pytest.mark.parametrize(("arguments", "code"), [(a, 2) for a in USAGE_ERRORS] + [(a, 1) for a in ERRORS], ids=str)
def test_errors_are_one_line(arguments, code):
    """Wrong usage exits with 2, an error with 1; stderr has one line that begins with "error: ", stdout nothing."""
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(("arguments", "code"), [(USAGE_ERRORS[1], 2), (ERRORS[0], 1)], ids=str)
def test_errors_as_json(arguments, code):
    """With --json, stdout holds the same message as one JSON document."""
    result = run(*arguments, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"error": result.stderr.removeprefix("error: ").rstrip("\n")}


def test_long_messages_stay_on_one_line(monkeypatch):
    """Line breaks in a message do not make two lines of it."""

    def fail() -> None:
        raise ConfigError("first\n  second")

    monkeypatch.setattr(doctor, "examine", fail)
    assert run("doctor").stderr == "error: first second\n"


def test_defects_keep_their_traceback(monkeypatch):
    """What was not raised on purpose is not dressed up as a user's error."""
    monkeypatch.setattr(doctor, "examine", lambda: 1 // 0)
    assert isinstance(run("doctor").exception, ZeroDivisionError)


def test_interrupting():
    """Ctrl-C exits with 130, as shells expect, and without a traceback."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "examine", interrupt)
        result = run("doctor")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [[], ["--help"], ["bench", "--help"], ["generate", "-h"]], ids=str)
def test_help(arguments):
    """Help exits with 0 and names the commands or options."""
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version():
    """The version, alone."""
    assert run("--version").stdout == f"{dsv4.__version__}\n"


def test_as_a_process():
    """``python -m dsv4.cli`` is the command; its stdout is one JSON document."""
    command = [sys.executable, "-m", "dsv4.cli", "doctor", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["versions"]["dsv4"] == dsv4.__version__


def test_starting_is_light():
    """The command line itself imports nothing heavy: that is for the command that needs it."""
    script = "import sys, dsv4.cli.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(answer.stdout.split()) & {"transformers", "matplotlib", "triton", "safetensors.torch"}


def test_every_command_has_json():
    """All commands take --json."""
    assert {info.callback for info in app.registered_commands} == {
        bench.bench,
        compile.compile_kernels,
        convert.convert,
        doctor.doctor,
        generate.generate,
        inspect.inspect,
        verify.verify,
    }
    for info in command_line.app.registered_commands:
        assert "json" in info.callback.__annotations__
