"""A new format is one class: fused floating-point experts, as Transformers keeps them, added from outside."""

from __future__ import annotations

import pytest
import torch

from dsv4.checkpoints import ExpertShape, checkpoint, open_checkpoint
from dsv4.checkpoints.dense import quantize_expert
from dsv4.errors import CheckpointError

from . import make

GATE_UP, DOWN = "model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"


class FusedFormat:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I], quantized while reading."""

    name = "fused"

    def detect(self, source, location, config):
        return location.family.fused

    def shape(self, source, location):
        _, rows, hidden = source[location.tensors["gate_up", ""]].shape
        return ExpertShape(hidden, rows // 2)

    def read_expert(self, source, location, device):
        gate_up, down = (source.slice(location.tensors[key, ""])[location.expert] for key in ("gate_up", "down"))
        return quantize_expert(*gate_up.to(device).chunk(2), down.to(device))


def fused_tensors(experts: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        GATE_UP: torch.randn(experts, 2 * make.INTER, make.HIDDEN, generator=g),
        DOWN: torch.randn(experts, make.HIDDEN, make.INTER, generator=g),
    }


def test_a_fused_format_is_one_class(tmp_path, monkeypatch):
    """With its line in FORMATS, experts that are rows of one tensor load like any others, each from its own row."""
    monkeypatch.setattr(checkpoint, "FORMATS", (FusedFormat(), *checkpoint.FORMATS))
    tensors = fused_tensors()
    with open_checkpoint(make.write(tmp_path, tensors)) as opened:
        assert (opened.format.name, opened.moe_layers, opened.num_experts) == ("fused", (2,), 3)
        assert opened.other_tensors() == []
        layer = opened.load_layer(2, [2, 0], on_missing_input_scale="weight-only")
    assert (layer.activation_format, layer.notes[0].split(" have")[0]) == ("bf16", "2 of 2 experts")
    for row, e in enumerate((2, 0)):
        decoded = make.decode64(layer.l2_fp4[row], layer.l2_sf[row], float(layer.l2_gs[row]))
        expected = tensors[DOWN][e].double()
        # NVFP4 of normal data is off by about a tenth; another expert's row would be off by 1.4.
        assert (decoded - expected).norm() < 0.2 * expected.norm()


def test_fused_experts_that_disagree_are_refused(tmp_path):
    """gate_up_proj and down_proj with different numbers of experts."""
    tensors = fused_tensors()
    tensors[DOWN] = tensors[DOWN][:2].clone()
    with pytest.raises(CheckpointError, match="fused expert tensors must agree on a first dimension"):
        open_checkpoint(make.write(tmp_path, tensors))
