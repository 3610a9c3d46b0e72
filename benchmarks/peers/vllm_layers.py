"""vLLM's own routed-expert layers, with vLLM's weight preparation, through the script that also measures them alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from harness import BF16_TOLERANCE, NVFP4_TOLERANCE, Contender, Outputs
from reference import BF16, Activations

from dsv4.cli._layer import Call
from dsv4.cli._machine import storage_bytes, versions
from dsv4.integrations.vllm import register
from dsv4.integrations.vllm.parameters import ACTIVATIONS
from peers.base import Setup, Unavailable
from peers.scripts import load_script

L1_SCALE, L2_SCALE = 8 / 2688, 32 / 2688
"""Static input scales: amax of hidden states and of the intermediate, as drawn for these benchmarks, rounded up."""


class _VllmLayer:
    """One backend of vLLM's NVFP4 experts."""

    backend = ""
    quantizes = False

    @property
    def name(self) -> str:
        """Of its contender."""
        return f"vllm-{self.backend}"

    def __init__(self, setup: Setup):
        if not torch.cuda.is_available():
            raise Unavailable("vLLM's NVFP4 layers need a CUDA device")
        try:
            script = self._script = load_script(setup.folder, "bench_vllm_experts", "vllm_boot.py")
            self._config = _vllm_config(script, setup)
        except (ImportError, RuntimeError) as error:
            raise Unavailable(f"vLLM does not load: {error}") from error
        shape, weights = setup.shape, setup.weights
        with script.set_current_vllm_config(self._config):
            experts = shape.num_experts
            layer = self._layer = script.make_layer(
                self.backend, experts, experts, shape.hidden_size, shape.intermediate_size, shape.top_k,
                shape.swiglu_limit, setup.device,
            )  # fmt: skip
            for name, value in {
                "w13_weight": weights.l1.codes,
                "w2_weight": weights.l2.codes,
                "w13_weight_scale": weights.l1.sf,
                "w2_weight_scale": weights.l2.sf,
                "w13_weight_scale_2": weights.l1.gs.flatten()[:, None].expand(-1, 2),
                "w2_weight_scale_2": weights.l2.gs.flatten(),
            }.items():
                getattr(layer, name).data.copy_(value)
            layer.w13_input_scale.data.fill_(L1_SCALE)
            layer.w2_input_scale.data.fill_(L2_SCALE)
            memory = _prepared(layer, setup.device)
        torch.cuda.empty_cache()
        self._activations = BF16
        if self.quantizes:
            scales = torch.full((experts + 1,), L2_SCALE, device=setup.device)
            scales[0] = L1_SCALE
            self._activations = Activations(True, scales[0], scales[1:])
        self.facts: dict[str, Any] = {
            "version": versions()["vllm"],
            "kernel": layer.quant_method.experts_cls.__name__,
            **memory,
        }

    def contenders(self, calls: Sequence[Call]) -> list[Contender]:
        ids = [call.topk_ids.int() for call in calls]
        tokens = len(calls[0].hidden_states)

        def run(index: int) -> Outputs:
            call = calls[index]
            return (self._layer.forward_modular(call.hidden_states, call.topk_weights, ids[index]),)

        return [
            Contender(
                self.name,
                run,
                self._activations,
                NVFP4_TOLERANCE if self.quantizes else BF16_TOLERANCE,
                context=lambda: self._context(tokens),
            )
        ]

    @contextmanager
    def _context(self, tokens: int) -> Iterator[None]:
        script, config = self._script, self._config
        with script.set_current_vllm_config(config), script.set_forward_context(None, config, num_tokens=tokens):
            yield


class Marlin(_VllmLayer):
    """W4A16; its first call waits for the driver's compiler, about 20 s."""

    backend = "marlin"


class VllmHumming(_VllmLayer):
    """W4A16, Humming's kernels as vLLM drives them."""

    backend = "humming"


class Emulation(_VllmLayer):
    """W4A4 with exact products, static scales."""

    backend = "emulation"
    quantizes = True


class _ThroughPlugin(_VllmLayer):
    """vLLM's layer with dsv4 behind it: what our plug-in makes of the same weights. The others ask for a backend of
    vLLM's by name, and are left alone by it."""

    backend = "auto"

    def __init__(self, setup: Setup):
        register()
        with _environment(ACTIVATIONS, "static" if self.quantizes else "bf16"):
            super().__init__(setup)
        moe = getattr(self._layer.quant_method, "nvfp4_moe", None)
        if moe is None:
            raise Unavailable("the plug-in left this layer to vLLM")
        self.facts["kernel"] = f"dsv4 {moe.backend_name}"


class PluginW4A16(_ThroughPlugin):
    """The plug-in, activations as they are."""

    name = "vllm-dsv4-w4a16"


class PluginW4A4(_ThroughPlugin):
    """The plug-in, static scales."""

    name = "vllm-dsv4-w4a4"
    quantizes = True


def _prepared(layer: Any, device: torch.device) -> dict[str, float]:
    """vLLM's step after loading, and the memory that it took: loaded, kept, and at its peak above what was loaded."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loaded = storage_bytes(layer)
    layer.quant_method.process_weights_after_loading(layer)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    kept = loaded + torch.cuda.memory_allocated(device) - before
    figures = {"loaded": loaded, "kept": kept, "peak_above_loaded": peak - before}
    return {f"{name}_gib": round(count / 2**30, 3) for name, count in figures.items()}


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _vllm_config(script: Any, setup: Setup) -> Any:
    """vLLM's configuration; its workspaces are set up once for all layers."""
    if not hasattr(script, "shared_config"):
        script.init_workspace_manager(setup.device)
        script.shared_config = script.VllmConfig()
        script.shared_config.scheduler_config.max_num_batched_tokens = max(setup.tokens)
    return script.shared_config
