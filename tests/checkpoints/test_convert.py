"""Conversion to ModelOpt's layout: what passes through, what is converted, what the configuration says."""

from __future__ import annotations

import errno
import json
import math
import os
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors import safe_open

from dsv4.checkpoints import open_checkpoint
from dsv4.checkpoints.conversion import Calibration, convert
from dsv4.checkpoints.dense import quantize_expert
from dsv4.errors import CheckpointError, ConfigError, StateError

from . import make
from .convert_sources import (
    FP8_SECTION,
    KINDS,
    LAYERS,
    dense_matrices,
    folder_bytes,
    other_tensors,
    raw_tensors,
    write_source,
)

STATIC = ("modelopt", "compressed-tensors")


def run(source, target, kind: str = "", **options):
    if kind not in STATIC and "calibration" not in options:
        options.setdefault("activations", "dynamic")
    return convert(source, target, **options)


def decoded(target, layer: int, expert: int, projection: str, names=make.DEEPSEEK) -> torch.Tensor:
    """float64 values of one projection in the target: safetensors' reading, the tests' own decoder."""
    block, projections = names
    start = f"model.layers.{layer}.{block}.experts.{expert}.{projections[projection]}"
    parts = {}
    for file in target.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for suffix in ("weight", "weight_scale", "weight_scale_2"):
                if f"{start}.{suffix}" in tensors.keys():  # noqa: SIM118
                    parts[suffix] = tensors.get_tensor(f"{start}.{suffix}")
    return make.decode_parts(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_decode_to_what_the_source_decodes_to(kind, tmp_path):
    """Every format: each projection's float64 values in the target are those that the source's reader gives."""
    source = write_source(tmp_path / "source", kind)
    run(source, tmp_path / "target", kind)
    names = make.QWEN if kind == "dense-fused" else make.DEEPSEEK
    with open_checkpoint(source) as checkpoint:
        for layer in LAYERS:
            for expert in range(make.EXPERTS):
                weights = checkpoint.read_expert(layer, expert)
                for projection in ("gate", "up", "down"):
                    expected = weights.projection(projection).dequantize(torch.float64)
                    assert torch.equal(decoded(tmp_path / "target", layer, expert, projection, names), expected)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
def test_input_scales_are_kept(kind, tmp_path):
    """A source with input scales gives a target with the same: in its tensors, and through the reader."""
    run(write_source(tmp_path / "source", kind), tmp_path / "target", kind)
    with open_checkpoint(tmp_path / "target") as checkpoint:
        layer = checkpoint.load_layer(2)
    assert layer.activation_scale == "static"
    expected = [make.expert(200 + e) for e in range(make.EXPERTS)]
    # compressed-tensors stores reciprocals: two fp32 roundings, of half a unit in the last place each
    tolerance = {"modelopt": 0.0, "compressed-tensors": 2.0**-23}[kind]
    for found, projection in ((layer.l1_input_scale, "gate"), (layer.l2_input_scale, "down")):
        scales = torch.stack([parts[projection]["input_scale"] for parts in expected])
        torch.testing.assert_close(found, scales, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_all_else_passes_through_byte_for_byte(kind, shards, tmp_path):
    """Other tensors keep name, dtype, shape, bytes and shard; other files their bytes; shards their metadata."""
    fp8 = kind == "mxfp4"
    source = write_source(tmp_path / "source", kind, shards=shards, fp8=fp8)
    target = tmp_path / "target"
    report = run(source, target, kind)
    before, after = raw_tensors(source), raw_tensors(target)
    for name in other_tensors(fp8=fp8):
        assert after[name] == before[name], name
    assert report.passed_tensors == len(other_tensors(fp8=fp8))
    assert report.passed_bytes == sum(len(before[name][2]) for name in other_tensors(fp8=fp8))
    for name in ("tokenizer.json", "encoding/template.py", "leftover.safetensors.bak"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert set(report.files) == {"tokenizer.json", "encoding/template.py", "leftover.safetensors.bak"}
    assert not (target / ".hidden").exists()
    assert {file.name for file in target.glob("*.safetensors")} == {f.name for f in source.glob("*.safetensors")}
    for file in target.glob("*.safetensors"):
        with safe_open(file, framework="pt") as a, safe_open(source / file.name, framework="pt") as b:
            assert a.metadata() == b.metadata()


def test_counts(tmp_path):
    """Experts, their bytes before and after, and re-coded blocks: each counts once, though experts span shards."""
    source = write_source(tmp_path / "source", "mxfp4", shards=4)
    report = run(source, tmp_path / "target")
    experts = len(LAYERS) * make.EXPERTS
    values = 3 * make.HIDDEN * make.INTER
    assert (report.layers, report.experts, report.shards) == (len(LAYERS), experts, 4)
    assert report.expert_source_bytes == experts * (values // 2 + values // 32)
    assert report.expert_bytes == experts * (values // 2 + values // 16 + 3 * 4)
    assert report.recoded["blocks"] == experts * values // 32
    assert report.recoded["exact"] == report.recoded["blocks"]  # exponents of this source span 11 of 17


def test_dense_experts_are_quantized_as_defined(tmp_path):
    """bf16 experts become what quantize_expert makes of them, with either choice of block scales, fused or not."""
    for kind, names in (("dense", make.DEEPSEEK), ("dense-fused", make.QWEN)):
        source = write_source(tmp_path / kind, kind)
        for six in (False, True):
            target = tmp_path / f"{kind}-{six}"
            run(source, target, four_over_six=six)
            weights = quantize_expert(*dense_matrices(2, 3).values(), four_over_six=six)
            for projection in ("gate", "up", "down"):
                expected = weights.projection(projection)
                found = decoded(target, 2, 3, projection, names)
                assert torch.equal(found, make.decode64(expected.codes, expected.sf, float(expected.gs)))


def test_each_projection_stays_in_its_weights_shard(tmp_path):
    """All tensors of a projection are in the shard that held the projection's weight in the source."""
    source = write_source(tmp_path / "source", "mxfp4", shards=5)
    run(source, tmp_path / "target")
    home = {name.removesuffix(".weight"): file for name, (*_, file) in raw_tensors(source).items() if "experts" in name}
    converted = {name: file for name, (*_, file) in raw_tensors(tmp_path / "target").items() if ".ffn.experts." in name}
    assert len({home[name.rpartition(".")[0]] for name in converted}) > 1
    assert all(home[name.rpartition(".")[0]] == file for name, file in converted.items())


def test_index(tmp_path):
    """The index maps every tensor to the file that has it, total_size is their bytes, other metadata stays."""
    source = write_source(tmp_path / "source", "dense")
    run(source, tmp_path / "target")
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    raw = raw_tensors(tmp_path / "target")
    assert index["weight_map"] == {name: file for name, (*_, file) in raw.items()}
    assert index["metadata"] == {
        "total_size": sum(len(data) for _, _, data, _ in raw.values()),
        "total_parameters": 12,
    }


def test_one_file_needs_no_index(tmp_path):
    """A source of one file without an index gives one file without an index, whether named by file or folder."""
    source = write_source(tmp_path / "source", "dense", shards=1)
    run(source / "model.safetensors", tmp_path / "a")
    run(source, tmp_path / "b")
    assert not (tmp_path / "a" / "model.safetensors.index.json").exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_tensors_are_aligned(tmp_path):
    """Each tensor starts at a multiple of its element size in the file, as readers that map files want it."""
    run(write_source(tmp_path / "source", "dense", fp8=True), tmp_path / "target")
    for file in (tmp_path / "target").glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            width = (end - start) // math.prod(entry["shape"]) if end > start else 1
            assert (8 + length + start) % width == 0, name


def test_configuration_beside_fp8(tmp_path):
    """FP8 blocks: the section stays, and says NVFP4 of the experts, by layer, and nothing of the prediction head's."""
    run(write_source(tmp_path / "source", "mxfp4", fp8=True), tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    section = config["quantization_config"]
    assert {key: section[key] for key in FP8_SECTION} == FP8_SECTION
    assert (section["moe_quant_algo"], section["group_size"], section["moe_activations"]) == ("NVFP4", 16, "dynamic")
    assert section["quantized_layers"] == {
        f"model.layers.{layer}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for layer in LAYERS
    }
    assert section["ignore"] == ["mtp.*"]
    assert config["expert_dtype"] == "fp4"
    assert config["name"] == "größer"


@pytest.mark.parametrize("kind", ["dense", "compressed-tensors"])
def test_configuration_of_a_model_that_is_not_quantized_otherwise(kind, tmp_path):
    """quant_method is modelopt; the ignore patterns cover every other matrix and no expert."""
    run(write_source(tmp_path / "source", kind), tmp_path / "target", kind)
    section = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert {key: section[key] for key in ("quant_method", "quant_algo", "moe_quant_algo", "group_size")} == {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "moe_quant_algo": "NVFP4",
        "group_size": 16,
    }
    assert "config_groups" not in section
    for name, (_, shape, _, _) in raw_tensors(tmp_path / "target").items():
        module = name.rpartition(".")[0]
        ignored = any(fnmatchcase(module, pattern) for pattern in section["ignore"])
        if ".experts." in name:
            assert not ignored, name
        elif name.endswith(".weight") and len(shape) == 2:
            assert ignored, name


def test_modelopts_own_section_stays(tmp_path):
    """ModelOpt to ModelOpt: what the section says of other modules is kept."""
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"], "x": [1]}
    run(write_source(tmp_path / "source", "modelopt", section=section), tmp_path / "target", "modelopt")
    found = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert found == section | {"moe_activations": "static"}


@pytest.mark.parametrize(
    ("activations", "modes"), [("weight-only", ("bf16", "static")), ("dynamic", ("nvfp4", "token"))]
)
def test_what_replaces_input_scales_is_recorded(activations, modes, tmp_path):
    """Without input scales the reader is told what to do instead: it neither fails nor warns, and picks the mode."""
    source = write_source(tmp_path / "source", "modelopt")
    run(source, tmp_path / "target", activations=activations)
    assert not [name for name in raw_tensors(tmp_path / "target") if name.endswith("input_scale")]
    with open_checkpoint(tmp_path / "target") as checkpoint:
        layer = checkpoint.load_layer(0)
    assert (layer.activation_format, layer.activation_scale) == modes
    assert layer.l1_input_scale is None
    # and a conversion of the result keeps it, unasked
    report = convert(tmp_path / "target", tmp_path / "again")
    assert report.activations == activations
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "target")


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
        patch.setattr(os, "pwrite", _failing_after(6))
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


def test_processes_do_not_change_the_bytes(tmp_path):
    """One process and two give the same files, byte for byte, and the same counts."""
    source = write_source(tmp_path / "source", "dense", shards=3)
    one = run(source, tmp_path / "one", jobs=1)
    two = run(source, tmp_path / "two", jobs=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert (one.experts, one.expert_bytes, one.passed_bytes) == (two.experts, two.expert_bytes, two.passed_bytes)


def test_an_error_in_a_process_is_the_error(tmp_path):
    """What goes wrong in another process is raised here as what it was."""
    source = write_source(tmp_path / "source", "modelopt", shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    name = next(n for n, (*_, file) in raw_tensors(source).items() if file == shard.name and n.endswith("scale_2"))
    _overwrite(shard, name, b"\0\0\0\0")
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
        _overwrite(target / file, name, changed)
        with pytest.raises(CheckpointError, match=f"{file}.*(layer 2, expert 1: up|layer 0, expert 0: down|norm)"):
            convert(source, target, check=True)
        _overwrite(target / file, name, data)
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
        patch.setattr(os, "pwrite", _failing_after(40))
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


def test_progress_reaches_the_total(tmp_path):
    """Progress grows from 0 to the bytes of all shards, for writing and for checking."""
    source = write_source(tmp_path / "source", "dense")
    seen: dict[str, list[tuple[int, int]]] = {}
    report = run(
        source, tmp_path / "target", check=True, progress=lambda v, d, t: seen.setdefault(v, []).append((d, t))
    )
    assert set(seen) == {"convert", "check"}
    for points in seen.values():
        assert points[0][0] == 0
        assert points[-1] == (report.written_bytes, report.written_bytes)
        assert [done for done, _ in points] == sorted(done for done, _ in points)


def test_links_out_of_the_source_are_not_followed(tmp_path):
    """A link that leads out of the source's folder is left out and told; weights of no index are, too."""
    source = write_source(tmp_path / "source", "dense")
    (tmp_path / "secret.txt").write_text("not yours")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (source / "original").mkdir()
    (source / "original" / "other.safetensors").write_text("of another loader")
    report = run(source, tmp_path / "target")
    assert set(report.left_out) == {"notes.txt", "original/other.safetensors"}
    assert not (tmp_path / "target" / "notes.txt").exists()


def test_a_snapshot_of_the_hugging_face_cache(tmp_path):
    """A cached snapshot is links to its repository's blobs: they are followed, and files, not links, come out."""
    source = write_source(tmp_path / "plain", "dense", shards=2)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(folder_bytes(source).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    run(snapshot, tmp_path / "target", check=True)
    run(source, tmp_path / "expected")
    assert not [path for path in (tmp_path / "target").rglob("*") if path.is_symlink()]
    assert folder_bytes(tmp_path / "target") == folder_bytes(tmp_path / "expected")


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


def _failing_after(calls: int, code: int = errno.ENOSPC):
    """``os.pwrite`` on a disk that fills up: half of one write, then nothing more."""
    real, count = os.pwrite, 0

    def pwrite(handle, data, offset):
        nonlocal count
        count += 1
        if count == calls and len(data) > 1:
            return real(handle, bytes(data)[: len(data) // 2], offset)
        if count > calls:
            raise OSError(code, os.strerror(code))
        return real(handle, data, offset)

    return pwrite


@pytest.mark.parametrize(
    ("calls", "code"), [(0, errno.ENOSPC), (1, errno.ENOSPC), (5, errno.EIO), (40, errno.ENOSPC), (109, errno.ENOSPC)]
)
def test_a_full_disk_loses_nothing(calls, code, tmp_path, monkeypatch):
    """Writing fails at some point: one sentence, no half files, finished shards stay, and the next run completes."""
    source = write_source(tmp_path / "source", "modelopt", shards=3)
    convert(source, tmp_path / "expected")
    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _failing_after(calls, code))
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
        run(source, tmp_path / "target")
    assert folder_bytes(tmp_path / "target") == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_target(tmp_path):
    """A folder that may not be written to: one sentence that names it."""
    source = write_source(tmp_path / "source", "dense")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match=r"locked/target: cannot be written \(Permission denied\)"):
        run(source, tmp_path / "locked" / "target")


def test_a_target_below_a_file(tmp_path):
    """A target that cannot be a folder: one sentence that names it."""
    source = write_source(tmp_path / "source", "dense")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "target"):
        with pytest.raises(CheckpointError, match=r"file.*cannot be written"):
            run(source, target)


def _overwrite(file, name: str, data: bytes) -> None:
    """Replace the bytes of one tensor in its file."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    assert end - start == len(data)
    raw[8 + length + start : 8 + length + end] = data
    file.write_bytes(raw)
