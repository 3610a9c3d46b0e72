"""All scratch memory of a device, under one owner.

A layer's scratch is sized once, for ``max_num_tokens``, from the capacity bound of :func:`dsv4.config.capacity`.
Layers that run one after the other share one :class:`Workspace`, since none needs its scratch after its ``run``
returned (the result is never part of it). Layers that run at the same time, on two streams or two threads, must be
given different ones.

A :class:`BufferPlan` says which buffers a backend wants; the workspace is one byte buffer that every plan is laid over.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dsv4.errors import StateError

_ALIGNMENT = 256


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """``device`` as torch's current one, on which Triton launches and whose stream it takes, wherever tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class BufferPlan:
    """Named buffers, one after the other, each aligned to 256 bytes.

    Attributes:
        buffers: name -> (shape, dtype).
        aliases: name -> (the buffer at whose start it begins, (shape, dtype)): buffers that are never in use at the
            same time as those they lie over, from that one on.
    """

    buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, tuple[str, tuple[tuple[int, ...], torch.dtype]]] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(init=False)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        offsets, end = {}, 0
        for name, (shape, dtype) in self.buffers.items():
            offsets[name] = end
            size = math.prod(shape) * dtype.itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        for name, (first, (shape, dtype)) in self.aliases.items():
            offsets[name] = offsets[first]
            end = max(end, offsets[first] + math.prod(shape) * dtype.itemsize)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "nbytes", end)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The buffers as views of ``memory``, uint8 of at least ``nbytes``. Their contents are undefined."""
        result = {}
        layout = {**self.buffers, **{name: buffer for name, (_, buffer) in self.aliases.items()}}
        for name, (shape, dtype) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            result[name] = memory[self.offsets[name] :][:size].view(dtype).view(shape)
        return result


class Workspace:
    """One device's scratch memory.

    It grows when a layer asks for more than there is. A layer keeps the memory it was given, so growing for one layer
    never moves the scratch, or the captured graphs, of another; create the largest layer first to have one buffer.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._busy = threading.Lock()
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._memory.numel()

    def reserve(self, nbytes: int) -> Tensor:
        """uint8 ``[>= nbytes]``, the same memory for every caller as long as it is large enough."""
        if nbytes > self.nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._memory

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the workspace for one run, on its device; two threads at once would overwrite each other's scratch.

        With ``DSV4_DEBUG=1`` in the environment, two streams at once are caught as well: work that another stream has
        not finished. (Not by default: it costs an event for each run. Graph replays cannot be seen.)

        Raises:
            StateError: another thread is running a layer on this workspace, or another stream still is.
        """
        if not self._busy.acquire(blocking=False):
            raise StateError(
                "this workspace is in use by another thread: layers that run at the same time need a workspace each "
                "(Nvfp4MoE(..., workspace=Workspace(device)))"
            )
        try:
            with on_device(self.device):
                debug = self.device.type == "cuda" and os.environ.get("DSV4_DEBUG") == "1"
                if debug:
                    self._check_stream()
                yield
                if debug and not torch.cuda.is_current_stream_capturing():
                    stream, event = torch.cuda.current_stream(self.device), torch.cuda.Event()
                    event.record(stream)
                    self._last = (stream, event)
        finally:
            self._busy.release()

    def _check_stream(self) -> None:
        if self._last is None or torch.cuda.is_current_stream_capturing():
            return
        stream, event = self._last
        if stream != torch.cuda.current_stream(self.device) and not event.query():
            raise StateError(
                f"this workspace is in use by another stream ({stream}), whose layer has not finished: layers that run "
                f"at the same time need a workspace each (Nvfp4MoE(..., workspace=Workspace(device))), or the streams "
                f"must wait for one another"
            )


# The default of a device lives as long as a layer uses it.
_defaults: WeakValueDictionary[torch.device, Workspace] = WeakValueDictionary()


def default_workspace(device: torch.device) -> Workspace:
    """The workspace that all layers of a device share unless they are given another."""
    workspace = _defaults.get(device)
    if workspace is None:
        workspace = _defaults[device] = Workspace(device)
    return workspace
