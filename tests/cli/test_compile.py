"""``dsv4 compile`` with a compiler that only counts."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dsv4.backends import proof
from dsv4.backends.hopper import kernels
from dsv4.cli.app import app
from dsv4.config import MoEConfig
from dsv4.kernels.hopper import cache


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path) -> list[object]:
    compiled: list[object] = []
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
    monkeypatch.setattr(cache, "_compile", lambda c: (compiled.append(c), (b"cubin", "entry"))[1])
    return compiled


def invoke(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["compile", "--json", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.mark.parametrize("shape", ["v4-flash", "qwen3-30b"])
def test_all_that_a_layer_needs_is_compiled_once(compiled, shape):
    """Afterwards every kernel of a layer, in both formats, and of the self-check before it is on disk."""
    first = invoke("--shape", shape)
    assert first["kernels"] == first["compiled"] == len(compiled) == len(set(compiled))
    sizes = {"v4-flash": (256, 4096, 2048, 10.0), "qwen3-30b": (128, 2048, 768, None)}[shape]
    layers = [
        MoEConfig(*sizes[:3], activation_format=form, swiglu_limit=sizes[3], activation_scale=scale)
        for form in ("bf16", "nvfp4")
        for scale in ("static", "token", "calibrated")
    ]
    for config in [*layers, *proof.configurations()]:
        assert all(cache.lookup(kernel) is not None for kernel in kernels(config))
    again = invoke("--shape", shape)
    assert (again["kernels"], again["compiled"]) == (first["kernels"], 0)


@pytest.mark.parametrize(("option", "value"), [("--arch", "sm_42"), ("--shape", "enormous")])
def test_unknown_names_are_refused(compiled, option, value):
    """With what is known; nothing is compiled."""
    result = CliRunner().invoke(app, ["compile", option, value])
    assert result.exit_code != 0
    assert f"{option} {value}" in result.stderr
    assert not compiled
