"""The small model that ships: with our experts it predicts what it predicts with the oracle's, and mistakes show.

Perplexity is a check of the whole path, from the bytes of the checkpoint to the logits: names, layouts, scales, routing
and rounding. Its power is tested too: mistakes that leave a program running move it far beyond the tolerance.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from oracle import OracleWeights, moe_layer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dsv4.integrations.transformers as dsv4_hf
from dsv4.checkpoints import open_checkpoint
from dsv4.cli._evaluate import compare, read_windows
from dsv4.cli._generation import load_model, load_tokenizer
from dsv4.cli._modes import MODES

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-deepseek-v4"
EXPERTS, LAYERS, LIMIT = 16, 4, 10.0
TOLERANCE = 1e-3
"""Of perplexity, relative. Ours and the oracle differ by fp32 sums and what these flip at midpoints."""


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """A few windows of held-out text, ``[8, 256]``."""
    return read_windows(
        load_tokenizer(MODEL / "nvfp4"), (ROOT / "models" / "heldout.txt").read_text(encoding="utf-8"), most=8
    )


def ours(name: str):
    """The shipped NVFP4 model in a mode."""
    mode = MODES[name]
    return load_model(MODEL / "nvfp4", mode.activation_format, mode.activation_scale, dtype="float32")


class OracleExperts(torch.nn.Module):
    """The float64 oracle as the experts module of one layer, with tensors as they stand in the checkpoint's file."""

    def __init__(self, file, layer: int, name: str) -> None:
        super().__init__()

        def stack(projection: str, kind: str) -> torch.Tensor:
            names = [f"model.layers.{layer}.ffn.experts.{e}.{projection}.{kind}" for e in range(EXPERTS)]
            return torch.stack([file.get_tensor(name) for name in names])

        def gate_and_up(kind: str) -> torch.Tensor:
            return torch.cat([stack("w1", kind), stack("w3", kind)], dim=1)

        self.weights = OracleWeights(
            l1_fp4=gate_and_up("weight"),
            l1_sf=gate_and_up("weight_scale"),
            l1_gs=torch.stack([stack("w1", "weight_scale_2"), stack("w3", "weight_scale_2")], dim=1),
            l2_fp4=stack("w2", "weight"),
            l2_sf=stack("w2", "weight_scale"),
            l2_gs=stack("w2", "weight_scale_2"),
        )
        self.mode = {
            "activation_format": MODES[name].activation_format,
            "activation_scale": MODES[name].activation_scale,
            "l1_input_scale": torch.maximum(stack("w1", "input_scale"), stack("w3", "input_scale")),
            "l2_input_scale": stack("w2", "input_scale"),
            "swiglu_limit": LIMIT,
        }

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = moe_layer(hidden.to(torch.bfloat16), weights, ids, self.weights, **self.mode)
        return torch.from_numpy(out).to(hidden.dtype)


def oracles(name: str):
    """Transformers' model from the bf16 folder, its experts replaced by the oracle: nothing of ours is in it."""
    model = AutoModelForCausalLM.from_pretrained(MODEL / "bf16", dtype=torch.float32).eval()
    with safe_open(MODEL / "nvfp4" / "model.safetensors", framework="pt") as file:
        for number, layer in enumerate(model.model.layers):
            layer.mlp.experts = OracleExperts(file, number, name)
    assert number + 1 == LAYERS
    return model


@pytest.mark.parametrize("name", ["w4a16", "w4a4-static", "w4a4-token"])
def test_perplexity_is_the_oracles(name, windows):
    """Perplexity equals that of a float64 run of the same mode to 1e-3, and so do the predictions one by one."""
    scores = compare({"oracle": oracles(name), "ours": ours(name)}, windows)
    assert scores["ours"].perplexity == pytest.approx(scores["oracle"].perplexity, rel=TOLERANCE)
    # The two modes that quantize activations are 7e-3 nats from the one that does not: a mix-up would show here.
    assert scores["ours"].kl < 1e-3


def test_quantization_costs_little(windows):
    """NVFP4 is near bf16, W4A16 nearer than W4A4, and neither is bf16 itself."""
    bf16 = AutoModelForCausalLM.from_pretrained(MODEL / "bf16", dtype=torch.float32).eval()
    scores = compare({"bf16": bf16, "w4a16": ours("w4a16"), "w4a4-static": ours("w4a4-static")}, windows)
    assert 1e-3 < scores["w4a16"].kl < scores["w4a4-static"].kl < 3e-2
    assert scores["w4a4-static"].perplexity == pytest.approx(scores["bf16"].perplexity, rel=0.03)


def change_weights(model, change) -> None:
    """Re-prepare one layer of ``model`` with changed weights."""
    with open_checkpoint(MODEL / "nvfp4") as checkpoint:
        weights = change(checkpoint.load_layer(2))
    dsv4_hf.experts_of(model)[2].prepare_weights_from_stacked(**weights.prepare_arguments())


def roll(sf: torch.Tensor, shift: int, dim: int) -> torch.Tensor:
    return sf.view(torch.uint8).roll(shift, dim).view(torch.float8_e4m3fn)


def swap_gate_and_up(model) -> None:
    """Rows of gate where up's should be, scales and all."""

    def swap(weights):
        half = weights.shape.intermediate_size
        l1_fp4, l1_sf = weights.l1_fp4.roll(half, 1), roll(weights.l1_sf, half, 1)
        return dataclasses.replace(weights, l1_fp4=l1_fp4, l1_sf=l1_sf, l1_gs=weights.l1_gs.flip(1))

    change_weights(model, swap)


def shift_experts(model) -> None:
    """Every expert's down projection under its neighbour's number."""

    def shift(weights):
        l2_fp4, l2_sf = weights.l2_fp4.roll(1, 0), roll(weights.l2_sf, 1, 0)
        return dataclasses.replace(weights, l2_fp4=l2_fp4, l2_sf=l2_sf, l2_gs=weights.l2_gs.roll(1, 0))

    change_weights(model, shift)


def double_down_scale(model) -> None:
    """``weight_scale_2`` of one layer's down projections, off by a factor of 2."""
    change_weights(model, lambda weights: dataclasses.replace(weights, l2_gs=weights.l2_gs * 2))


def forget_limit(model) -> None:
    """SwiGLU without its clamp."""
    for moe in dsv4_hf.experts_of(model).values():
        moe.set_swiglu_limit(None)


@pytest.mark.parametrize("mistake", [swap_gate_and_up, shift_experts, double_down_scale, forget_limit])
def test_mistakes_show(mistake, windows):
    """A mistake moves perplexity by ten tolerances and more, and KL further than quantization does."""
    wrong = ours("w4a16")
    mistake(wrong)
    scores = compare({"right": ours("w4a16"), "wrong": wrong}, windows)
    assert abs(scores["wrong"].perplexity / scores["right"].perplexity - 1) > 10 * TOLERANCE
    assert scores["wrong"].kl > 0.03


def test_the_demo(tmp_path, capsys, monkeypatch):
    """``examples/demo.py`` generates, prints the table, and writes picture and numbers."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    picture, numbers = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = ["--tokens", "4", "--windows", "2", "--picture", str(picture), "--json", str(numbers)]
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    demo.main()
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*demo.PROMPTS, "bf16", "W4A16", "W4A4 static", "W4A4 token", "tokens/s"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(numbers.read_text())
    assert [row["mode"] for row in document["rows"]] == ["bf16", *demo.COMPARED]
    assert document["tokens"] == 2 * 255
    # 4 bits and one scale byte per 16 weights, of 16 bits; and a few global scales.
    assert document["rows"][1]["expert_bytes"] / document["rows"][0]["expert_bytes"] == pytest.approx(0.28125, rel=0.01)
