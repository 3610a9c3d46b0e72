"""Compiled kernels on disk, with a compiler that only counts; and what a process with a warm cache imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsv4.backends import proof
from dsv4.backends.blackwell import declines, kernels
from dsv4.cli.app import app
from dsv4.config import MoEConfig
from dsv4.errors import BackendError
from dsv4.kernels.blackwell import cache as blackwell_cache
from dsv4.kernels.blackwell import launch
from dsv4.kernels.blackwell.config import ARCHS, deepest
from dsv4.kernels.cutedsl import cache
from dsv4.kernels.cutedsl.cache import KernelCache

ONE, OTHER = deepest(128, 64, 64), deepest(256, 128, 256)


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[tuple[object, str]]:
    calls: list[tuple[object, str]] = []
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
    return calls


@pytest.fixture
def store(compiled) -> KernelCache:
    def compiler(config: object, arch: str) -> tuple[bytes, str]:
        compiled.append((config, arch))
        return b"cubin of " + arch.encode(), "entry"

    return KernelCache("family", blackwell_cache.CACHE.sources, compiler)


def test_a_kernel_is_compiled_once_for_each_architecture(store, compiled):
    """The second load reads the first one's file; configurations and architectures have their own."""
    for config, arch in ((ONE, "sm_100a"), (ONE, "sm_103a"), (OTHER, "sm_100a")) * 2:
        assert store.load(config, arch) == (b"cubin of " + arch.encode(), "entry")
    assert compiled == [(ONE, "sm_100a"), (ONE, "sm_103a"), (OTHER, "sm_100a")]


def test_a_damaged_or_foreign_file_is_built_again(store, compiled):
    """A flipped bit, a cut file, an empty one, and another kernel's file under this name are not used."""
    store.load(OTHER, "sm_100a")
    (foreign,) = store.folder().iterdir()
    other = foreign.read_bytes()
    for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:40], lambda b: b"", lambda b: other):
        store.load(ONE, "sm_100a")
        (path,) = set(store.folder().iterdir()) - {foreign}
        path.write_bytes(damage(path.read_bytes()))
        before = len(compiled)
        assert store.load(ONE, "sm_100a") == (b"cubin of sm_100a", "entry")
        assert len(compiled) == before + 1


def test_changed_sources_are_other_kernels(store, compiled, tmp_path):
    """Whatever file a kernel is made from is part of its name."""
    source = tmp_path / "source.py"
    source.write_text("1")
    changing = KernelCache("family", (*store.sources, source), store.compiler)
    changing.load(ONE, "sm_100a")
    source.write_text("2")
    assert changing.lookup(ONE, "sm_100a") is None


def test_every_source_of_the_kernel_is_named():
    """The cache's list has each module of this project that the kernel's file reads, at whatever depth."""
    folder = Path(cache.__file__).parents[1]
    seen, waiting = set(), [folder / "blackwell" / "grouped_gemm.py"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in folder.glob("*/*.py"):
            name = f"dsv4.kernels.{module.parent.name}"
            text = path.read_text()
            imports = [line for line in text.splitlines() if line.startswith(("from ", "import ")) and name in line]
            if any(module.stem in line for line in imports):
                waiting.append(module)
    assert seen == {path.resolve() for path in blackwell_cache.CACHE.sources}


def test_without_the_dsl_any_version_serves(store, monkeypatch):
    """A cache filled elsewhere is enough; without one the error says what to do."""
    store.load(ONE, "sm_100a")
    monkeypatch.setattr(cache, "dsl_version", lambda: None)
    assert store.load(ONE, "sm_100a") == (b"cubin of sm_100a", "entry")
    with pytest.raises(BackendError, match="DSV4_CACHE_DIR"):
        store.load(OTHER, "sm_100a")


def test_a_directory_that_cannot_be_written_is_no_error(store, monkeypatch):
    """It costs a compilation each time."""
    monkeypatch.setenv("DSV4_CACHE_DIR", "/proc/nowhere")
    assert store.load(ONE, "sm_100a") == (b"cubin of sm_100a", "entry")


def test_the_family_s_cubin_serves_where_it_is_the_only_one(monkeypatch, store):
    """sm_100f is loaded on a B200 and a B300 alike, behind the chip's own."""
    monkeypatch.setattr(launch, "CACHE", store)
    assert launch.stored(ONE, (10, 0)) is None
    store.load(ONE, "sm_100f")
    assert launch.stored(ONE, (10, 0)) == launch.stored(ONE, (10, 3)) == "sm_100f"
    store.load(ONE, "sm_103a")
    assert (launch.stored(ONE, (10, 0)), launch.stored(ONE, (10, 3))) == ("sm_100f", "sm_103a")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_command_compiles_all_that_a_layer_needs_once(arch, store, compiled, monkeypatch):
    """Of both kinds of scales, and of the self-check before it."""
    monkeypatch.setattr(blackwell_cache, "CACHE", store)

    def invoke() -> dict[str, object]:
        result = CliRunner().invoke(app, ["compile", "--json", "--arch", arch], catch_exceptions=False)
        return json.loads(result.stdout)

    first = invoke()
    assert first["kernels"] == first["compiled"] == len(compiled) == len(set(compiled))
    layers = [MoEConfig(256, 4096, 2048, swiglu_limit=10.0, activation_scale=scale) for scale in ("static", "token")]
    for config in [*layers, *(c for c in proof.configurations() if declines(c) is None)]:
        assert all(store.lookup(kernel, arch) is not None for kernel in kernels(config))
    assert (invoke()["compiled"], len(compiled)) == (0, first["compiled"])


def test_a_warm_process_imports_no_compiler():
    """What a layer imports before its first launch, and the launch itself, are without the DSL."""
    script = (
        "import sys, dsv4.backends.blackwell, dsv4.kernels.blackwell.launch, dsv4.kernels.blackwell.ops\n"
        "sys.exit(any(m.split('.')[0] == 'cutlass' for m in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cache.__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
