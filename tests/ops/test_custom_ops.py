"""``torch.ops.nvfp4.moe_gemm``: honest schema, fakes, weak registry, torch.compile."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from layer_cases import build, inputs, on
from oracle import random_weights

from dsv4 import Nvfp4MoE, StateError
from dsv4.ops.custom_ops import nvfp4_moe_gemm, register_runner

E, H, INTER, K = 4, 256, 128, 2


def layer(target) -> Nvfp4MoE:
    return build(target, random_weights(E, H, INTER, seed=1), top_k=K, activation_scale="token")


def test_the_operator_equals_run(target):
    """Operator, ``out=`` overload and Python function give the layer's own bits."""
    moe = layer(target)
    args = on(target[1], *inputs(7, H, K, E))
    want = moe.run(*args)
    assert torch.equal(torch.ops.nvfp4.moe_gemm(*args, moe.runner_id, H), want)
    assert torch.equal(nvfp4_moe_gemm(*args, moe.runner_id, H), want)
    out = torch.full_like(want, torch.nan)
    torch.ops.nvfp4.moe_gemm.out(*args, moe.runner_id, H, out=out)
    assert torch.equal(out, want)
    other = torch.full_like(want, torch.nan)
    assert nvfp4_moe_gemm(*args, moe.runner_id, H, out=other) is other
    assert torch.equal(other, want)


def test_opcheck(target):
    """torch's own checks of schema, fake implementations and functionalization pass, mutation included."""
    moe = layer(target)
    args = (*on(target[1], *inputs(7, H, K, E)), moe.runner_id, H)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.nvfp4.moe_gemm.default, args, test_utils=utilities)
    out = torch.empty(7, H, dtype=torch.bfloat16, device=target[1])
    torch.library.opcheck(torch.ops.nvfp4.moe_gemm.out, args, {"out": out}, test_utils=utilities)


def test_any_object_can_be_a_runner():
    """The operator calls ``_run_impl(hidden, topk_weights, topk_ids)`` of whatever was registered."""

    class Doubler:
        def _run_impl(self, hidden, topk_weights, topk_ids):
            return hidden * 2

    doubler = Doubler()
    number = register_runner(doubler)
    assert register_runner(doubler) != number
    x, w, ids = inputs(3, H, K, E)
    assert torch.equal(nvfp4_moe_gemm(x, w, ids, number, H), x * 2)
    out = torch.empty_like(x)
    nvfp4_moe_gemm(x, w, ids, number, H, out=out)
    assert torch.equal(out, x * 2)


def test_a_freed_layer_is_an_error():
    """A number whose layer is gone, or never was, is refused in words."""
    moe = layer(("reference", torch.device("cpu")))
    number = moe.runner_id
    del moe
    gc.collect()
    for gone in (number, 10**9):
        with pytest.raises(StateError, match="keep the layer alive"):
            nvfp4_moe_gemm(*inputs(3, H, K, E), gone, H)


COMPILERS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")),
]


class Block(torch.nn.Module):
    """Something before and after the layer, so that there is a graph around it."""

    def __init__(self, moe: Nvfp4MoE, write_out: bool):
        super().__init__()
        self.moe, self.write_out = moe, write_out

    def forward(self, x, w, ids):
        x = x * 2 + 1
        if self.write_out:
            out = torch.empty_like(x)
            self.moe.run(x, w, ids, out=out)
        else:
            out = self.moe.run(x, w, ids)
        return out.float() - 1


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("write_out", [False, True])
def test_fullgraph_compile_equals_eager(target, compiler, write_out):
    """A module that calls the layer compiles without a graph break and gives eager's numbers, at any batch size."""
    torch._dynamo.reset()
    block = Block(layer(target), write_out)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for tokens in (7, 5, 12):
        args = on(target[1], *inputs(tokens, H, K, E, seed=tokens))
        torch.testing.assert_close(compiled(*args), block(*args), rtol=0, atol=0)
