"""Compiled kernels on disk: damaged, foreign, read-only, many processes; what a process with a warm cache loads."""

from __future__ import annotations

import ast
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dsv4.backends.hopper import TILINGS
from dsv4.errors import BackendError
from dsv4.kernels.hopper import cache
from dsv4.kernels.hopper.config import HopperConfig

ROOT = Path(__file__).parents[2]
LINE = TILINGS[0]
ONE, OTHER = (HopperConfig(LINE.unit, LINE.widths, *LINE.gemm1, gated=gated) for gated in (True, False))
INSTALLED = cache.dsl_version()
BUILT = (b"cubin" * 40_000, "entry")  # more than one write of the system's


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[HopperConfig]:
    """A compiler that only counts."""
    compiled: list[HopperConfig] = []
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
    monkeypatch.setattr(cache, "_compile", lambda c: (compiled.append(c), BUILT)[1])
    return compiled


def entries() -> list[Path]:
    return sorted(cache.folder().iterdir())


def test_a_kernel_is_compiled_once(compiled: list[HopperConfig]) -> None:
    """The second load reads the first one's file; another configuration has its own."""
    assert cache.load(ONE) == cache.load(ONE) == BUILT
    cache.load(OTHER)
    assert compiled == [ONE, OTHER]


DAMAGE = {
    "a flipped bit": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    "a flipped bit of the digest": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "cut": lambda b: b[:40],
    "cut in the digest": lambda b: b[:7],
    "longer": lambda b: b + b"\0",
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_built_again(compiled: list[HopperConfig], damage: str) -> None:
    """It is not used, and the next process finds a good one."""
    cache.load(ONE)
    (path,) = entries()
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    assert cache.lookup(ONE) is None
    assert cache.load(ONE) == BUILT
    assert compiled == [ONE, ONE]
    assert path.read_bytes() == good


def test_another_kernels_file_is_not_used(compiled: list[HopperConfig]) -> None:
    """A file under a name that is not its own would launch the wrong kernel."""
    cache.load(ONE)
    (path,) = entries()
    cache.load(OTHER)
    shutil.copy(next(p for p in entries() if p != path), path)
    assert cache.load(ONE) == BUILT
    assert compiled == [ONE, OTHER, ONE]


def test_foreign_things_in_the_folder_are_left_alone(compiled: list[HopperConfig]) -> None:
    """Other files, and a directory or a dangling link where the kernel's file would be, neither serve nor fail."""
    cache.load(ONE)
    (path,) = entries()
    path.unlink()
    path.mkdir()
    (cache.folder() / "notes.kernel").write_text("not a kernel")
    link = cache.folder() / f"{cache.key(ONE)}-0.9.kernel"
    link.symlink_to(cache.folder() / "nowhere")
    before = entries()
    assert cache.load(ONE) == BUILT
    assert compiled == [ONE, ONE]
    assert entries() == before


def sources(file: Path) -> set[Path]:
    """A module of ``kernels/`` and all that it imports from there."""
    found, package = {file}, file.parents[1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv4.kernels."):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = package.joinpath(*str(name).split(".")[2:]).with_suffix(".py")
                if path.exists():
                    found |= sources(path)
    return found


def test_the_key_names_all_that_a_kernel_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Configuration, architecture, DSL version, and every source file that its modules are made of."""
    cache.load(ONE)
    assert cache.key(ONE) != cache.key(OTHER)
    for name, value in (("ARCH", "sm_91a"), ("dsl_version", lambda: "2.0")):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            assert cache.lookup(ONE) is None
    copy = tmp_path / "kernels"
    shutil.copytree(Path(cache.__file__).parents[1], copy)
    monkeypatch.setattr(cache, "__file__", str(copy / "hopper" / "cache.py"))
    assert cache.lookup(ONE) == BUILT
    files = sources(copy / "hopper" / "grouped_gemm.py")
    assert len(files) >= 5
    for file in files:
        text = file.read_text()
        file.write_text(text + "\n")
        assert cache.lookup(ONE) is None, file
        file.write_text(text)
        assert cache.lookup(ONE) == BUILT


def test_without_the_dsl_any_version_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache filled elsewhere is enough; without one the error says what to do."""
    cache.load(ONE)
    monkeypatch.setattr(cache, "dsl_version", lambda: None)
    assert cache.load(ONE) == BUILT
    with pytest.raises(BackendError, match="DSV4_CACHE_DIR"):
        cache.load(OTHER)


def test_a_read_only_directory(compiled: list[HopperConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is served; what is not is compiled each time, which is no error."""
    cache.load(ONE)

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    assert cache.load(ONE) == cache.load(OTHER) == cache.load(OTHER) == BUILT
    assert compiled == [ONE, OTHER, OTHER]
    monkeypatch.setenv("DSV4_CACHE_DIR", "/proc/nowhere")
    assert cache.load(ONE) == BUILT


def test_a_full_disk_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is there for this process, and no part of a file for the next."""

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.load(ONE) == BUILT
    assert entries() == []


def _load_many(barrier, results, rounds: int) -> None:
    """A process: loads one kernel again and again, at the same moments as the others."""
    for _ in range(rounds):
        barrier.wait()
        looked_up = cache.lookup(ONE)
        results.put((looked_up in (None, BUILT), cache.load(ONE) == BUILT))
        barrier.wait()
        for path in cache.folder().glob("*.kernel"):
            path.unlink(missing_ok=True)


def test_processes_at_the_same_time() -> None:
    """Processes that compile, write, read and delete one kernel at the same moments always get all of it."""
    count, rounds = 4, 25
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_load_many, args=(barrier, results, rounds)) for _ in range(count)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in range(count * rounds)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert set(seen) == {(True, True)}
    cache.load(ONE)
    assert len(entries()) == 1  # and no unfinished files


WARM_PROCESS = """
import json, sys
import torch
spawned = []
sys.addaudithook(lambda event, args: spawned.append(str(args[:2])) if event in ("subprocess.Popen", "os.posix_spawn",
                                                                             "os.exec", "os.system") else None)
import dsv4
from kernels.fake_driver import FakeDriver, installed
from kernels.test_hopper_launch import GATED, PLAIN, operands
from dsv4.kernels.hopper import launch
driver = FakeDriver(launch.GEMM_SIGNATURE)
with installed(driver):
    for config in (GATED, PLAIN):
        launch.grouped_gemm(config, **operands(config))
loaded = [m for m in ("cutlass", "tvm_ffi", "dsv4.kernels.hopper.grouped_gemm") if m in sys.modules]
print(json.dumps({"launches": len(driver.launches), "loaded": loaded, "spawned": spawned}))
"""


def test_a_warm_process_loads_no_compiler() -> None:
    """With its kernels on disk a new process launches without the DSL, TVM FFI or another program."""
    pytest.importorskip("triton")
    from kernels.test_hopper_launch import GATED, PLAIN

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "dsl_version", lambda: INSTALLED or "1.0")
        for config in (GATED, PLAIN):
            cache.load(config)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", WARM_PROCESS], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"launches": 2, "loaded": [], "spawned": []}
