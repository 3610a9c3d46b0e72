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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4.errors import BackendError
from dsv4.kernels.blackwell import cache as blackwell_cache
from dsv4.kernels.blackwell import launch
from dsv4.kernels.blackwell.config import deepest
from dsv4.kernels.cutedsl import cache
from dsv4.kernels.cutedsl.cache import KernelCache
from dsv4.kernels.hopper import cache as hopper_cache

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "dsv4" / "kernels"
LAYOUTS = ROOT / "dsv4" / "ops" / "layouts.py"
"""Of its modules' imports kernels use none."""
ONE, OTHER = deepest(128, 64, 64), deepest(256, 128, 256)
ARCH, OTHER_ARCH = "sm_100a", "sm_103a"
INSTALLED = cache.dsl_version()
FAMILIES = {"blackwell": blackwell_cache, "hopper": hopper_cache}


def built(config: object, arch: str) -> tuple[bytes, str]:
    """What the compiler makes of it, more than one write of the system's: no two kernels are the same."""
    return f"{arch} {config!r}".encode() * 2_000, f"entry_{arch}"


BUILT = built(ONE, ARCH)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, str]]:
    """What was compiled, in an empty folder; no version of the DSL is the installed one."""
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "dsl_version", lambda: "1.0")
    return []


@pytest.fixture
def store(compiled: list[tuple[object, str]], tmp_path: Path) -> KernelCache:
    """Kernels made from three files, by a compiler that only counts."""
    sources = [tmp_path / f"source_{i}.py" for i in range(3)]
    for i, source in enumerate(sources):
        source.write_text(f"{i}\n")

    def compiler(config: object, arch: str) -> tuple[bytes, str]:
        compiled.append((config, arch))
        return built(config, arch)

    return KernelCache("family", sources, compiler)


def entries(store: KernelCache) -> list[Path]:
    return sorted(store.folder().iterdir())


def test_a_kernel_is_compiled_once_for_each_architecture(store, compiled):
    """The second load reads the first one's file; configurations and architectures have their own."""
    kernels = [(ONE, ARCH), (ONE, OTHER_ARCH), (OTHER, ARCH)]
    for config, arch in kernels * 2:
        assert store.load(config, arch) == built(config, arch)
    assert compiled == kernels
    assert len(entries(store)) == 3


DAMAGE = {
    "a flipped bit": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
    "a flipped bit of the digest": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "cut": lambda b: b[:40],
    "cut in the digest": lambda b: b[:7],
    "longer": lambda b: b + b"\0",
    "empty": lambda b: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_built_again(store, compiled, damage):
    """It is not used, and the next process finds a good one."""
    store.load(ONE, ARCH)
    (path,) = entries(store)
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    assert store.lookup(ONE, ARCH) is None
    assert store.load(ONE, ARCH) == BUILT
    assert compiled == [(ONE, ARCH)] * 2
    assert path.read_bytes() == good


@pytest.mark.parametrize("other", [(OTHER, ARCH), (ONE, OTHER_ARCH)], ids=["configuration", "architecture"])
def test_another_kernels_file_is_not_used(store, compiled, other):
    """A file under a name that is not its own would launch the wrong kernel."""
    store.load(ONE, ARCH)
    (path,) = entries(store)
    store.load(*other)
    shutil.copy(next(p for p in entries(store) if p != path), path)
    assert store.load(ONE, ARCH) == BUILT
    assert compiled == [(ONE, ARCH), other, (ONE, ARCH)]


def test_foreign_things_in_the_folder_are_left_alone(store, compiled):
    """Other files, and a directory or a dangling link where the kernel's file would be, neither serve nor fail."""
    store.load(ONE, ARCH)
    (path,) = entries(store)
    path.unlink()
    path.mkdir()
    (store.folder() / "notes.kernel").write_text("not a kernel")
    link = store.folder() / f"{store.key(ONE, ARCH)}-0.9.kernel"
    link.symlink_to(store.folder() / "nowhere")
    before = entries(store)
    assert store.load(ONE, ARCH) == BUILT
    assert compiled == [(ONE, ARCH)] * 2
    assert entries(store) == before


def test_the_key_names_all_that_a_kernel_depends_on(store, monkeypatch):
    """Configuration, architecture, DSL version, and the contents of every source file when the process began."""
    store.load(ONE, ARCH)
    assert len({store.key(*kernel) for kernel in ((ONE, ARCH), (OTHER, ARCH), (ONE, OTHER_ARCH))}) == 3
    with monkeypatch.context() as patch:
        patch.setattr(cache, "dsl_version", lambda: "2.0")
        assert store.lookup(ONE, ARCH) is None
    for source in store.sources:
        text = source.read_text()
        source.write_text(text + "\n")
        assert store.lookup(ONE, ARCH) == BUILT  # this process has imported what the file was
        cache._contents.cache_clear()
        assert store.lookup(ONE, ARCH) is None, source
        source.write_text(text)
        cache._contents.cache_clear()
        assert store.lookup(ONE, ARCH) == BUILT


@pytest.mark.parametrize(
    ("installed", "used"), [("4.8.1", True), ("4.10.0", True), ("5.0.0.dev0", True), ("4.8.0", False), ("4.5.2", False)]
)
def test_an_old_dsl_is_as_good_as_none(installed, used, monkeypatch):
    """Kernels are not compiled by one that they were not written for; those of a cache are used."""
    monkeypatch.undo()
    monkeypatch.setattr(cache, "version", lambda name: installed)
    assert cache.dsl_version() == (installed if used else None)


def test_which_kernels_are_missing(store, monkeypatch, tmp_path):
    """Those without a file of the installed version, or of any where none is; all, where there is no folder."""
    kernels = [ONE, OTHER]
    assert store.missing(kernels, ARCH) == kernels
    store.load(ONE, ARCH)
    assert store.missing(kernels, ARCH) == [OTHER]
    assert store.missing(kernels, OTHER_ARCH) == kernels
    for installed, missing in (("1.0.1", kernels), (".0", kernels), (None, [OTHER])):
        monkeypatch.setattr(cache, "dsl_version", lambda version=installed: version)
        assert store.missing(kernels, ARCH) == missing


def test_without_the_dsl_any_version_serves(store, monkeypatch):
    """A cache filled elsewhere is enough; without one the error says what to do."""
    store.load(ONE, ARCH)
    monkeypatch.setattr(cache, "dsl_version", lambda: None)
    assert store.load(ONE, ARCH) == BUILT
    with pytest.raises(BackendError, match=f"no {OTHER_ARCH} kernel .* DSV4_CACHE_DIR"):
        store.load(ONE, OTHER_ARCH)


def test_a_read_only_directory(store, compiled, monkeypatch):
    """What is in it is served; what is not is compiled each time, which is no error."""
    store.load(ONE, ARCH)

    def refused(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    assert store.load(ONE, ARCH) == BUILT
    assert store.load(OTHER, ARCH) == store.load(OTHER, ARCH) == built(OTHER, ARCH)
    assert compiled == [(ONE, ARCH), (OTHER, ARCH), (OTHER, ARCH)]
    monkeypatch.setenv("DSV4_CACHE_DIR", "/proc/nowhere")
    assert store.load(ONE, ARCH) == BUILT


def test_a_full_disk_leaves_nothing_behind(store, monkeypatch):
    """The kernel is there for this process, and no part of a file for the next."""

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert store.load(ONE, ARCH) == BUILT
    assert entries(store) == []


def _load_many(store: KernelCache, barrier, results, rounds: int) -> None:
    """A process: loads one kernel again and again, at the same moments as the others."""
    for _ in range(rounds):
        barrier.wait()
        looked_up = store.lookup(ONE, ARCH)
        results.put((looked_up in (None, BUILT), store.load(ONE, ARCH) == BUILT))
        barrier.wait()
        for path in store.folder().glob("*.kernel"):
            path.unlink(missing_ok=True)


def test_processes_at_the_same_time(store):
    """Processes that compile, write, read and delete one kernel at the same moments always get all of it."""
    count, rounds = 4, 25
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_load_many, args=(store, barrier, results, rounds)) for _ in range(count)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in range(count * rounds)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert set(seen) == {(True, True)}
    store.load(ONE, ARCH)
    assert len(entries(store)) == 1  # and no unfinished files


def sources(file: Path) -> set[Path]:
    """A module of ``kernels/`` and all that it imports from there, at whatever depth, and the layouts' arithmetic."""
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "modules are named in full"
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            imported = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names}
            found |= imported & {LAYOUTS}
            waiting += [p for p in imported - found if p.is_relative_to(KERNELS) and p.exists()]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_of_a_family_is_named(family):
    """Its cache's list has each module that its kernel is made of, once, and no other."""
    expected = sources(KERNELS / family / "grouped_gemm.py")
    assert len(expected) >= 5
    assert sorted(path.resolve() for path in FAMILIES[family].CACHE.sources) == sorted(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_compiles_with_its_own_compiler(family, monkeypatch, tmp_path):
    """For the architecture asked for, into the folder of its name."""
    compiler = SimpleNamespace(compile_kernel=built)
    monkeypatch.setitem(sys.modules, f"dsv4.kernels.{family}.grouped_gemm", compiler)
    assert FAMILIES[family].CACHE.load(ONE, OTHER_ARCH) == built(ONE, OTHER_ARCH)
    assert [path.parent for path in (tmp_path / "cache").glob("*/*.kernel")] == [tmp_path / "cache" / family]


def test_the_family_s_cubin_serves_where_it_is_the_only_one(monkeypatch, store):
    """sm_100f is loaded on a B200 and a B300 alike, behind the chip's own."""
    monkeypatch.setattr(launch, "CACHE", store)
    assert launch.stored(ONE, (10, 0)) is None
    store.load(ONE, "sm_100f")
    assert launch.stored(ONE, (10, 0)) == launch.stored(ONE, (10, 3)) == "sm_100f"
    store.load(ONE, "sm_103a")
    assert (launch.stored(ONE, (10, 0)), launch.stored(ONE, (10, 3))) == ("sm_100f", "sm_103a")


WARM_PROCESS = """
import json, sys
import torch
spawned = []
sys.addaudithook(lambda event, args: spawned.append(str(args[:2])) if event in ("subprocess.Popen", "os.posix_spawn",
                                                                             "os.exec", "os.system") else None)
import dsv4
from kernels.fake_driver import FakeDriver, installed
{launches}
compilers = ("cutlass", "tvm_ffi", "dsv4.kernels.{family}.grouped_gemm")
loaded = [m for m in compilers if m in sys.modules]
print(json.dumps({{"entries": [one.entry for one in driver.launches], "loaded": loaded, "spawned": spawned}}))
"""
LAUNCHES = {
    "blackwell": """
import dsv4.backends.blackwell, dsv4.kernels.blackwell.ops
from dataclasses import replace
from unittest import mock
from kernels.test_blackwell_launch import E, FULL, N, PLAIN, ROWS, Driver, aligned, launch, operands
driver, given = Driver(), replace(operands(), gs_b=torch.zeros(E))
b200 = mock.patch.object(torch.cuda, "get_device_capability", return_value=(10, 0))
with installed(driver, launch.gemm_kernel), b200:
    for config in (PLAIN, FULL):
        launch.grouped_gemm(config, given, aligned(ROWS, N, dtype=torch.bfloat16), multiprocessors=4)
""",
    "hopper": """
import dsv4.backends.hopper
from kernels.test_hopper_launch import GATED, PLAIN, launch, operands
driver = FakeDriver(launch.GEMM_SIGNATURE)
with installed(driver, launch.gemm_kernel):
    for config in (GATED, PLAIN):
        launch.grouped_gemm(config, **operands(config))
""",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_warm_process_loads_no_compiler(family, monkeypatch):
    """With its kernels on disk a new process launches without the DSL, TVM FFI or another program."""
    pytest.importorskip("triton")
    from kernels import test_blackwell_launch, test_hopper_launch

    configs, arch = {
        "blackwell": ((test_blackwell_launch.PLAIN, test_blackwell_launch.FULL), "sm_100a"),
        "hopper": ((test_hopper_launch.GATED, test_hopper_launch.PLAIN), "sm_90a"),
    }[family]
    monkeypatch.setattr(cache, "dsl_version", lambda: INSTALLED or "1.0")
    filled = replace(FAMILIES[family].CACHE, compiler=built)
    for config in configs:
        filled.load(config, arch)
    script = WARM_PROCESS.format(launches=LAUNCHES[family], family=family)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"entries": [f"entry_{arch}"] * 2, "loaded": [], "spawned": []}
