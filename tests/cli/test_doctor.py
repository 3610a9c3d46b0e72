"""``dsv4 doctor``."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from dsv4.backends import BACKENDS
from dsv4.cli.app import app
from dsv4.config import MoEConfig


def doctor(*arguments: str, **environment: str | None):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"DSV4_BACKEND": None, **environment})


def test_text():
    """The tables name the devices, every backend, both layers and the packages."""
    result = doctor()
    assert result.exit_code == 0
    expected = [*(backend.name for backend in BACKENDS), "cpu", "v4-flash", "v4-pro", "torch", "DSV4_BACKEND"]
    assert [text for text in expected if text not in result.stdout] == []


def test_document():
    """Every backend has its word on both layers and every device; the memory is what the backend itself states."""
    document = json.loads(doctor("--json").stdout)
    assert document["devices"][0]["device"] == "cpu"
    assert document["devices"][0]["threads"] == torch.get_num_threads()
    assert len(document["layers"]) == 2 * len(document["devices"])
    for layer in document["layers"]:
        assert list(layer["backends"]) == [backend.name for backend in BACKENDS]
        assert all(verdict["reason"] for verdict in layer["backends"].values())
    flash = document["layers"][0]
    config = MoEConfig(256, 4096, 2048, max_num_tokens=8192, top_k=6, swiglu_limit=10.0)
    chosen = next(backend for backend in BACKENDS if backend.name == flash["chosen"])
    assert flash["workspace_bytes"] == chosen.workspace_bytes(config, torch.device("cpu"))
    assert flash["weight_bytes_bf16"] == 256 * 3 * 4096 * 2048 * 2


def test_unusable_choice_is_told():
    """A backend that DSV4_BACKEND asks for and that is not there is reported, not an error: doctors see ill people."""
    result = doctor("--json", DSV4_BACKEND="abacus")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["environment"]["DSV4_BACKEND"] == "abacus"
    assert all(layer["chosen"] is None and "abacus" in layer["problem"] for layer in document["layers"])
    assert "abacus" in doctor(DSV4_BACKEND="abacus").stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_devices():
    """Each CUDA device is listed with its capability and memory."""
    gpu = json.loads(doctor("--json").stdout)["devices"][1]
    assert gpu["device"] == "cuda:0"
    assert tuple(map(int, gpu["capability"].split("."))) == torch.cuda.get_device_capability(0)
    assert gpu["memory_bytes"] > 1 << 30
