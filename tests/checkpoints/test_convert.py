"""Conversion to ModelOpt's layout: what passes through, what is converted, what the configuration says."""

from __future__ import annotations

import json
import math
import os
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors import safe_open

from dsv4.checkpoints import open_checkpoint
from dsv4.checkpoints.conversion import convert
from dsv4.checkpoints.dense import quantize_expert

from . import make
from .convert_sources import (
    FP8_SECTION,
    KINDS,
    LAYERS,
    convert_freely,
    dense_matrices,
    folder_bytes,
    other_tensors,
    raw_tensors,
    write_source,
)


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
    convert_freely(source, tmp_path / "target", kind)
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
    convert_freely(write_source(tmp_path / "source", kind), tmp_path / "target", kind)
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
    report = convert_freely(source, target, kind)
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
    report = convert_freely(source, tmp_path / "target")
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
            convert_freely(source, target, four_over_six=six)
            weights = quantize_expert(*dense_matrices(2, 3).values(), four_over_six=six)
            for projection in ("gate", "up", "down"):
                expected = weights.projection(projection)
                found = decoded(target, 2, 3, projection, names)
                assert torch.equal(found, make.decode64(expected.codes, expected.sf, float(expected.gs)))


def test_each_projection_stays_in_its_weights_shard(tmp_path):
    """All tensors of a projection are in the shard that held the projection's weight in the source."""
    source = write_source(tmp_path / "source", "mxfp4", shards=5)
    convert_freely(source, tmp_path / "target")
    home = {name.removesuffix(".weight"): file for name, (*_, file) in raw_tensors(source).items() if "experts" in name}
    converted = {name: file for name, (*_, file) in raw_tensors(tmp_path / "target").items() if ".ffn.experts." in name}
    assert len({home[name.rpartition(".")[0]] for name in converted}) > 1
    assert all(home[name.rpartition(".")[0]] == file for name, file in converted.items())


def test_index(tmp_path):
    """The index maps every tensor to the file that has it, total_size is their bytes, other metadata stays."""
    source = write_source(tmp_path / "source", "dense")
    convert_freely(source, tmp_path / "target")
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
    convert_freely(source / "model.safetensors", tmp_path / "a")
    convert_freely(source, tmp_path / "b")
    assert not (tmp_path / "a" / "model.safetensors.index.json").exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_tensors_are_aligned(tmp_path):
    """Each tensor starts at a multiple of its element size in the file, as readers that map files want it."""
    convert_freely(write_source(tmp_path / "source", "dense", fp8=True), tmp_path / "target")
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
    convert_freely(write_source(tmp_path / "source", "mxfp4", fp8=True), tmp_path / "target")
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
    convert_freely(write_source(tmp_path / "source", kind), tmp_path / "target", kind)
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
    convert_freely(write_source(tmp_path / "source", "modelopt", section=section), tmp_path / "target", "modelopt")
    found = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert found == section | {"moe_activations": "static"}


@pytest.mark.parametrize(
    ("activations", "modes"), [("weight-only", ("bf16", "static")), ("dynamic", ("nvfp4", "token"))]
)
def test_what_replaces_input_scales_is_recorded(activations, modes, tmp_path):
    """Without input scales the reader is told what to do instead: it neither fails nor warns, and picks the mode."""
    source = write_source(tmp_path / "source", "modelopt")
    convert_freely(source, tmp_path / "target", activations=activations)
    assert not [name for name in raw_tensors(tmp_path / "target") if name.endswith("input_scale")]
    with open_checkpoint(tmp_path / "target") as checkpoint:
        layer = checkpoint.load_layer(0)
    assert (layer.activation_format, layer.activation_scale) == modes
    assert layer.l1_input_scale is None
    # and a conversion of the result keeps it, unasked
    report = convert(tmp_path / "target", tmp_path / "again")
    assert report.activations == activations
    assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "target")


def test_processes_do_not_change_the_bytes(tmp_path):
    """One process and two give the same files, byte for byte, and the same counts."""
    source = write_source(tmp_path / "source", "dense", shards=3)
    one = convert_freely(source, tmp_path / "one", jobs=1)
    two = convert_freely(source, tmp_path / "two", jobs=2)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert (one.experts, one.expert_bytes, one.passed_bytes) == (two.experts, two.expert_bytes, two.passed_bytes)


def test_progress_reaches_the_total(tmp_path):
    """Progress grows from 0 to the bytes of all shards, for writing and for checking."""
    source = write_source(tmp_path / "source", "dense")
    seen: dict[str, list[tuple[int, int]]] = {}
    report = convert_freely(
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
    report = convert_freely(source, tmp_path / "target")
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
    convert_freely(snapshot, tmp_path / "target", check=True)
    convert_freely(source, tmp_path / "expected")
    assert not [path for path in (tmp_path / "target").rglob("*") if path.is_symlink()]
    assert folder_bytes(tmp_path / "target") == folder_bytes(tmp_path / "expected")
