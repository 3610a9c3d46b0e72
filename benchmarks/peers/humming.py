"""Humming's W4A16 layer, called as vLLM calls it, by the script that also measures it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness import Contender, Outputs
from reference import BF16

from dsv4.cli._layer import Call
from dsv4.nvfp4 import Nvfp4Tensor
from peers.base import Setup, Unavailable
from peers.scripts import load_script

MODES = ("indexed", "grouped")

_CLAMPED = (
    "[](float g, float u) {{ const float x = fminf(g, {0}f); const float y = fmaxf(fminf(u, {0}f), -{0}f); "
    "return x / (1.f + expf(-x)) * y; }}(a, b)"
)
_PLAIN = "[](float g, float u) { return g / (1.f + expf(-g)) * u; }(a, b)"


class Humming:
    """Both of its modes; the faster one counts."""

    def __init__(self, setup: Setup):
        script = self._script = load_script(setup.folder, "humming_moe")
        try:
            script.import_humming()
        except ImportError as error:
            raise Unavailable(f"humming-kernels is not installed: {error}") from error
        shape, weights = setup.shape, setup.weights
        # The script knows two shapes and one limit by name; what it makes of them is set here for any.
        script.LIMIT = shape.swiglu_limit
        script.SWIGLU = _PLAIN if shape.swiglu_limit is None else _CLAMPED.format(float(shape.swiglu_limit))
        glue = script.Glue(str(setup.folder))
        e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
        layer = self._layer = script.Layer.__new__(script.Layer)
        layer.name, layer.glue, layer.E, layer.H, layer.I, layer.K = "layer", glue, e, h, i, shape.top_k
        layer.cfg13, layer.w13 = script.to_humming(_modelopt(weights.l1, 2), e, 2 * i, h, [i, i])
        layer.cfg2, layer.w2 = script.to_humming(_modelopt(weights.l2, 1), e, h, i, [h])
        multiprocessors = torch.cuda.get_device_properties(setup.device).multi_processor_count
        layer.locks = torch.zeros(8 * multiprocessors, dtype=torch.int32, device=setup.device)
        self._modes = MODES if glue.align_src != "stand-in" else MODES[:1]
        for mode in self._modes:
            layer.set_mode(mode)
            layer.precompile(setup.tokens)
        self.facts: dict[str, Any] = {"align": glue.align_src, "combine": glue.combine_src}

    def contenders(self, calls: Sequence[Call]) -> list[Contender]:
        # A graph does not keep what it reads alive: ids in the peer's dtype are kept by the closures.
        ids = [call.topk_ids.int() for call in calls]
        return [self._contender(mode, calls, ids) for mode in self._modes]

    def _contender(self, mode: str, calls: Sequence[Call], ids: Sequence[torch.Tensor]) -> Contender:
        layer = self._layer
        layer.set_mode(mode)
        layer.prepare(len(calls[0].hidden_states))
        state = dict(vars(layer))  # the mode, its tuning and its buffers: the next mode brings its own

        def run(index: int) -> Outputs:
            vars(layer).update(state)
            call = calls[index]
            return (layer.forward(call.hidden_states, call.topk_weights, ids[index]),)

        return Contender(f"humming-{mode}", run, BF16)


def _modelopt(weights: Nvfp4Tensor, stacks: int) -> dict[str, torch.Tensor]:
    """As a ModelOpt checkpoint has them."""
    scale = weights.gs.flatten()[:, None].repeat(1, stacks).contiguous()
    return {"weight": weights.codes, "weight_scale": weights.sf, "weight_scale_2": scale}
