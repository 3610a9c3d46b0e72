"""Shared test set-up: where tests run, and a guard against hidden host synchronisation.

Imports only what a GPU machine with torch, transformers, pytest and hypothesis has.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.backends import BACKENDS
from dsv4.config import MoEConfig

hypothesis.settings.register_profile(
    "dsv4",
    deadline=None,  # a first call may compile or fill a cache
    derandomize=True,  # the same examples on every machine: a red run can be repeated
    max_examples=60,
)
hypothesis.settings.load_profile("dsv4")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _targets() -> Iterator[object]:
    config = MoEConfig(8, 256, 256, top_k=2)  # multiples of every backend's tiles
    for backend in BACKENDS:
        for device in DEVICES:
            if not backend.explain(config, torch.device(device)).usable:
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            yield pytest.param((backend.name, torch.device(device)), id=f"{backend.name}-{device}", marks=marks)


@pytest.fixture(params=_targets())
def target(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """(backend, device): every layer test runs on each pair, so that a new backend inherits them all."""
    name, device = request.param
    return name, torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else []) for d in DEVICES])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


class HostSyncError(AssertionError):
    """An operation whose result, or whose shape, would have to be read by the host."""


class NoHostSync(TorchDispatchMode):
    """Raises on operations that would make the host wait for a GPU."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "unique",
        "_unique",
        "_unique2",
        "masked_select",
        "repeat_interleave.Tensor",
        "equal",
        "histc",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        if any(name == bad or name.startswith((f"{bad}.", f"{bad}_")) for bad in self.FORBIDDEN):
            raise HostSyncError(f"{func} needs the host")
        if name.startswith("index.") and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise HostSyncError("indexing with a mask needs the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync() -> type[NoHostSync]:
    """The mode as a context manager: ``with no_host_sync(): ...``."""
    return NoHostSync
