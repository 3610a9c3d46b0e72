"""``dsv4 verify``: right backends pass, wrong ones fail where they are wrong; the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make
from clean_checkpoint import CONFIG, clean
from torch import Tensor
from typer.testing import CliRunner

from dsv4 import backends
from dsv4.backends import Verdict, reference
from dsv4.backends.reference import ReferenceBackend
from dsv4.cli.app import app
from dsv4.ops.activation import clamped_swiglu

MODEL = Path(__file__).parents[2] / "models" / "tiny-deepseek-v4" / "nvfp4"
STAGES = ["gate", "up", "activation", "down", "output"]
ALL_MODES = ["w4a16", "w4a4-static", "w4a4-token"]


def verify(path: Path, *arguments: str):
    return CliRunner().invoke(app, ["verify", str(path), "--device", "cpu", *arguments], env={"DSV4_BACKEND": None})


def document(path: Path, *arguments: str) -> dict:
    return json.loads(verify(path, *arguments, "--json").stdout)


def failing(found: dict) -> dict[str, list[str]]:
    """mode -> stages that failed, of the first layer."""
    layer = found["results"][0]["layer"]
    return {
        entry["mode"]: [name for name in STAGES if not entry["stages"][name]["passed"]]
        for entry in found["results"]
        if entry["layer"] == layer
    }


# Right backends.


def test_the_small_model_passes():
    """By default: first, middle and last layer, three modes, all stages; errors far below the bar but for the last
    rounding to bf16, which is known to cost 1.7e-3."""
    found = document(MODEL)
    assert found["passed"] is True
    assert [(e["layer"], e["mode"]) for e in found["results"]] == [(n, m) for n in (0, 2, 3) for m in ALL_MODES]
    for entry in found["results"]:
        assert entry["backend"] == "reference"
        assert entry["experts"] == list(range(16))
        assert list(entry["stages"]) == STAGES
        assert all(entry["stages"][name]["error"] < 1e-5 for name in STAGES[:4])
        assert 1e-3 < entry["stages"]["output"]["error"] < 2.5e-3
        activation = entry["stages"]["activation"]
        if entry["mode"] == "w4a16":
            assert activation["agreement"] is None
        else:
            assert activation["agreement"] + activation["near_ties"] == 1
            assert activation["agreement"] > 0.999
    result = verify(MODEL, "--layers", "0", "--mode", "w4a16", "--tokens", "8")
    assert result.exit_code == 0
    assert "PASSED" in result.stdout


class Bf16Rows(ReferenceBackend):
    """Hands the rows of GEMM 2 on in bf16, as the contract allows."""

    def _gemm2(self, *arguments):
        return super()._gemm2(*arguments).bfloat16().float()


def test_bf16_rows_are_allowed(monkeypatch):
    """A backend whose slot rows are bf16 passes, and its codes are still told apart from wrong ones."""
    monkeypatch.setattr(backends, "BACKENDS", (Bf16Rows,))
    found = document(MODEL, "--layers", "1")
    assert found["passed"] is True
    for entry in found["results"]:
        assert 1e-3 < entry["stages"]["down"]["error"] < 2.5e-3
    assert all(e["stages"]["activation"]["agreement"] > 0.999 for e in found["results"] if e["mode"] != "w4a16")


def wide_experts(tmp_path: Path) -> Path:
    """I = 80 above H = 32, gate and up with scales of their own, no SwiGLU limit."""
    tensors: dict[str, Tensor] = {}
    for number in range(3):
        tensors |= make.names(make.expert(number, hidden=32, inter=80), 0, number)
    return make.write(tmp_path, tensors, {"num_experts_per_tok": 2})


def test_more_intermediate_than_hidden(tmp_path):
    """An intermediate that is wider than the output is looked at piece by piece."""
    found = document(wide_experts(tmp_path), "--tokens", "32")
    assert found["passed"] is True
    assert found["swiglu_limit"] is None


# Wrong backends.


def swapped(weights):
    return replace(weights, l1_fp4=_swap(weights.l1_fp4), l1_sf=_swap(weights.l1_sf), l1_gs=weights.l1_gs.flip(1))


def _swap(x: Tensor) -> Tensor:
    """Exchange gate's and up's rows."""
    swapped = x.view(torch.uint8).roll(x.shape[1] // 2, dims=1)
    return swapped.view(x.dtype)


def one_scale_for_both(weights):
    return replace(weights, l1_gs=weights.l1_gs[:, :1].expand(-1, 2).contiguous())


def flip(weights, tensor: str, expert: int, rows: slice, column: int):
    """Change the sign of one column of some rows of one expert."""
    fp4 = getattr(weights, tensor).clone()
    fp4[expert, rows, column // 2] ^= 0x08 << (4 * (column % 2))
    return replace(weights, **{tensor: fp4})


def nibbles_swapped(weights):
    return replace(weights, l2_fp4=(weights.l2_fp4 << 4) | (weights.l2_fp4 >> 4))


def subnormals_lost(weights):
    sf = weights.l2_sf.view(torch.uint8)
    return replace(weights, l2_sf=torch.where(sf < 8, 0, sf).view(torch.float8_e4m3fn))


def wrong_pack(change: Callable) -> type[ReferenceBackend]:
    class Wrong(ReferenceBackend):
        def pack(self, weights, into=None):
            return super().pack(change(weights), into)

    return Wrong


class NoClamp(ReferenceBackend):
    def __init__(self, config, device):
        super().__init__(replace(config, swiglu_limit=None), device)


class NoRoutingWeight(ReferenceBackend):
    def run(self, packed, call, scratch, out):
        super().run(packed, replace(call, topk_weights=torch.ones_like(call.topk_weights)), scratch, out)


class FirstChoiceAlone(ReferenceBackend):
    def run(self, packed, call, scratch, out):
        ids = call.topk_ids.clone()
        ids[:, 1:] = -1
        super().run(packed, replace(call, topk_ids=ids), scratch, out)


class ExpertOneOff(ReferenceBackend):
    def run(self, packed, call, scratch, out):
        super().run(packed, replace(call, topk_ids=(call.topk_ids + 1) % self.config.num_experts), scratch, out)


class NotANumber(ReferenceBackend):
    def run(self, packed, call, scratch, out):
        super().run(packed, call, scratch, out)
        out[-1, -1] = torch.nan


class NothingWritten(ReferenceBackend):
    def run(self, packed, call, scratch, out):
        pass


class OneScaleOfGemm2(ReferenceBackend):
    """Static scales of GEMM 2: the mean of all experts' for each."""

    def run(self, packed, call, scratch, out):
        scales = call.input_scales
        if scales is not None:
            scales = replace(scales, l2=scales.l2.mean().expand_as(scales.l2))
        super().run(packed, replace(call, input_scales=scales), scratch, out)


GATE, UP = slice(0, 64), slice(64, 128)
IN_GEMM_1 = ["gate", "up", "activation", "output"]
WRONG: dict[str, tuple[type[ReferenceBackend], list[str]]] = {
    "gate and up swapped": (wrong_pack(swapped), IN_GEMM_1),
    "gate's scale doubled": (wrong_pack(lambda w: replace(w, l1_gs=w.l1_gs * torch.tensor([2.0, 1.0]))), STAGES),
    "down's scale doubled": (wrong_pack(lambda w: replace(w, l2_gs=2 * w.l2_gs)), STAGES),
    "down's nibbles swapped": (wrong_pack(nibbles_swapped), STAGES),
    "a column of gate": (wrong_pack(lambda w: flip(w, "l1_fp4", 5, GATE, 101)), ["gate", "activation", "output"]),
    "a column of up": (wrong_pack(lambda w: flip(w, "l1_fp4", 5, UP, 100)), ["up", "activation", "output"]),
    "a column of down": (wrong_pack(lambda w: flip(w, "l2_fp4", 5, slice(None), 6)), STAGES),
    "one scale for gate and up": (wrong_pack(one_scale_for_both), ["gate", "up"]),
    "no routing weight": (NoRoutingWeight, ["output"]),
    "first choice alone": (FirstChoiceAlone, ["output"]),
    "one NaN": (NotANumber, ["down", "output"]),
    "nothing written": (NothingWritten, STAGES),
    "another expert": (ExpertOneOff, STAGES),
}


@pytest.mark.parametrize(("backend", "stages"), WRONG.values(), ids=WRONG)
def test_wrong_backends_fail(monkeypatch, backend, stages):
    """Every mode catches a wrong backend, in the stages where it is wrong and in no other; the exit status says so."""
    monkeypatch.setattr(backends, "BACKENDS", (backend,))
    result = verify(MODEL, "--layers", "1", "--tokens", "32", "--json")
    found = json.loads(result.stdout)
    assert failing(found) == {mode: stages for mode in ALL_MODES}  # noqa: C420
    assert [entry["passed"] for entry in found["results"]] == [False] * 3
    assert found["passed"] is False
    assert result.exit_code == 1


def test_a_forgotten_clamp(monkeypatch):
    """A backend without the clamp fails: in gate and up where activations are as large as they come, at least somewhere
    where static scales cut them."""
    monkeypatch.setattr(backends, "BACKENDS", (NoClamp,))
    found = failing(document(MODEL, "--layers", "1"))
    assert found["w4a16"] == found["w4a4-token"] == IN_GEMM_1
    assert {"activation", "output"} <= set(found["w4a4-static"]) <= set(IN_GEMM_1)


def test_the_expert_that_is_wrong_is_named(monkeypatch):
    """The table's remarks and the document name the expert whose gate is wrong."""
    monkeypatch.setattr(backends, "BACKENDS", WRONG["a column of gate"][:1])
    assert document(MODEL, "--layers", "1")["results"][0]["stages"]["gate"]["expert"] == 5
    text = verify(MODEL, "--layers", "1").stdout
    assert "layer 1, W4A4 token, gate: " in text
    assert "worst for expert 5" in text
    assert "FAILED" in text


def test_only_the_wrong_mode_fails(monkeypatch):
    """A mistake in static scales is none of the other modes'."""
    monkeypatch.setattr(backends, "BACKENDS", (OneScaleOfGemm2,))
    verdicts = {entry["mode"]: entry["passed"] for entry in document(MODEL, "--layers", "1")["results"]}
    assert verdicts == {"w4a16": True, "w4a4-static": False, "w4a4-token": True}


def test_real_weights_of_down_matter(tmp_path, monkeypatch):
    """A backend that drops subnormal block scales of down fails where the checkpoint has such, in GEMM 2 alone."""
    tensors = clean()
    for name in [n for n in tensors if n.endswith("w2.weight_scale")]:
        tensors[name].view(torch.uint8)[::2] = 0x07
        tensors[name].view(torch.uint8)[1::2] = 0x08
    make.write(tmp_path, tensors, CONFIG)
    assert document(tmp_path)["passed"] is True
    monkeypatch.setattr(backends, "BACKENDS", (wrong_pack(subnormals_lost),))
    assert failing(document(tmp_path)) == {mode: ["down", "output"] for mode in ALL_MODES}


@pytest.mark.parametrize(("part", "stages"), [("gate", ["gate"]), ("up", ["up"])])
def test_each_side_of_the_clamp(monkeypatch, part, stages):
    """A clamp that is forgotten for one of the two alone is caught, and its stage named."""

    def half_clamped(gate, up, limit, weight=None):
        if part == "gate":
            return clamped_swiglu(gate, up.clamp(-limit, limit), None, weight)
        return clamped_swiglu(gate.clamp(max=limit), up, None, weight)

    monkeypatch.setattr(reference, "clamped_swiglu", half_clamped)
    for found in failing(document(MODEL, "--layers", "1", "--mode", "w4a16,w4a4-token")).values():
        assert [name for name in found if name in ("gate", "up", "down")] == stages


def test_early_rounding_is_caught(monkeypatch):
    """gate and up that are rounded to bf16 before SwiGLU cost 2.4e-2 in W4A4: above the bar."""

    def rounded(gate, up, limit, weight=None):
        return clamped_swiglu(gate.bfloat16().float(), up.bfloat16().float(), limit, weight)

    monkeypatch.setattr(reference, "clamped_swiglu", rounded)
    for found in failing(document(MODEL, "--layers", "1", "--mode", "w4a4-static,w4a4-token")).values():
        assert "activation" in found


def test_a_backend_that_raises(tmp_path, monkeypatch):
    """An exception inside a backend becomes part of the report instead of preventing it."""

    class Raises(ReferenceBackend):
        def run(self, packed, call, scratch, out):
            if self.config.top_k > 1:
                raise RuntimeError("illegal\ninstruction")
            super().run(packed, call, scratch, out)

    monkeypatch.setattr(backends, "BACKENDS", (Raises,))
    result = verify(MODEL, "--layers", "1", "--report", str(tmp_path / "report.txt"))
    assert result.exit_code == 1
    assert "output: RuntimeError: illegal instruction" in (tmp_path / "report.txt").read_text()
    (entry, *_) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert entry["stages"]["output"]["problem"] == "RuntimeError: illegal instruction"
    assert [entry["stages"][name]["passed"] for name in STAGES] == [True] * 4 + [False]


class SomeModes(ReferenceBackend):
    """Multiplies quantized activations alone."""

    name = "some-modes"

    @classmethod
    def explain(cls, config, device):
        return Verdict(config.quantizes_activations, "multiplies codes by codes")


def test_modes_that_a_backend_declines_are_skipped(monkeypatch):
    """One asked for by name is verified in the modes it has; the others carry its reason. Without any it is refused."""
    monkeypatch.setattr(backends, "BACKENDS", (ReferenceBackend, SomeModes))
    found = document(MODEL, "--layers", "1", "--backend", "some-modes")
    w4a16, *others = found["results"]
    assert w4a16["skipped"] == "some-modes: multiplies codes by codes"
    assert [entry["backend"] for entry in others] == ["some-modes"] * len(others)
    assert found["passed"] is True
    result = verify(MODEL, "--layers", "1", "--backend", "some-modes", "--mode", "w4a16")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: backend=some-modes cannot be used on cpu")


@pytest.mark.parametrize("name", ["blackwell", "library"])
def test_without_the_chip_one_line_says_so(name):
    """What a kernel for another chip answers to anybody else."""
    result = verify(MODEL, "--backend", name, "--device", "cpu")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: backend={name} cannot be used on cpu: ")
    assert "compute capability 10.0" in line


def test_library_numerics_are_shown_and_held_to_their_own_bar(monkeypatch):
    """Errors above the contract's bar and below the library's pass, labelled, with the largest of them; the same errors
    without the label do not."""

    class Noisy(ReferenceBackend):
        name = "noisy"
        library_numerics = True

        def _gemm2(self, *arguments):
            rows = super()._gemm2(*arguments)
            return rows * (1 + 1e-2 * (torch.arange(rows.shape[1]) % 2))

    monkeypatch.setattr(backends, "BACKENDS", (Noisy,))
    result = verify(MODEL, "--layers", "1", "--mode", "w4a4-token")
    assert result.exit_code == 0
    assert "noisy has library numerics: at most" in result.stdout.replace("\n", " ")
    assert "0.05 for library numerics" in result.stdout.replace("\n", " ")
    (entry,) = document(MODEL, "--layers", "1", "--mode", "w4a4-token")["results"]
    assert (entry["numerics"], entry["bar"]) == ("library", 0.05)
    assert 3e-3 < entry["stages"]["down"]["error"] < 0.05
    monkeypatch.setattr(Noisy, "library_numerics", False)
    assert verify(MODEL, "--layers", "1", "--mode", "w4a4-token").exit_code == 1


# The command.


@pytest.mark.parametrize("name", ["report.txt", "report.json"])
def test_report(tmp_path, name):
    """--report writes the text and the document that --json prints, whichever of the two is named, and nothing else."""
    result = verify(MODEL, "--layers", "1", "--report", str(tmp_path / "made" / name), "--json")
    assert result.exit_code == 0
    text, numbers = tmp_path / "made" / "report.txt", tmp_path / "made" / "report.json"
    assert sorted(text.parent.iterdir()) == [numbers, text]
    found = json.loads(numbers.read_text())
    assert found == json.loads(result.stdout)
    report = text.read_text()
    assert all(part in report for part in ("PASSED", "torch " + torch.__version__, "modelopt-nvfp4", "reference: "))
    assert found["device_name"] in report
    assert "\x1b" not in report


def test_no_input_scales(tmp_path):
    """Without input scales the static mode is skipped and says so; asked for alone, there is nothing to verify."""
    tensors = {name: t for name, t in clean().items() if not name.endswith("input_scale")}
    make.write(tmp_path, tensors, CONFIG)
    found = document(tmp_path, "--layers", "1")
    assert found["passed"] is True
    assert [entry.get("skipped") for entry in found["results"]] == [
        None,
        "not every expert has a usable input scale",
        None,
    ]
    text = verify(tmp_path, "--layers", "1").stdout
    assert "W4A4 static: skipped" in text
    result = verify(tmp_path, "--mode", "w4a4-static")
    assert result.exit_code == 1
    assert "nothing was verified" in result.stderr


def test_some_experts(monkeypatch):
    """--experts takes that many, evenly spread, and compares their weights, not their neighbours'."""
    found = document(MODEL, "--layers", "2", "--experts", "3")
    assert [entry["experts"] for entry in found["results"]] == [[0, 5, 10]] * 3
    assert found["passed"] is True
    monkeypatch.setattr(backends, "BACKENDS", (wrong_pack(lambda w: flip(w, "l1_fp4", 2, GATE, 101)),))
    assert document(MODEL, "--layers", "2", "--experts", "3")["results"][0]["stages"]["gate"]["expert"] == 10


def test_few_tokens():
    """One token is enough."""
    found = document(MODEL, "--layers", "0", "--tokens", "1", "--experts", "0")
    assert found["passed"] is True
    assert len(found["results"][0]["experts"]) == 16


def test_a_damaged_expert(tmp_path):
    """A checkpoint that must not be computed with is one line and exit status 1, with no report."""
    tensors = clean()
    tensors["model.layers.1.ffn.experts.2.w2.weight_scale_2"] = torch.tensor(0.0)
    make.write(tmp_path, tensors, CONFIG)
    result = verify(tmp_path, "--report", str(tmp_path / "report.txt"))
    assert result.exit_code == 1
    assert "w2.weight_scale_2" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "report.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--mode", "w4a4-tensor"], 2),
        (["--tokens", "0"], 2),
        (["--experts", "-1"], 2),
        (["--layers", "9"], 1),
        (["--device", "toaster"], 1),
        (["--backend", "abacus"], 1),
        (["--report", "."], 1),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments, code):
    """Wrong usage exits with 2, an error with 1, each in one line."""
    result = verify(MODEL, *arguments)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [b.name for b in backends.BACKENDS])
def test_on_cuda(tmp_path, backend):
    """Every backend that the GPU can run passes on the small model, and on a wide, unclamped layer."""
    for path in (MODEL, wide_experts(tmp_path)):
        result = CliRunner().invoke(app, ["verify", str(path), "--device", "cuda", "--backend", backend, "--json"])
        if "cannot be used" in result.stderr:
            pytest.skip(result.stderr)
        assert json.loads(result.stdout)["passed"] is True
