"""Where an operation runs: as a Triton kernel on a GPU, as plain torch elsewhere. And those kernels as torch operators.

A public function asks :func:`has_kernel` and calls an operator below, or does the same in torch: that twin is the
definition, and the kernel gives its bits. As operators the kernels pass through torch.compile, FakeTensor and
functionalization. They write into tensors that the caller allocates and return nothing, so that nothing is aliased.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None


def has_kernel(x: Tensor) -> bool:
    """Whether operations on ``x`` run as Triton kernels: it is on a GPU and Triton is installed."""
    return x.is_cuda and _HAS_TRITON


# Triton is imported by the first call: it takes a while, and a CPU never needs it.


def _quantize(x: Tensor, gs: Tensor, fp4: Tensor, sf: Tensor, interleaved: bool) -> None:
    from dsv4.kernels.triton import quantize

    with torch.cuda.device(x.device):
        quantize.quantize(x, gs, fp4, sf, interleaved)


def _amax_quantize(x: Tensor, fp4: Tensor, sf: Tensor, gs: Tensor, interleaved: bool) -> None:
    from dsv4.kernels.triton import quantize

    with torch.cuda.device(x.device):
        quantize.amax_quantize(x, fp4, sf, gs, interleaved)


def _quantize_swizzled(x: Tensor, gs: Tensor, expert_offsets: Tensor | None, fp4: Tensor, sf: Tensor) -> None:
    from dsv4.kernels.triton import quantize

    with torch.cuda.device(x.device):
        quantize.quantize_swizzled(x, gs, expert_offsets, fp4, sf)


def _swizzle(sf: Tensor, out: Tensor) -> None:
    from dsv4.kernels.triton import swizzle

    with torch.cuda.device(sf.device):
        swizzle.swizzle(sf, out)


_library = torch.library.Library("nvfp4", "FRAGMENT")
for _name, _schema, _run in (
    ("quantize", "Tensor x, Tensor gs, Tensor(a!) fp4, Tensor(b!) sf, bool interleaved", _quantize),
    ("amax_quantize", "Tensor x, Tensor(a!) fp4, Tensor(b!) sf, Tensor(c!) gs, bool interleaved", _amax_quantize),
    (
        "quantize_swizzled",
        "Tensor x, Tensor gs, Tensor? expert_offsets, Tensor(a!) fp4, Tensor(b!) sf",
        _quantize_swizzled,
    ),
    ("swizzle", "Tensor sf, Tensor(a!) out", _swizzle),
):
    _library.define(f"{_name}({_schema}) -> ()")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"nvfp4::{_name}", lambda *args: None, lib=_library)
