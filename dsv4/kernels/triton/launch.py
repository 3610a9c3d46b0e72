"""Programmatic dependent launch: a kernel's launch overlaps the end of the one before it in the stream.

A kernel launched so may start before its predecessor has ended. It calls :func:`begin_dependent` first, which waits
until the predecessor has ended and its writes are seen, and then lets its own successor start likewise. As every
program of every such kernel waits before it reads or writes anything, the order of a stream holds through any chain of
them. What overlaps is the launch itself, a microsecond or so. From sm_90 on; below, and for any other kernel, nothing
changes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

_MIN_CAPABILITY = (9, 0)


@triton.jit
def begin_dependent(PDL: tl.constexpr):
    """First statement of a kernel launched with :func:`dependent_launch`: nothing is read or written before."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: were it done before, every kernel of a chain would take its place on the chip at once.
        tl.extra.cuda.gdc_launch_dependents()


@cache
def _supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options, and the constexpr ``PDL``, of a kernel that begins with :func:`begin_dependent`."""
    return {"PDL": True, "launch_pdl": True} if _supported(device) else {"PDL": False}
