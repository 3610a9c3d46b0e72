"""The ModelOpt writer and the quantization of floating-point experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.checkpoints import ExpertWeights, InputScale, open_checkpoint
from dsv4.checkpoints.dense import quantize_expert
from dsv4.checkpoints.modelopt import expert_tensors, quantization_config
from dsv4.checkpoints.naming import DEEPSEEK_V4, FAMILIES, TRANSFORMERS, parse
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import Nvfp4Tensor

from . import make


def weights(seed: int, scales: bool = True) -> ExpertWeights:
    parts = make.expert(seed)
    matrices = [Nvfp4Tensor(part["weight"], part["weight_scale"], part["weight_scale_2"]) for part in parts.values()]
    inputs = {name: InputScale(float(part["input_scale"])) for name, part in parts.items()} if scales else {}
    return ExpertWeights(*matrices, inputs)


@pytest.mark.parametrize(("family", "naming"), [(DEEPSEEK_V4, make.DEEPSEEK), (TRANSFORMERS, make.QWEN)])
def test_written_tensors_have_the_format_by_name(family, naming):
    """The writer's names, dtypes, shapes and values are those that the tests write by hand."""
    expected = make.names(make.expert(7), 2, 5, naming)
    written = expert_tensors(weights(7), 2, 5, family=family)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(
            tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor,
            expected[name].view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else expected[name],
        )


def test_round_trip(tmp_path):
    """What is written is read back, bit for bit, through quantized floating-point weights and safetensors."""
    g = torch.Generator().manual_seed(0)
    experts = []
    tensors = {}
    for e in range(3):
        gate, up = (torch.randn(32, 64, generator=g) for _ in range(2))
        expert = quantize_expert(gate, up, torch.randn(64, 32, generator=g))
        experts.append(expert)
        tensors |= expert_tensors(expert, 0, e)
    config = {"quantization_config": quantization_config()}
    with open_checkpoint(make.write(tmp_path, tensors, config)) as checkpoint:
        layer = checkpoint.load_layer(0, on_missing_input_scale="dynamic")
    for e, expert in enumerate(experts):
        assert torch.equal(layer.l1_fp4[e], torch.cat((expert.gate.codes, expert.up.codes)))
        assert torch.equal(layer.l1_sf[e].float(), torch.cat((expert.gate.sf, expert.up.sf)).float())
        assert layer.l1_gs[e].tolist() == [expert.gate.gs, expert.up.gs]
        assert torch.equal(layer.l2_fp4[e], expert.down.codes)
        assert layer.l2_gs[e] == expert.down.gs


def test_no_input_scales_are_written_where_there_are_none():
    """A projection without an input scale gets no such tensor, rather than a made-up one."""
    assert not [name for name in expert_tensors(weights(1, scales=False), 0, 0) if "input_scale" in name]


@pytest.mark.parametrize("four_over_six", [False, True])
def test_quantized_experts_are_close_and_share_gate_and_up_scales(four_over_six):
    """Each value is within the e2m1 step of its block; gate and up have one global scale, from their joint maximum."""
    g = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(*shape, generator=g) for shape in ((32, 64), (32, 64), (64, 32)))
    expert = quantize_expert(gate, up * 3, down, four_over_six=four_over_six)
    assert expert.gate.gs == expert.up.gs
    for name, dense in (("gate", gate), ("up", up * 3), ("down", down)):
        part = expert.projection(name)
        decoded = make.decode64(part.codes, part.sf, float(part.gs))
        amax = dense.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).double()
        # Half the widest e2m1 step (1 of 6) of the block's largest value, and the rounding of its scale (2^-4).
        bound = amax * (1 / 6 + 2.0**-4)
        assert ((decoded - dense.double()).unflatten(-1, (-1, 16)).abs() <= bound).all()


def test_experts_whose_matrices_do_not_fit_are_refused():
    """gate, up and down of one expert must be [I, H], [I, H] and [H, I]."""
    good = weights(0)
    with pytest.raises(CheckpointError, match="do not fit together"):
        ExpertWeights(good.gate, good.up, good.gate)


per_expert = st.sampled_from([family for family in FAMILIES if not family.fused])


@settings(max_examples=50, deadline=None)
@given(
    per_expert,
    st.sampled_from(["", "model.", "language_model.model."]),
    st.integers(0, 9999),
    st.integers(0, 9999),
    st.sampled_from(["gate", "up", "down"]),
    st.sampled_from(["weight", "weight_scale_2", "scale", "weight_packed"]),
)
def test_names_parse_back(family, prefix, layer, expert, projection, suffix):
    """Parsing undoes naming, for every family."""
    parsed = parse(family.tensor_name(prefix, layer, expert, projection, suffix))
    assert parsed is not None
    assert (parsed.family, parsed.prefix, parsed.layer, parsed.expert) == (family, prefix, layer, expert)
    assert (parsed.projection, parsed.suffix) == (projection, suffix)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.0.ffn.experts.0.w1.weight",
        "model.layers.0.ffn.shared_experts.w1.weight",
        "model.layers.00.ffn.experts.0.w1.weight",
        "model.layers.0.ffn.experts.01.w1.weight",
        "model.layers.0.ffn.experts.0.w4.weight",
        "model.layers.0.ffn.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.0.w1.weight",
        "model.layers.0.ffn.experts.999999.w1.weight",
        "xmodel.layers.0.ffn.experts.0.w1.weight",
        "model.layers.0.ffn.experts.0.w1.weight\n",
    ],
)
def test_other_names_are_not_routed_experts(name):
    """Other modules, other spellings of a number, and projections of another family are not taken for experts."""
    assert parse(name) is None


def test_fused_names_parse():
    """Transformers' fused tensors are routed experts of their layer, without an expert number."""
    parsed = parse("model.layers.4.mlp.experts.gate_up_proj")
    assert parsed is not None
    assert (parsed.layer, parsed.expert, parsed.projection, parsed.suffix) == (4, None, "gate_up", "")


@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_experts_quantized_in_slabs_are_quantized_as_one(four_over_six, rows):
    """Whatever the number of rows, an expert's bytes are those of its matrices quantized in one piece."""
    g = torch.Generator().manual_seed(rows)
    hidden, inter = 4096, 16 * rows
    gate, up = (torch.randn(inter, hidden, generator=g).bfloat16() for _ in range(2))
    down = torch.randn(hidden, inter, generator=g)
    expert = quantize_expert(gate, up, down, four_over_six=four_over_six)
    both = Nvfp4Tensor.quantize(torch.cat((gate, up)), four_over_six=four_over_six)
    whole = {
        "gate": Nvfp4Tensor(both.codes[:inter], both.sf[:inter], both.gs),
        "up": Nvfp4Tensor(both.codes[inter:], both.sf[inter:], both.gs),
        "down": Nvfp4Tensor.quantize(down, four_over_six=four_over_six),
    }
    for name, expected in whole.items():
        found = expert.projection(name)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.sf.view(torch.uint8), expected.sf.view(torch.uint8))
        assert torch.equal(found.gs, expected.gs)
