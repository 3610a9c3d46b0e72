"""Conversions that must not be done, cannot be finished, or are not what they were: refusals, full disks, --check."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from dsv4.checkpoints import open_checkpoint
from dsv4.checkpoints.conversion import Calibration, convert
from dsv4.errors import CheckpointError, ConfigError, StateError

from . import make
from .convert_sources import LAYERS, convert_freely, failing_after, folder_bytes, overwrite, raw_tensors, write_source


def test_a_source_without_input_scales_needs_a_choice(tmp_path):
    """No scales and no choice: refused, with the choices; nothing is written."""
    source = write_source(tmp_path / "source", "dense")
    with pytest.raises(ConfigError, match=r"no input scales.*--calibrate TEXT.*--activations"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_one_expert_without_a_scale_is_named(tmp_path):
    """Static scales with a hole: an error that names file, tensor and the choices, rather than a target with a hole."""
    source = write_source(tmp_path / "source", "modelopt", shards=1)
    tensors = {name: tensor for name, tensor in make.layer_tensors(0).items() if "experts.3.w2.input" not in name}
    make.write(source, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.ffn\.experts\.3\.w2\.input_scale.*--activations"):
        convert(source, tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.safetensors"))


def test_calibrated_scales_are_written_and_observed_once(tmp_path, monkeypatch):
    """Calibrated scales reach each expert's tensors; a conversion that goes on does not observe them again."""
    source = write_source(tmp_path / "source", "dense", shards=2)
    scales = {
        layer: (tuple(0.5 + layer + e for e in range(make.EXPERTS)), tuple(0.25 + e for e in range(make.EXPERTS)))
        for layer in LAYERS
    }
    calls = []

    def observe(path):
        assert path == source
        calls.append(1)
        return scales

    calibration = Calibration("a text", observe)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(6))
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "target", calibration=calibration)
    convert(source, tmp_path / "target", calibration=calibration, check=True)
    convert(source, tmp_path / "target", calibration=calibration, check=True)
    assert len(calls) == 1
    with open_checkpoint(tmp_path / "target") as checkpoint:
        for layer in LAYERS:
            loaded = checkpoint.load_layer(layer)
            assert loaded.l1_input_scale.tolist() == list(scales[layer][0])
            assert loaded.l2_input_scale.tolist() == list(scales[layer][1])
    with pytest.raises(CheckpointError, match="calibration"):
        convert(source, tmp_path / "target", calibration=Calibration("another text", observe))
    with pytest.raises(ConfigError, match="choose one"):
        convert(source, tmp_path / "target", calibration=calibration, activations="dynamic")


def test_an_error_in_a_process_is_the_error(tmp_path):
    """What goes wrong in another process is raised here as what it was."""
    source = write_source(tmp_path / "source", "modelopt", shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    name = next(n for n, (*_, file) in raw_tensors(source).items() if file == shard.name and n.endswith("scale_2"))
    overwrite(shard, name, b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        convert(source, tmp_path / "target", jobs=2)


def test_check_finds_any_changed_tensor(tmp_path):
    """--check passes on what was written, and names what was changed afterwards: a weight, a copy, a scale, a file."""
    source = write_source(tmp_path / "source", "modelopt", shards=2)
    target = tmp_path / "target"
    assert convert(source, target, check=True).checked
    changes = [
        "model.norm.weight",
        "model.layers.2.ffn.experts.1.w3.weight",
        "model.layers.0.ffn.experts.0.w2.input_scale",
    ]
    for name in changes:
        _, _, data, file = raw_tensors(target)[name]
        changed = data[:-1] + bytes([data[-1] ^ 1])
        overwrite(target / file, name, changed)
        with pytest.raises(CheckpointError, match=f"{file}.*(layer 2, expert 1: up|layer 0, expert 0: down|norm)"):
            convert(source, target, check=True)
        overwrite(target / file, name, data)
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        convert(source, target, check=True)


def test_foreign_folders_are_left_alone(tmp_path):
    """A folder with anything else in it is refused, and nothing in it changes; so are the source and its folders."""
    source = write_source(tmp_path / "source", "modelopt")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    before = folder_bytes(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a new or empty folder.*thesis\.txt"):
        convert(source, target)
    for inside in (source, source / "deeper", tmp_path):
        with pytest.raises(ConfigError, match="must not lie in each other"):
            convert(source, inside)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("other", ["activations", "source"])
def test_an_unfinished_conversion_is_only_continued_as_it_began(other, tmp_path, monkeypatch):
    """With another source or other settings an unfinished target is refused, and stays as it is."""
    source = write_source(tmp_path / "source", "modelopt", shards=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(40))
        with pytest.raises(CheckpointError):
            convert(source, tmp_path / "target")
    before = folder_bytes(tmp_path / "target")
    if other == "source":
        shard = next(source.glob("*.safetensors"))
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=f"unfinished conversion.*differing: {other}"):
        convert(source, tmp_path / "target", activations="dynamic" if other == "activations" else None)
    assert folder_bytes(tmp_path / "target") == before


def test_another_conversion_is_not_continued(tmp_path):
    """A finished target is only accepted for the same source and settings; else it is refused, and stays as it is."""
    source = write_source(tmp_path / "source", "modelopt")
    convert(source, tmp_path / "target")
    before = folder_bytes(tmp_path / "target")
    assert convert(source, tmp_path / "target").complete_before
    with pytest.raises(CheckpointError, match=r"differing: activations"):
        convert(source, tmp_path / "target", activations="dynamic")
    (source / "tokenizer.json").write_text("changed")
    with pytest.raises(CheckpointError, match=r"differing: source"):
        convert(source, tmp_path / "target")
    assert folder_bytes(tmp_path / "target") == before


def test_two_conversions_at_once(tmp_path):
    """A second conversion into the folder of a running one is refused."""
    source = write_source(tmp_path / "source", "modelopt")
    refused = []

    def second(verb: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(StateError, match="another conversion") as caught:
                convert(source, tmp_path / "target")
            refused.append(caught)

    convert(source, tmp_path / "target", progress=second)
    assert refused


def test_other_modules_in_another_packing_are_refused(tmp_path):
    """Other modules in a packing that cannot stand beside ModelOpt's experts: named, and nothing is written."""
    source = write_source(tmp_path / "source", "compressed-tensors", shards=1)
    tensors = make.layer_tensors(0)
    packed = {name.replace(".weight", ".weight_packed"): t for name, t in tensors.items() if name.endswith(".weight")}
    scales = {name: t for name, t in tensors.items() if name.endswith("weight_scale")}
    globals_ = {
        name.replace("weight_scale_2", "weight_global_scale"): t.reshape(1)
        for name, t in tensors.items()
        if name.endswith("weight_scale_2")
    }
    attention = {"model.layers.0.attn.wq.weight_packed": torch.zeros(4, 8, dtype=torch.uint8)}
    make.write(source, packed | scales | globals_ | attention)
    with pytest.raises(CheckpointError, match=r"attn\.wq\.weight_packed.*compressed-tensors"):
        convert(source, tmp_path / "target", activations="dynamic")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("calls", "code"), [(0, errno.ENOSPC), (1, errno.ENOSPC), (5, errno.EIO), (40, errno.ENOSPC), (109, errno.ENOSPC)]
)
def test_a_full_disk_loses_nothing(calls, code, tmp_path, monkeypatch):
    """Writing fails at some point: one sentence, no half files, finished shards stay, and the next run completes."""
    source = write_source(tmp_path / "source", "modelopt", shards=3)
    convert(source, tmp_path / "expected")
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_after(calls, code))
        with pytest.raises(CheckpointError, match="what is finished is kept") as caught:
            convert(source, target)
    assert os.strerror(code) in str(caught.value)
    assert "\n" not in str(caught.value)
    whole = folder_bytes(tmp_path / "expected")
    for name, data in folder_bytes(target).items():
        assert name == ".dsv4-convert.jsonl" or data == whole[name], name
    done = len(list(target.glob("*.safetensors")))
    assert convert(source, target).resumed_shards == done
    assert folder_bytes(target) == whole


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """The space that is needed is known from the headers, and asked for first."""
    source = write_source(tmp_path / "source", "dense")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"still to be written, and 1,000 are free"):
        convert_freely(source, tmp_path / "target")
    assert folder_bytes(tmp_path / "target") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_target(tmp_path):
    """A folder that may not be written to: one sentence that names it."""
    source = write_source(tmp_path / "source", "dense")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"locked/target: cannot be written \(Permission denied\)"):
        convert_freely(source, tmp_path / "locked" / "target")


def test_a_target_below_a_file(tmp_path):
    """A target that cannot be a folder: one sentence that names it."""
    source = write_source(tmp_path / "source", "dense")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "target"):
        with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
            convert_freely(source, target)
