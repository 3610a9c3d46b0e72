"""The float64 oracle of ``dsv4 verify`` against the tests' own, which was written apart from it."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from dsv4.checkpoints.base import LayerWeights
from dsv4.cli import _oracle


def oracle_case(seed: int) -> tuple[oracle.OracleWeights, LayerWeights, Tensor, Tensor]:
    """Weights of 5 experts, twice; 40 tokens of very different sizes, one of them zero; the expert of each."""
    w = oracle.random_weights(5, 128, 64, seed, split_gate_up=True)
    weights = LayerWeights(0, tuple(range(5)), w.l1_fp4, w.l1_sf, w.l1_gs, w.l2_fp4, w.l2_sf, w.l2_gs)
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((40, 128)) * 2.0 ** rng.integers(-12, 8, (40, 1))
    hidden[7] = 0
    experts = rng.integers(0, 5, 40)
    experts[experts == 3] = 1  # an expert without tokens
    return w, weights, torch.from_numpy(hidden).bfloat16(), torch.from_numpy(experts)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("mode", ["w4a16", "w4a4-static", "w4a4-token"])
@pytest.mark.parametrize("seed", range(3))
def test_oracle(mode, limit, seed):
    """The command's torch oracle and the tests' numpy oracle, written apart, agree to float64's rounding, ties moved or
    not."""
    w, weights, hidden, experts = oracle_case(seed)
    l2_scale = torch.from_numpy(np.random.default_rng(seed).uniform(1e-4, 1e-2, 5).astype(np.float32))
    static = {"l1_input_scale": np.float32(0.0012), "l2_input_scale": l2_scale} if mode == "w4a4-static" else {}
    own = _oracle.ActivationMode(
        mode != "w4a16", *((float(np.float32(0.0012)), l2_scale) if mode == "w4a4-static" else ())
    )
    down = _oracle.down_rows(weights, _oracle.operands(weights, hidden, experts, own, limit), experts)
    for number, nudge in enumerate(_oracle.NEAR_TIES):
        want = oracle.moe_layer(
            hidden,
            torch.ones(40, 1),
            experts.unsqueeze(1),
            w,
            activation_format="bf16" if mode == "w4a16" else "nvfp4",
            activation_scale="static" if static else "token",
            swiglu_limit=limit,
            nudge=nudge,
            **static,
        )
        assert oracle.relative_l2(down[number], want) < 1e-13


def test_oracle_decodes_every_byte():
    """Every pair of codes under every scale byte decodes as defined, NaN included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).reshape(256 * 32, 8)
    sf = torch.arange(256, dtype=torch.uint8).repeat_interleave(32).reshape(-1, 1)
    got = _oracle.decode(codes, sf.view(torch.float8_e4m3fn))
    np.testing.assert_array_equal(got.numpy(), oracle.dequantize(codes, sf, 1.0))


def test_oracle_rounds_to_bf16():
    """float64 to bf16 in one step, ties, subnormals and overflow included."""
    values = oracle.wide_values((50_000,), -140, 129, torch.float64, 0)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-134, 3 * 2.0**-134, 3.4e38, -3.4e38, 0.0, -0.0])
    for x in (values, ties.double()):
        np.testing.assert_array_equal(_oracle.round_to_bf16(x).numpy(), oracle.round_to_bf16(x.numpy()))
