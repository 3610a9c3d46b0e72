"""Compiled kernels on disk: one file each, keyed by source, configuration and architecture, named with the DSL version.

A warm cache needs neither the DSL nor a compiler. Files are written whole and moved into place, so that processes that
compile the same kernel at the same time both leave a good one. A file begins with a digest of its name and contents;
one that does not fit (damaged, or another kernel's file under this name) is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsv4.errors import BackendError

_DIGEST = 32
_OLDEST = (4, 8, 1)
"""The DSL that the kernels are written for. Others pin older ones (vLLM does), which would compile them unproven."""


def dsl_version() -> str | None:
    """Of the installed CuTe DSL, without importing it; None if there is none, or one that is too old."""
    try:
        found = version("nvidia-cutlass-dsl")
    except PackageNotFoundError:
        return None
    return found if tuple(int(n) for n in re.findall(r"\d+", found)[:3]) >= _OLDEST else None


@dataclass(frozen=True)
class KernelCache:
    """The compiled kernels of one family.

    Attributes:
        name: of the family, and of its folder.
        sources: files that a kernel is made from.
        compiler: ``(configuration, architecture)`` to cubin and entry name; imports the DSL when it is called.
    """

    name: str
    sources: Sequence[Path]
    compiler: Callable[[Any, str], tuple[bytes, str]]

    def folder(self) -> Path:
        """``DSV4_CACHE_DIR``, or the user's cache directory."""
        default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dsv4"
        return Path(os.environ.get("DSV4_CACHE_DIR", default)) / self.name

    def key(self, config: Any, arch: str) -> str:
        """Of a configuration under the sources as they were when this process asked first."""
        return hashlib.sha256(f"{arch} {config!r}".encode() + _contents(tuple(self.sources))).hexdigest()[:32]

    def names(self) -> list[str]:
        """Of the files of the installed DSL's version, or of any version where none is installed."""
        installed = dsl_version()
        try:
            found = os.listdir(self.folder())
        except OSError:
            return []
        return sorted(name for name in found if name.endswith(f"-{installed}.kernel" if installed else ".kernel"))

    def missing(self, configs: Iterable[Any], arch: str) -> list[Any]:
        """Those of some configurations for which there is no file; what is in the files is not looked at."""
        there = {name.partition("-")[0] for name in self.names()}
        return [config for config in configs if self.key(config, arch) not in there]

    def lookup(self, config: Any, arch: str) -> tuple[bytes, str] | None:
        """Cubin and entry name from disk: of the installed DSL's version, or of any where none is installed."""
        key = self.key(config, arch)
        for path in (self.folder() / name for name in self.names() if name.startswith(f"{key}-")):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            digest, payload = content[:_DIGEST], content[_DIGEST:]
            if _digest(path.name, payload) == digest:
                entry, _, cubin = payload.partition(b"\0")
                return cubin, entry.decode()
        return None

    def load(self, config: Any, arch: str) -> tuple[bytes, str]:
        """Cubin and entry name: from disk, else compiled, and kept where the directory can be written.

        Raises:
            BackendError: it is not on disk, and the DSL is not installed.
        """
        found = self.lookup(config, arch)
        if found is not None:
            return found
        installed = dsl_version()
        if installed is None:
            raise BackendError(
                f"no {arch} kernel for {config} in {self.folder()} and no nvidia-cutlass-dsl from "
                f"{'.'.join(map(str, _OLDEST))} on is installed: "
                "pip install 'dsv4[cuda]', or set DSV4_CACHE_DIR to a cache compiled elsewhere"
            )
        cubin, entry = self.compiler(config, arch)
        payload = entry.encode() + b"\0" + cubin
        path = self.folder() / f"{self.key(config, arch)}-{installed}.kernel"
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next process a compilation
            _write(path, _digest(path.name, payload) + payload)
        return cubin, entry


@cache
def _contents(sources: tuple[Path, ...]) -> bytes:
    """A digest of files, read once: what this process has imported does not change with them."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()


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
