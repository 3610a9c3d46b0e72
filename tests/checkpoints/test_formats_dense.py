"""Plain floating-point experts: quantized while they are read, per expert or fused, in any of three dtypes."""

from __future__ import annotations

import pytest
import torch

from dsv4.checkpoints import open_checkpoint
from dsv4.errors import CheckpointError, ConfigError

from . import make

EXPERTS, HIDDEN, INTER = 3, 64, 32
BASE = "model.layers.2.mlp.experts"
GATE_UP, DOWN = f"{BASE}.gate_up_proj", f"{BASE}.down_proj"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
FUSED = pytest.mark.parametrize("fused", [False, True])


def dense(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """One dict a expert: gate, up (larger), down."""
    g = torch.Generator().manual_seed(0)
    return [
        {
            "gate": torch.randn(INTER, HIDDEN, generator=g).to(dtype),
            "up": (3 * torch.randn(INTER, HIDDEN, generator=g)).to(dtype),
            "down": (0.1 * torch.randn(HIDDEN, INTER, generator=g)).to(dtype),
        }
        for _ in range(EXPERTS)
    ]


def tensors_of(experts: list[dict[str, torch.Tensor]], fused: bool) -> dict[str, torch.Tensor]:
    if fused:
        return {
            GATE_UP: torch.stack([torch.cat((parts["gate"], parts["up"])) for parts in experts]),
            DOWN: torch.stack([parts["down"] for parts in experts]),
        }
    tensors: dict[str, torch.Tensor] = {}
    for number, parts in enumerate(experts):
        named = {projection: {"weight": matrix} for projection, matrix in parts.items()}
        tensors |= make.names(named, 2, number, make.QWEN)
    return tensors


@FUSED
@DTYPES
def test_values_are_those_of_modelopt(tmp_path, fused, dtype):
    """Codes, block scales and global scale are ModelOpt's of gate and up together, and of down: the same bytes, except
    where the number to be rounded is within a few fp32 roundings (2^-21) of the middle between two results."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    experts = dense(dtype)
    with open_checkpoint(make.write(tmp_path, tensors_of(experts, fused))) as opened:
        assert (opened.format.name, opened.num_experts) == ("dense", EXPERTS)
        assert str(opened.shape) == f"hidden {HIDDEN}, intermediate {INTER}"
        assert opened.other_tensors() == []
        read = [opened.read_expert(2, number) for number in range(EXPERTS)]
    for parts, weights in zip(experts, read, strict=True):
        joint = torch.cat((parts["gate"], parts["up"])).float()
        ours = [
            (torch.cat((weights.gate.codes, weights.up.codes)), torch.cat((weights.gate.sf, weights.up.sf)), joint),
            (weights.down.codes, weights.down.sf, parts["down"].float()),
        ]
        assert weights.gate.gs == weights.up.gs
        for (codes, sf, values), gs in zip(ours, (weights.gate.gs, weights.down.gs), strict=True):
            quantized, their_sf, their_gs = qtensor.quantize(values.clone(), 16)
            assert gs == their_gs
            wanted = values.double().abs().unflatten(-1, (-1, 16)).amax(-1) / 6 / gs.double()
            tied = ((sf.double() + their_sf.double()) / 2 / wanted - 1).abs() < 2.0**-21
            assert ((sf.double() == their_sf.double()) | tied).all()
            step = sf.double().repeat_interleave(16, -1) * gs.double()
            middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
            near = ((values.double() / step).abs().unsqueeze(-1) / middles - 1).abs().amin(-1) < 2.0**-21
            excused = near | tied.repeat_interleave(16, -1)
            same = codes == quantized._quantized_data
            assert (same | excused.unflatten(-1, (-1, 2)).any(-1)).all()
            assert same.double().mean() > 0.95  # bf16 data has many ties


@FUSED
def test_four_over_six(tmp_path, fused):
    """The option gives another quantization with the smaller squared error; both start from the same file."""
    experts = dense()
    path = make.write(tmp_path, tensors_of(experts, fused))
    errors = []
    for option in (False, True):
        with open_checkpoint(path, four_over_six=option) as opened:
            weights = opened.read_expert(2, 1)
        errors.append(
            sum(
                (make.decode64(part.codes, part.sf, float(part.gs)) - experts[1][name].double()).square().sum().item()
                for name, part in ((name, weights.projection(name)) for name in experts[1])
            )
        )
    # On normal data the choice of two scales is worth a tenth of the squared error.
    assert errors[1] < 0.95 * errors[0]


def test_four_over_six_is_refused_for_quantized_experts(tmp_path):
    """Experts that are NVFP4 already are not quantized again, so the option would have no effect."""
    with pytest.raises(ConfigError, match=r"four_over_six.*found modelopt-nvfp4"):
        open_checkpoint(make.write(tmp_path, make.layer_tensors(0)), four_over_six=True)


@FUSED
def test_missing_input_scales_are_said(tmp_path, fused):
    """There are none in such files: an error where they are needed, a note where another mode was chosen."""
    with open_checkpoint(make.write(tmp_path, tensors_of(dense(), fused))) as opened:
        with pytest.raises(CheckpointError, match="floating-point checkpoints have no input scales"):
            opened.load_layer(2)
        layer = opened.load_layer(2, [2, 0], on_missing_input_scale="dynamic")
    assert layer.experts == (2, 0)
    assert (layer.activation_format, layer.activation_scale) == ("nvfp4", "token")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@FUSED
def test_weights_that_are_not_finite_are_refused(tmp_path, fused, value):
    """A NaN or Inf is named with tensor, expert and position, before it becomes a block of NaN."""
    experts = dense(torch.bfloat16)
    experts[1]["up"][7, 5] = value
    position, name = (f"[{INTER + 7}, 5]", GATE_UP) if fused else ("[7, 5]", f"{BASE}.1.up_proj.weight")
    with (
        open_checkpoint(make.write(tmp_path, tensors_of(experts, fused))) as opened,
        pytest.raises(CheckpointError) as error,
    ):
        opened.load_layer(2, on_missing_input_scale="ignore")
    for part in ("model.safetensors", name, "layer 2, expert 1", str(value), position):
        assert part in str(error.value)


WRONG = {
    "dtype": (torch.zeros(INTER, HIDDEN, dtype=torch.float64), "F64"),
    "dims": (torch.zeros(INTER, HIDDEN, 1), "[out, in]"),
    "columns": (torch.zeros(INTER, HIDDEN - 8), "multiple of 16"),
    "rows": (torch.zeros(2 * INTER, HIDDEN), "[32, 64]"),
    "missing": (None, "missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(tmp_path, case):
    """Another dtype, shape or size than the other projections', or nothing: the tensor is named."""
    tensors = tensors_of(dense(), fused=False)
    replacement, expected = WRONG[case]
    name = f"{BASE}.1.up_proj.weight"
    del tensors[name]
    if replacement is not None:
        tensors[name] = replacement
    with open_checkpoint(make.write(tmp_path, tensors)) as opened, pytest.raises(CheckpointError) as error:
        opened.load_layer(2, on_missing_input_scale="ignore")
    assert name in str(error.value)
    assert expected in str(error.value)


WRONG_FUSED = {
    "no-down": ({DOWN: None}, rf"tensor '{DOWN}' is missing"),
    "no-gate-up": ({GATE_UP: None}, rf"tensor '{GATE_UP}' is missing"),
    "transposed": ({DOWN: torch.zeros(EXPERTS, INTER, HIDDEN)}, rf"{DOWN}.*expected shape \[3, 64, 32\]"),
    "two-dims": ({GATE_UP: torch.zeros(EXPERTS, HIDDEN)}, rf"{GATE_UP}.*expected shape \[E, 2I, H\]"),
    "odd-rows": ({GATE_UP: torch.zeros(EXPERTS, 2 * INTER + 16, HIDDEN)}, rf"{GATE_UP}.*multiples of 16"),
    "dtype": ({DOWN: torch.zeros(EXPERTS, HIDDEN, INTER, dtype=torch.int8)}, rf"{DOWN}.*found I8"),
    "bias": ({f"{GATE_UP}_bias": torch.zeros(EXPERTS, 2 * INTER)}, rf"{GATE_UP}_bias.*not part of this format"),
    "scale": ({f"{DOWN}_scale_inv": torch.zeros(EXPERTS, 2, 1)}, rf"{DOWN}_scale_inv.*not part of this format"),
}


@pytest.mark.parametrize("case", WRONG_FUSED)
def test_wrong_fused_tensors_are_refused(tmp_path, case):
    """Fused tensors that do not fit together, are quantized otherwise, or come with a bias that would be left out."""
    changes, expected = WRONG_FUSED[case]
    tensors = {name: t for name, t in (tensors_of(dense(), fused=True) | changes).items() if t is not None}
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(make.write(tmp_path, tensors))
