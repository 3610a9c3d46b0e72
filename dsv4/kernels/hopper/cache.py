"""Compiled kernels on disk: one file each, keyed by source, configuration and architecture, named with the DSL version.

A warm cache needs neither the DSL nor a compiler. Files are written whole and moved into place, so that processes that
compile the same kernel at the same time both leave a good one. A file begins with a digest of its name and contents;
one that does not fit (damaged, or another kernel's file under this name) is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dsv4.errors import BackendError
from dsv4.kernels.hopper.config import HopperConfig

ARCH = "sm_90a"
_SOURCES = (
    "config.py",
    "grouped_gemm.py",
    "layout.py",
    "../cutedsl/ptx.py",
    "../cutedsl/epilogue.py",
    "../triton/weight_layout.py",
)
_DIGEST = 32


def folder() -> Path:
    """``DSV4_CACHE_DIR``, or the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsv4"
    return Path(os.environ.get("DSV4_CACHE_DIR", default)) / "hopper"


def dsl_version() -> str | None:
    """Of the installed CuTe DSL, without importing it."""
    try:
        return version("nvidia-cutlass-dsl")
    except PackageNotFoundError:
        return None


def key(config: HopperConfig) -> str:
    """Of a configuration under this source."""
    digest = hashlib.sha256(f"{ARCH} {config!r}".encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:32]


def lookup(config: HopperConfig) -> tuple[bytes, str] | None:
    """Cubin and entry name from disk: of the installed DSL's version, or of any where none is installed."""
    pattern = f"{key(config)}-{dsl_version() or '*'}.kernel"
    for path in sorted(folder().glob(pattern)):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest, payload = content[:_DIGEST], content[_DIGEST:]
        if _digest(path.name, payload) == digest:
            entry, _, cubin = payload.partition(b"\0")
            return cubin, entry.decode()
    return None


def load(config: HopperConfig) -> tuple[bytes, str]:
    """Cubin and entry name: from disk, else compiled, and kept where the directory can be written.

    Raises:
        BackendError: it is not on disk, and the DSL is not installed.
    """
    found = lookup(config)
    if found is not None:
        return found
    installed = dsl_version()
    if installed is None:
        raise BackendError(
            f"no compiled kernel for {config} in {folder()} and nvidia-cutlass-dsl is not installed: "
            "pip install 'dsv4[cuda]', or set DSV4_CACHE_DIR to a cache compiled elsewhere"
        )
    cubin, entry = _compile(config)
    payload = entry.encode() + b"\0" + cubin
    path = folder() / f"{key(config)}-{installed}.kernel"
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next process a compilation
        _write(path, _digest(path.name, payload) + payload)
    return cubin, entry


def _digest(name: str, payload: bytes) -> bytes:
    return hashlib.sha256(name.encode() + payload).digest()


def _write(path: Path, content: bytes) -> None:
    """Beside it, then into its place; nothing is left behind where that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _compile(config: HopperConfig) -> tuple[bytes, str]:
    """Only here is the DSL imported."""
    from dsv4.kernels.hopper.grouped_gemm import compile_kernel

    return compile_kernel(config)
