"""``dsv4 inspect``: its numbers, its findings (each provoked by planting exactly that defect), its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import make
from clean_checkpoint import CONFIG, Tensors, clean
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from dsv4.checkpoints import Checkpoint
from dsv4.checkpoints.base import RecodeReport
from dsv4.cli.app import app

MODEL = Path(__file__).parents[2] / "models" / "tiny-deepseek-v4" / "nvfp4"


def inspect(*arguments: str | Path):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def document(*arguments: str | Path) -> dict:
    return json.loads(inspect(*arguments, "--json").stdout)


def kinds(found: dict) -> set[tuple[str, str]]:
    return {(finding["severity"], finding["kind"]) for finding in found["findings"]}


@pytest.mark.parametrize("arguments", [(), ("--headers-only",), ("--layers", "1")], ids=str)
def test_nothing_wrong(tmp_path, arguments):
    """A clean checkpoint has no findings, and exits with 0 under --strict too."""
    make.write(tmp_path, clean(), CONFIG)
    assert document(tmp_path, *arguments)["findings"] == []
    result = inspect(tmp_path, *arguments, "--strict")
    assert result.exit_code == 0
    assert "Nothing looks wrong" in result.stdout


# Defects.

W1, W2, W3 = (f"model.layers.1.ffn.experts.2.{name}" for name in ("w1", "w2", "w3"))


def put(**values: object) -> Callable[[Tensors], None]:
    """Replace tensors of layer 1, expert 2: ``w1__input_scale=0.0``; None removes."""

    def plant(tensors: Tensors) -> None:
        for key, value in values.items():
            name = f"model.layers.1.ffn.experts.2.{key.replace('__', '.')}"
            del tensors[name]
            if value is not None:
                tensors[name] = value if isinstance(value, Tensor) else torch.tensor(value)

    return plant


def everywhere(suffix: str, value: float | None, layers: tuple[int, ...] = (0, 1)) -> Callable[[Tensors], None]:
    """Replace a scalar of every expert and projection in ``layers``; None removes."""

    def plant(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(suffix) and int(n.split(".")[2]) in layers]:
            del tensors[name]
            if value is not None:
                tensors[name] = torch.tensor(value)

    return plant


def block_bytes(byte: int, count: int, projection: str = "w2") -> Callable[[Tensors], None]:
    """Set the first ``count`` block scales of one matrix of 128 blocks."""

    def plant(tensors: Tensors) -> None:
        sf = tensors[f"model.layers.1.ffn.experts.2.{projection}.weight_scale"].view(torch.uint8)
        sf.view(-1)[:count] = byte

    return plant


def remove_layer(tensors: Tensors) -> None:
    """Layers 0 and 1 become layers 0 and 2."""
    for name in [n for n in tensors if ".layers.1." in n]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors.pop(name)


def reciprocal_input_scales(tensors: Tensors) -> None:
    """Those of down in layer 1, where all of an expert's would differ from gate's and up's in layer 0 as well."""
    for expert in range(4):
        tensors[f"model.layers.1.ffn.experts.{expert}.w2.input_scale"] = torch.tensor(100.0 / (1 + expert))


@dataclass(frozen=True)
class Defect:
    """What is planted, and the one finding that it must give: its kind and parts of its sentence."""

    plant: Callable[[Tensors], None]
    severity: str
    kind: str
    says: tuple[str, ...]
    headers: bool = False
    config: dict | None = None


HALF_SF = torch.full((32, 2), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
FP8 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
DEFECTS = {
    "NaN block scale": Defect(block_bytes(0x7F, 1), "problem", "unreadable", (f"{W2}.weight_scale", "nan")),
    "zero global scale": Defect(
        put(w1__weight_scale_2=0.0), "problem", "unreadable", (f"{W1}.weight_scale_2", "positive")
    ),
    "missing tensor": Defect(
        put(w3__weight_scale=None), "problem", "unreadable", (f"{W3}.weight_scale", "missing"), headers=True
    ),
    "wrong shape": Defect(
        put(w3__weight_scale=HALF_SF), "problem", "unreadable", (f"{W3}.weight_scale", "[32, 2]"), headers=True
    ),
    "gap": Defect(remove_layer, "warning", "missing-layers", ("[1]",), headers=True),
    "short": Defect(
        lambda t: None, "warning", "missing-layers", ("[2]", "(3)"), True, CONFIG | {"num_hidden_layers": 3}
    ),
    "wrong configuration": Defect(
        lambda t: None, "warning", "configuration", ("'FP8'", "modelopt"), True, CONFIG | FP8
    ),
    "no configuration": Defect(lambda t: None, "note", "no-config", ("config.json",), True, {}),
    "one input scale missing": Defect(
        put(w2__input_scale=None), "warning", "missing-input-scales", ("1 expert", "layer 1, expert 2"), headers=True
    ),
    "no input scales": Defect(
        everywhere("input_scale", None), "warning", "missing-input-scales", ("no expert", "W4A16"), headers=True
    ),
    "zero input scale": Defect(
        put(w2__input_scale=0.0), "warning", "unusable-input-scales", (f"{W2}.input_scale", "found 0.0")
    ),
    "NaN input scale": Defect(
        put(w2__input_scale=math.nan), "warning", "unusable-input-scales", (f"{W2}.input_scale", "found nan")
    ),
    "Inf input scale": Defect(
        put(w2__input_scale=math.inf), "warning", "unusable-input-scales", (f"{W2}.input_scale", "found inf")
    ),
    "negative input scale": Defect(
        put(w2__input_scale=-0.5), "warning", "unusable-input-scales", (f"{W2}.input_scale", "found -0.5")
    ),
    "all ones": Defect(
        everywhere("input_scale", 1.0), "warning", "placeholder-input-scales", ("gate 1, up 1, down 1", "placeholder")
    ),
    "one constant": Defect(
        everywhere("w2.input_scale", 0.02), "warning", "placeholder-input-scales", ("(down 0.02)", "placeholder")
    ),
    "reciprocal input scales": Defect(
        reciprocal_input_scales,
        "warning",
        "large-input-scales",
        ("4 (", "100 of down", "layer 1, expert 0", "reciprocal"),
    ),
    "uneven input scales": Defect(
        put(w2__input_scale=1e-4), "warning", "uneven-input-scales", ("410 times", "layer 1", "down")
    ),
    "gate and up input scales": Defect(
        put(w1__input_scale=0.02), "warning", "gate-up-input-scales", ("1 expert", "layer 1, expert 2")
    ),
    "gate and up global scales": Defect(
        put(w3__weight_scale_2=1e-3), "warning", "gate-up-global-scales", ("1 expert", "3 times", "layer 1, expert 2")
    ),
    "saturated": Defect(block_bytes(0x7E, 64), "warning", "saturated-blocks", ("12.50%", "layer 1, down", "448")),
    "subnormal": Defect(block_bytes(0x07, 16), "warning", "subnormal-blocks", ("3.12%", "layer 1, down")),
    "zero blocks": Defect(block_bytes(0x00, 16), "warning", "zero-blocks", ("3.12%", "layer 1, down")),
    "zero expert": Defect(
        put(w2__weight=torch.full((64, 16), 0x80, dtype=torch.uint8)),
        "warning",
        "zero-experts",
        ("zero: 1 ", "layer 1, expert 2, down"),
    ),
    "reciprocal global scale": Defect(
        put(w2__weight_scale_2=333.0), "warning", "large-weights", ("layer 1, expert 2, down", "reciprocal")
    ),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_each_defect_is_found(tmp_path, defect):
    """A planted defect gives its finding and no other, in a sentence that says where; the exit status follows."""
    tensors = clean()
    defect.plant(tensors)
    config = CONFIG if defect.config is None else defect.config
    if ".layers.2." in str(list(tensors)):
        config = config | {"num_hidden_layers": 3}
    make.write(tmp_path, tensors, config or None)
    found = document(tmp_path)
    assert kinds(found) == {(defect.severity, defect.kind)}
    (finding,) = found["findings"]
    assert [part for part in defect.says if part not in finding["message"]] == []
    result = inspect(tmp_path)
    assert " ".join(finding["message"].split()) in " ".join(result.stdout.split())
    assert result.exit_code == (1 if defect.severity == "problem" else 0)
    assert inspect(tmp_path, "--strict").exit_code == (0 if defect.severity == "note" else 1)
    from_headers = document(tmp_path, "--headers-only")["findings"]
    assert from_headers == (found["findings"] if defect.headers else [])


def test_findings_are_limited_to_the_layers_asked_for(tmp_path):
    """A defect in layer 1 is no finding about layer 0."""
    tensors = clean()
    put(w2__input_scale=0.0, w1__weight_scale_2=0.0)(tensors)
    make.write(tmp_path, tensors, CONFIG)
    assert document(tmp_path, "--layers", "0")["findings"] == []


def test_shared_input_scales_are_legitimate(tmp_path):
    """Experts of a layer that were calibrated together, with another value in every layer, are no placeholder."""
    tensors = clean()
    for layer in (0, 1):
        everywhere("input_scale", 0.01 + 0.001 * layer, (layer,))(tensors)
    make.write(tmp_path, tensors, CONFIG)
    assert document(tmp_path)["findings"] == []


def test_powers_of_two_are_exact(tmp_path):
    """Subnormal block scales are no finding where all scales are powers of two, as a cast from MXFP4 leaves them."""
    tensors = clean()
    powers = torch.tensor([0x01, 0x02, 0x04, *range(0x08, 0x7F, 8)], dtype=torch.uint8)
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        sf = powers[torch.arange(tensors[name].numel()) % len(powers)].view(tensors[name].shape)
        tensors[name] = sf.view(torch.float8_e4m3fn)
    make.write(tmp_path, tensors, CONFIG)
    found = document(tmp_path)
    assert found["findings"] == []
    assert found["layers"][0]["projections"]["gate"]["subnormal_blocks"] > 0


def test_many_problems(tmp_path):
    """Twenty problems are printed and the rest counted; the document has them all, each with its layer."""
    tensors = {name: tensor for layer in range(7) for name, tensor in make.layer_tensors(layer).items()}
    for name in [n for n in tensors if n.endswith("w1.weight_scale_2") and ".experts.0." not in n]:
        tensors[name] = torch.tensor(math.nan)
    make.write(tmp_path, tensors, CONFIG | {"num_hidden_layers": 7})
    problems = [f for f in document(tmp_path)["findings"] if f["severity"] == "problem"]
    assert [f["layers"] for f in problems] == [[layer] for layer in range(7) for _ in range(3)]
    text = inspect(tmp_path).stdout
    assert text.count("problem: ") == 20
    assert "and 1 more" in text


@pytest.mark.parametrize("requantized", [0, 3])
def test_casts_are_summed(tmp_path, monkeypatch, requantized):
    """Readers' reports of a cast are added over all experts; blocks that were rounded are a warning."""
    make.write(tmp_path, clean(), CONFIG)
    original = Checkpoint.read_expert

    def read(self, layer, expert, device="cpu"):
        report = RecodeReport(100, 90, 7, requantized if expert == 1 else 0)
        return replace(original(self, layer, expert, device), recoded=report)

    monkeypatch.setattr(Checkpoint, "read_expert", read)
    found = document(tmp_path)
    assert found["recoded"] == {"blocks": 800, "exact": 720, "shifted": 56, "requantized": 2 * requantized}
    assert kinds(found) == ({("warning", "requantized-blocks")} if requantized else set())
    if requantized:
        assert "6 of 800" in found["findings"][0]["message"]


def test_floating_point_experts():
    """A format without input scales has a note and no warning; what is counted is what it is quantized to."""
    found = document(MODEL.parent / "bf16")
    assert kinds(found) == {("note", "no-input-scales")}
    packed = document(MODEL)
    for ours, theirs in zip(found["layers"], packed["layers"], strict=True):
        assert ours["projections"] == theirs["projections"]


@pytest.mark.parametrize("chosen", ["weight-only", "dynamic"])
def test_no_input_scales_by_choice(tmp_path, chosen):
    """What the configuration says is missing on purpose is a note."""
    tensors = clean()
    everywhere("input_scale", None)(tensors)
    make.write(tmp_path, tensors, CONFIG | {"quantization_config": {"moe_activations": chosen}})
    for arguments in ((), ("--headers-only",)):
        assert kinds(document(tmp_path, *arguments)) == {("note", "no-input-scales")}


# Numbers.


def test_numbers_of_the_small_model():
    """Every count, range and size equals what numpy counts in the tensors themselves."""
    found = document(MODEL)
    tensors = load_file(MODEL / "model.safetensors")
    assert found["format"] == "modelopt-nvfp4"
    assert (found["num_experts"], found["hidden_size"], found["intermediate_size"]) == (16, 128, 64)
    assert found["bytes"] == (MODEL / "model.safetensors").stat().st_size
    experts = {n: t for n, t in tensors.items() if ".experts." in n and "shared" not in n}
    assert found["expert_tensors"]["count"] == len(experts)
    assert found["other_tensors"]["count"] == len(tensors) - len(experts)
    for part, names in (("expert_tensors", experts), ("other_tensors", tensors.keys() - experts.keys())):
        stored = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        assert sum(found[part]["bytes_by_dtype"].values()) == stored
    for layer in found["layers"]:
        for name, short in (("gate", "w1"), ("up", "w3"), ("down", "w2")):

            def all_of(suffix: str, short: str = short, number: int = layer["layer"]) -> np.ndarray:
                start = f"layers.{number}.ffn.experts."
                picked = [t for n, t in sorted(experts.items()) if start in n and n.endswith(f".{short}.{suffix}")]
                assert len(picked) == 16
                return np.stack([oracle.as_numpy(t) for t in picked])

            matrix = layer["projections"][name]
            codes, sf = oracle.unpack(all_of("weight")), oracle.e4m3_decode(all_of("weight_scale"))
            assert matrix["codes"] == np.bincount(codes.ravel(), minlength=16).tolist()
            assert matrix["blocks"] == sf.size
            assert matrix["saturated_blocks"] == (sf == 448).sum()
            assert matrix["subnormal_blocks"] == ((sf > 0) & (sf < 2**-6)).sum()
            assert matrix["zero_blocks"] == (sf == 0).sum()
            assert matrix["block_scale_range"] == [sf[sf > 0].min(), sf.max()]
            gs, scales = all_of("weight_scale_2"), all_of("input_scale")
            assert matrix["global_scale_range"] == [gs.min(), gs.max()]
            assert layer["input_scales"][name]["range"] == [scales.min(), scales.max()]


def test_block_scales_of_every_byte(tmp_path):
    """Every legal byte is counted under its power of two; zeros, subnormals and 448 apart."""
    tensors = clean()
    name = "model.layers.0.ffn.experts.0.w2.weight_scale"
    every = torch.arange(128, dtype=torch.uint8)
    every[0x7F] = 0x80  # minus zero, where NaN would be
    tensors[name] = every.view(64, 2).view(torch.float8_e4m3fn)
    for other in range(1, 4):
        tensors[name.replace("experts.0", f"experts.{other}")] = torch.ones(64, 2).to(torch.float8_e4m3fn)
    make.write(tmp_path, tensors, CONFIG)
    matrix = document(tmp_path, "--layers", "0")["layers"][0]["projections"]["down"]
    values = oracle.E4M3[1:0x7F]
    want = {str(power): int(((values >= 2.0**power) & (values < 2.0 ** (power + 1))).sum()) for power in range(-9, 9)}
    want["0"] += 3 * 128
    assert matrix["blocks_by_power_of_two"] == want
    assert (matrix["zero_blocks"], matrix["subnormal_blocks"], matrix["saturated_blocks"]) == (2, 7, 1)
    assert matrix["block_scale_range"] == [2.0**-9, 448]


def test_gate_up_ratio(tmp_path):
    """The number of experts whose gate and up differ, and the largest ratio, whichever is larger."""
    tensors = clean()
    put(w1__weight_scale_2=3e-3 / 8)(tensors)
    tensors["model.layers.1.ffn.experts.0.w3.weight_scale_2"] = torch.tensor(2e-3)
    make.write(tmp_path, tensors, CONFIG)
    layers = document(tmp_path)["layers"]
    assert [layer["gate_up_differing"] for layer in layers] == [0, 2]
    assert layers[1]["gate_up_largest_ratio"] == pytest.approx(8, rel=1e-6)


# The command.


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "5", "0-2", "1-0", "0,,1"])
def test_layers_that_do_not_exist(tmp_path, text):
    """A list that is no list, or names a layer without experts, is refused in one line."""
    make.write(tmp_path, clean(), CONFIG)
    result = inspect(tmp_path, f"--layers={text}")
    assert result.exit_code == 1
    assert "--layers" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_layers_and_ranges(tmp_path):
    """Numbers and ranges in any order, each layer once."""
    tensors = {name: tensor for layer in range(5) for name, tensor in make.layer_tensors(layer).items()}
    make.write(tmp_path, tensors)
    found = document(tmp_path, "--headers-only", "--layers", "3-4,0,4")
    assert [layer["layer"] for layer in found["layers"]] == [3, 4, 0]


def test_picture(tmp_path):
    """--plot makes a picture of its name and nothing else, for damaged experts too."""
    pixels = pytest.importorskip("matplotlib.image")
    tensors = clean()
    everywhere("weight_scale_2", math.nan, (1,))(tensors)
    make.write(tmp_path / "checkpoint", tensors, CONFIG)
    picture = tmp_path / "made" / "histograms.png"
    result = inspect(tmp_path / "checkpoint", "--plot", picture)
    assert result.exit_code == 1
    assert f"written: {picture}" in result.stdout
    assert list(picture.parent.iterdir()) == [picture]
    assert pixels.imread(picture)[..., :3].std() > 0.05


def test_picture_of_no_values(tmp_path):
    """Histograms of values that are not to be read are a command line that makes no sense."""
    make.write(tmp_path, clean(), CONFIG)
    result = inspect(tmp_path, "--headers-only", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert not (tmp_path / "x.png").exists()


def test_no_checkpoint(tmp_path):
    """What is no checkpoint is one line on stderr and exit status 1, as JSON too."""
    result = inspect(tmp_path, "--json")
    assert result.exit_code == 1
    assert "no .safetensors file" in json.loads(result.stdout)["error"]
