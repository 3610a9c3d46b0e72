"""``dsv4 compile`` with a compiler that only counts."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from dsv4.backends import blackwell, hopper, proof
from dsv4.cli import compile
from dsv4.cli.app import app
from dsv4.config import MoEConfig
from dsv4.errors import BackendError
from dsv4.kernels.blackwell import cache as blackwell_cache
from dsv4.kernels.blackwell.config import ARCHS
from dsv4.kernels.cutedsl import cache
from dsv4.kernels.hopper import cache as hopper_cache


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path) -> list[tuple[object, str]]:
    compiled: list[tuple[object, str]] = []

    def compiler(config: object, arch: str) -> tuple[bytes, str]:
        compiled.append((config, arch))
        return b"cubin", "entry"

    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
    for family in (blackwell_cache, hopper_cache):
        monkeypatch.setattr(family, "CACHE", replace(family.CACHE, compiler=compiler))
    return compiled


def invoke(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["compile", "--json", "--jobs", "1", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


@pytest.mark.parametrize("shape", ["v4-flash", "qwen3-30b"])
def test_all_that_a_hopper_layer_needs_is_compiled_once(compiled, shape):
    """Afterwards every kernel of a layer, in both formats, and of the self-check before it is on disk."""
    first = invoke("--shape", shape)
    assert first["kernels"] == first["compiled"] == len(compiled) == len(set(compiled))
    assert {arch for _, arch in compiled} == {"sm_90a"}
    sizes = {"v4-flash": (256, 4096, 2048, 10.0), "qwen3-30b": (128, 2048, 768, None)}[shape]
    layers = [
        MoEConfig(*sizes[:3], activation_format=form, swiglu_limit=sizes[3], activation_scale=scale)
        for form in ("bf16", "nvfp4")
        for scale in ("static", "token", "calibrated")
    ]
    for config in [*layers, *proof.configurations()]:
        assert all(hopper_cache.CACHE.lookup(kernel, "sm_90a") is not None for kernel in hopper.kernels(config))
    again = invoke("--shape", shape)
    assert (again["kernels"], again["compiled"], len(compiled)) == (first["kernels"], 0, first["compiled"])


def process_number(config: object, arch: str) -> tuple[bytes, str]:
    """A compiler that says where it ran."""
    return str(os.getpid()).encode(), "entry"


def ended(config: object, arch: str) -> tuple[bytes, str]:
    """A compiler for which memory does not suffice."""
    os._exit(1)


def test_a_compiler_that_is_ended(monkeypatch, tmp_path):
    """One line that says what to try, no traceback of the pool's."""
    pytest.importorskip("cutlass")
    monkeypatch.undo()
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    kernels = hopper.kernels(MoEConfig(256, 4096, 2048, activation_format="bf16"))[:2]
    with pytest.raises(BackendError, match="try --jobs 1"):
        compile.fill(replace(hopper_cache.CACHE, compiler=ended), kernels, "sm_90a", jobs=2)


def test_compilers_share_the_work(monkeypatch, tmp_path):
    """With several jobs other processes compile, and each kernel is on disk afterwards."""
    pytest.importorskip("cutlass")
    monkeypatch.undo()
    family = replace(hopper_cache.CACHE, compiler=process_number)
    kernels = hopper.kernels(MoEConfig(256, 4096, 2048, activation_format="bf16"))[:6]
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    compile.fill(family, kernels, "sm_90a", jobs=2)
    found = {family.lookup(kernel, "sm_90a") for kernel in kernels}
    assert None not in found
    assert str(os.getpid()).encode() not in {cubin for cubin, _ in found}


@pytest.mark.parametrize("arch", ARCHS)
def test_all_that_a_blackwell_layer_needs_is_compiled_once(compiled, arch):
    """For the architecture asked for: of both kinds of scales, and of the self-check before it."""
    first = invoke("--arch", arch)
    assert first["kernels"] == first["compiled"] == len(compiled) == len(set(compiled))
    assert {made_for for _, made_for in compiled} == {arch}
    layers = [MoEConfig(256, 4096, 2048, swiglu_limit=10.0, activation_scale=scale) for scale in ("static", "token")]
    for config in [*layers, *(c for c in proof.configurations() if blackwell.declines(c) is None)]:
        assert all(blackwell_cache.CACHE.lookup(kernel, arch) is not None for kernel in blackwell.kernels(config))
    again = invoke("--arch", arch)
    assert (again["kernels"], again["compiled"], len(compiled)) == (first["kernels"], 0, first["compiled"])


@pytest.mark.parametrize(("option", "value"), [("--arch", "sm_42"), ("--shape", "enormous")])
def test_unknown_names_are_refused(compiled, option, value):
    """With what is known; nothing is compiled."""
    result = CliRunner().invoke(app, ["compile", option, value])
    assert result.exit_code != 0
    assert f"{option} {value}" in result.stderr
    assert not compiled
