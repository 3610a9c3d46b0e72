"""A vLLM that can build layers on this machine, with the plug-in loaded by vLLM's own loader."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from vllm_plugin import layers

    @pytest.fixture(scope="session", autouse=True)
    def plugin() -> None:
        """vLLM, made to run here, and the plug-in."""
        layers.start()

    @pytest.fixture(scope="session")
    def one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
        """vLLM's process groups, of one process."""
        rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
        with set_current_vllm_config(layers.vllm_config(layers.DEVICES[-1])):
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel(1)

    @pytest.fixture(params=layers.DEVICES)
    def device(request: pytest.FixtureRequest) -> torch.device:
        """Each device that this machine has."""
        return torch.device(request.param)

    @pytest.fixture(params=["modelopt", "compressed-tensors"])
    def layout(request: pytest.FixtureRequest) -> str:
        """Both checkpoint layouts that vLLM has NVFP4 experts in."""
        return str(request.param)

    @pytest.fixture(autouse=True)
    def environment(monkeypatch: pytest.MonkeyPatch) -> None:
        """No switch of the caller's in the tests' way."""
        for name in ("DSV4_VLLM", "DSV4_VLLM_ACTIVATIONS", "DSV4_BACKEND"):
            monkeypatch.delenv(name, raising=False)
