"""Triton's interpreter, in processes of their own, mended where it does not do what a GPU does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> None:
    """Python with these arguments, where every Triton kernel is interpreted; its output shows if it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # The interpreter is chosen when Triton is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _fma(self: InterpreterBuilder, x: Any, y: Any, z: Any) -> TensorHandle:
    """Fused; Triton's own rounds twice. fp32 products are exact in float64, and their sum is rounded to odd there:
    rounding that to fp32 is as good as rounding once (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
    sums: proved algorithms using rounding to odd")."""
    with np.errstate(all="ignore"):
        product, c = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)
        inexact = ((error > 0) | (error < 0)) & (np.asarray(total).view(np.int64) & 1 == 0)
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)


def mend() -> None:
    """For the rest of this process."""
    patch, cast = interpreter._patch_lang_tensor, InterpreterBuilder.cast_impl

    def patch_tensor(tensor: type, scope: Any) -> None:
        # Triton 3.6 makes loop bounds Python numbers in a way that NumPy refuses from 2.4 on: arrays of one element.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_by_torch(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        # Triton's own cuts bits off on the way to bf16, and loses some of a subnormal's on the way back.
        data = np.array(source.data)
        match source.dtype.scalar, target.scalar:
            case tl.float32, tl.bfloat16:
                result = torch.from_numpy(data).bfloat16().view(torch.uint16)
            case tl.bfloat16, tl.float32:
                result = torch.from_numpy(data).view(torch.bfloat16).float()
            case _:
                return cast(self, source, target)
        return TensorHandle(result.numpy(), target.scalar)

    interpreter._patch_lang_tensor = patch_tensor
    InterpreterBuilder.cast_impl = cast_by_torch
    InterpreterBuilder.create_fma = _fma
