"""Triton launches without a GPU: record them, and compile what was launched for any architecture."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def compile(self, arch: int) -> Any:
        """The compiled kernel for compute capability ``arch`` (80, 90, ...)."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _POINTERS[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(index,)] = _DIVISIBLE
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[parameter.name] = "constexpr", 1
            else:
                signature[parameter.name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = _DIVISIBLE
        language = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = language(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, Triton kernels are not run but noted."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        options = {k: kwargs[k] for k in ("num_warps", "num_stages") if k in kwargs}
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(self, tuple(grid), arguments, options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def sass(cubin: bytes, folder: Any) -> list[str]:
    """The instructions (their first words) of a cubin in order, by Triton's own disassembler."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    text = subprocess.run([tool, str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text, re.M)


def compiled_as(launch: Launch) -> tuple[object, ...]:
    """What Triton compiles a kernel for: constants, dtypes, and what it looks at in integers."""
    seen = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            seen.append(value)
        elif isinstance(value, torch.Tensor):
            seen.append(value.dtype)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            seen.append((value == 1, value % 16 == 0))
    return (launch.kernel.__name__, *map(repr, seen), *launch.options.items())
