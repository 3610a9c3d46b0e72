"""The self-check that a GPU backend must pass, on backends that are wrong in known ways; it needs no GPU itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4.backends import proof
from dsv4.backends.reference import ReferenceBackend
from dsv4.errors import BackendError

CPU = torch.device("cpu")


class NeighboursScale(ReferenceBackend):
    """Quantizes the operand of GEMM 2 under another expert's static scale."""

    def run(self, packed: Any, call: Any, scratch: Any, out: Any) -> None:
        if call.input_scales is not None:
            call = replace(call, input_scales=replace(call.input_scales, l2=call.input_scales.l2.roll(1)))
        super().run(packed, call, scratch, out)


class Forgetful(ReferenceBackend):
    """Leaves the last token out."""

    def run(self, packed: Any, call: Any, scratch: Any, out: Any) -> None:
        super().run(packed, call, scratch, out)
        out[-1] = torch.nan


class OutOfMemory(ReferenceBackend):
    """Finds no memory."""

    def run(self, packed: Any, call: Any, scratch: Any, out: Any) -> None:
        raise torch.OutOfMemoryError


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch, tmp_path):
    """A short check, of which nothing is left behind."""
    monkeypatch.setattr(proof, "_TOKENS", (1, 5))
    monkeypatch.setattr(proof, "_SIZE", 256)
    monkeypatch.setattr(proof, "_key", lambda device: "key")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    proof.prove.cache_clear()


@pytest.mark.parametrize(("backend", "name"), [(NeighboursScale, "W4A4, static scales"), (Forgetful, "W4A16")])
def test_a_wrong_backend_fails(backend, name):
    """The verdict names the configuration that is wrong, and stands on disk."""
    verdict = proof.prove(backend, CPU)
    assert not verdict.usable
    assert verdict.reason.startswith(f"self-check failed: {name}, 1 tokens")
    assert proof.known(backend, CPU) == verdict


def test_a_right_backend_passes():
    """The reference agrees with itself."""
    assert proof.prove(ReferenceBackend, CPU).usable


@pytest.mark.parametrize("error", [BackendError("no kernel for this"), OSError("no space left")])
def test_what_cannot_be_had_today_is_no_verdict(error, monkeypatch):
    """A kernel that is in no cache, a full disk: the backend is passed over, and asked again by the next process."""

    def run(self: Any, packed: Any, call: Any, scratch: Any, out: Any) -> None:
        raise error

    class Lacking(ReferenceBackend):
        name = "lacking"

    monkeypatch.setattr(Lacking, "run", run)
    verdict = proof.prove(Lacking, CPU)
    assert not verdict.usable
    assert verdict.reason == f"self-check impossible: {error}"
    assert proof.known(Lacking, CPU) is None


def test_it_asks_for_what_the_backend_names(monkeypatch):
    """Beside its own numbers of tokens those of ``budgets``: whatever chip chooses them, no kernel is left out."""
    seen: set[int] = set()

    class Counting(ReferenceBackend):
        name = "counting"

        def budgets(self) -> tuple[int, ...]:
            return (1, 3)

        def run(self, packed: Any, call: Any, scratch: Any, out: Any) -> None:
            seen.add(len(call.hidden_states))
            super().run(packed, call, scratch, out)

    assert proof.prove(Counting, CPU).usable
    assert seen == {1, 3, 5}


def test_too_little_memory_is_no_verdict(few_tokens):
    """Other work on the GPU may take its memory for a while: that must not condemn a backend for good."""
    with pytest.raises(torch.OutOfMemoryError):
        proof.prove(OutOfMemory, CPU)
    assert proof.known(OutOfMemory, CPU) is None
