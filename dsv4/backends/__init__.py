"""Backends, and the one function that chooses between them."""

from __future__ import annotations

import logging
import os

import torch

from dsv4.backends.base import Backend, Call, InputScales, Packed, Verdict
from dsv4.backends.blackwell import BlackwellBackend
from dsv4.backends.hopper import HopperBackend
from dsv4.backends.library import LibraryBackend
from dsv4.backends.portable import PortableBackend
from dsv4.backends.proof import prove
from dsv4.backends.reference import ReferenceBackend
from dsv4.config import MoEConfig
from dsv4.errors import BackendError

__all__ = ["BACKENDS", "Backend", "Call", "InputScales", "Packed", "Verdict", "choose", "explain_all"]

_log = logging.getLogger("dsv4")

BACKENDS: tuple[type[Backend], ...] = (
    HopperBackend,
    PortableBackend,
    ReferenceBackend,
    BlackwellBackend,
    LibraryBackend,
)
"""In the order in which ``auto`` tries them: fastest first. The reference can always be used, so ``auto`` never takes
what stands behind it: the Blackwell kernels, until they have run on such a chip, and a library, because its numbers are
not these."""


def explain_all(config: MoEConfig, device: torch.device) -> dict[str, Verdict]:
    """Every backend's word on a configuration, in the order in which ``auto`` tries them."""
    return {backend.name: backend.explain(config, device) for backend in BACKENDS}


def choose(requested: str, config: MoEConfig, device: torch.device, *, proven: bool = False) -> type[Backend]:
    """The backend to use.

    Args:
        requested: a backend's name, or ``"auto"`` for the first usable one; then the environment variable
            ``DSV4_BACKEND`` is asked first.
        proven: on a GPU, let it pass its self-check first (:mod:`dsv4.backends.proof`); one that fails is passed over
            with a warning, or refused if it was asked for by name.

    Raises:
        BackendError: the name is unknown, or what was asked for cannot run this; says why.
    """
    origin = "backend="
    if requested == "auto":
        requested = os.environ.get("DSV4_BACKEND", "auto")
        origin = "DSV4_BACKEND="
    names = [backend.name for backend in BACKENDS]
    if requested != "auto" and requested not in names:
        raise BackendError(f"{origin}{requested}: no such backend, expected auto, {', '.join(names)}")
    verdicts = explain_all(config, device)
    for backend in BACKENDS:
        verdict = verdicts[backend.name]
        if requested == backend.name and not verdict.usable:
            raise BackendError(f"{origin}{requested} cannot be used on {device}: {verdict.reason}")
        if requested in ("auto", backend.name) and verdict.usable:
            if proven and device.type == "cuda" and backend is not ReferenceBackend:
                proof = prove(backend, device)
                if not proof.usable and requested == backend.name:
                    raise BackendError(f"{origin}{requested} cannot be used on {device}: {proof.reason}")
                if not proof.usable:
                    _log.warning("backend %s is passed over on %s: %s", backend.name, device, proof.reason)
                    verdicts[backend.name] = proof
                    continue
            _log.info("backend %s on %s: %s", backend.name, device, verdict.reason)
            return backend
    reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items())
    raise BackendError(f"no backend can run this layer on {device} ({reasons})")
