"""The DSL's compiler, called the way every family calls it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from cutlass import cute


def compile_kernel(kernel: Any, arguments: Sequence[Any], arch: str) -> tuple[bytes, str, str]:
    """Cubin, entry name and PTX of a kernel's launcher; its types come from ``arguments``. No GPU is needed."""
    with TemporaryDirectory() as folder:
        options = f"--gpu-arch {arch} --keep-ptx --keep-cubin --dump-dir {folder}"
        compiled = cute.compile(kernel, *arguments, options=options)
        text = str(compiled.artifacts.PTX)
        entry = re.search(r"\.entry (\w+)\(", text)
        assert entry is not None
        return compiled.artifacts.CUBIN, entry[1], text
