"""Checkpoints that must not be computed with: each is refused with the file, the tensor, and what was expected."""

from __future__ import annotations

import json
import os

import pytest
import torch

from dsv4.checkpoints import open_checkpoint
from dsv4.errors import CheckpointError, ConfigError, InputError

from . import make

BASE = "model.layers.0.ffn.experts.1"


def load(path, **kwargs):
    with open_checkpoint(path) as checkpoint:
        return checkpoint.load_layer(0, **kwargs)


def broken(tmp_path, name: str, tensor: torch.Tensor | None):
    """A checkpoint in which one tensor is replaced, or missing."""
    tensors = make.layer_tensors(0)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    return make.write(tmp_path, tensors)


def byte_scale(byte: int) -> torch.Tensor:
    """A block-scale tensor of w1 with one odd byte, at (5, 3)."""
    sf = make.expert(1)["gate"]["weight_scale"].clone()
    sf.view(torch.uint8)[5, 3] = byte
    return sf


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
def test_bad_global_scales_are_refused(tmp_path, projection, value):
    """A zero, negative, NaN or Inf weight_scale_2 of any projection is an error that names file and tensor."""
    name = f"{BASE}.{projection}.weight_scale_2"
    with pytest.raises(CheckpointError) as error:
        load(broken(tmp_path, name, torch.tensor(value)))
    for part in ("model.safetensors", name, str(value), "positive"):
        assert part in str(error.value)


@pytest.mark.parametrize(("byte", "found"), [(0x7F, "nan"), (0xFF, "nan"), (0x81, "-0.00"), (0xFE, "-448")])
def test_bad_block_scales_are_refused(tmp_path, byte, found):
    """NaN (both encodings) and negative block scales are errors that name file, tensor and position."""
    name = f"{BASE}.w1.weight_scale"
    with pytest.raises(CheckpointError) as error:
        load(broken(tmp_path, name, byte_scale(byte)))
    for part in ("model.safetensors", name, "[5, 3]", found):
        assert part in str(error.value)


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7E, 0x80])
def test_legal_block_scales_are_accepted(tmp_path, byte):
    """Zero of either sign, the smallest and the largest block scale load."""
    weights = load(broken(tmp_path, f"{BASE}.w1.weight_scale", byte_scale(byte)))
    assert int(weights.l1_sf[1].view(torch.uint8)[5, 3]) == byte


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_2"])
@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
def test_missing_tensors_are_refused(tmp_path, projection, suffix):
    """A tensor that is not there is named in full."""
    name = f"{BASE}.{projection}.{suffix}"
    with pytest.raises(CheckpointError, match=name) as error:
        load(broken(tmp_path, name, None))
    assert "missing" in str(error.value)


WRONG = {
    "weight-dtype": ("weight", torch.zeros(make.INTER, make.HIDDEN // 2, dtype=torch.int8), "U8"),
    "weight-dims": ("weight", torch.zeros(make.INTER, make.HIDDEN // 2, 1, dtype=torch.uint8), "[out, in/2]"),
    "weight-odd": ("weight", torch.zeros(make.INTER, make.HIDDEN // 2 - 1, dtype=torch.uint8), "multiple of 16"),
    "weight-rows": ("weight", torch.zeros(make.INTER * 2, make.HIDDEN // 2, dtype=torch.uint8), "found [32, 4]"),
    "scale-dtype": ("weight_scale", torch.zeros(make.INTER, make.HIDDEN // 16), "F8_E4M3"),
    "scale-shape": ("weight_scale", torch.zeros(make.INTER, 1).to(torch.float8_e4m3fn), "[32, 4]"),
    "global-dtype": ("weight_scale_2", torch.tensor(1.0, dtype=torch.bfloat16), "F32"),
    "global-shape": ("weight_scale_2", torch.ones(2), "one number"),
    "input-shape": ("input_scale", torch.ones(make.INTER), "one number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_and_dtypes_are_refused(tmp_path, case):
    """Each tensor's dtype and shape is checked, alone and against the others, and the tensor at fault is named."""
    suffix, tensor, expected = WRONG[case]
    name = f"{BASE}.w1.{suffix}"
    with pytest.raises(CheckpointError) as error:
        load(broken(tmp_path, name, tensor))
    message = str(error.value)
    assert expected in message
    assert f"{BASE}.w1." in message


def test_an_expert_of_another_size_is_refused(tmp_path):
    """All experts have the shape of the first; one that is consistent in itself but smaller is named."""
    tensors = make.layer_tensors(0)
    tensors |= make.names(make.expert(2, inter=16), 0, 2)
    with pytest.raises(CheckpointError, match=r"layer 0, expert 2.*intermediate 16.*intermediate 32"):
        load(make.write(tmp_path, tensors))


def test_down_must_be_the_transpose_of_gate(tmp_path):
    """A down projection whose sizes do not mirror gate's is refused."""
    parts = make.expert(1) | {"down": make.expert(1, inter=48)["down"]}
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.weight"):
        load(make.write(tmp_path, make.layer_tensors(0) | make.names(parts, 0, 1)))


def test_unknown_expert_tensors_are_refused(tmp_path):
    """A tensor that the format does not know (a bias, a pre-quantization scale) is not silently dropped."""
    extra = {f"{BASE}.w1.pre_quant_scale": torch.ones(4)}
    with pytest.raises(CheckpointError, match="pre_quant_scale"):
        load(make.write(tmp_path, make.layer_tensors(0) | extra))


# Input scales and the policy for missing ones.

POLICIES = {"weight-only": ("bf16", "static"), "dynamic": ("nvfp4", "token")}


def test_missing_input_scale_is_an_error_by_default(tmp_path):
    """Without a policy, a missing input scale is an error that names it and says what the choices are."""
    name = f"{BASE}.w3.input_scale"
    with pytest.raises(CheckpointError, match=name) as error:
        load(broken(tmp_path, name, None))
    assert "dynamic" in str(error.value)
    assert "weight-only" in str(error.value)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_bad_input_scale_is_an_error_by_default(tmp_path, value):
    """A zero, negative, NaN or Inf input scale is refused, named with its file and value."""
    name = f"{BASE}.w2.input_scale"
    with pytest.raises(CheckpointError, match=name) as error:
        load(broken(tmp_path, name, torch.tensor(value)))
    assert str(value) in str(error.value)


@pytest.mark.parametrize("bad", [None, 0.0, float("nan")], ids=["missing", "zero", "nan"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_for_missing_input_scales(tmp_path, caplog, policy, bad):
    """One unusable scale of one expert: the layer has none at all, the advice follows the policy, and it is said."""
    name = f"{BASE}.w1.input_scale"
    path = broken(tmp_path, name, None if bad is None else torch.tensor(bad))
    weights = load(path, on_missing_input_scale=policy)
    assert weights.l1_input_scale is None
    assert weights.l2_input_scale is None
    assert (weights.activation_format, weights.activation_scale) == POLICIES[policy]
    assert name in weights.notes[0]
    assert "1 of 4 experts" in weights.notes[0]
    assert name in caplog.text


def test_policy_has_no_effect_where_scales_are_complete(tmp_path):
    """Complete input scales stay, whatever the policy; only "ignore" leaves them out."""
    path = make.write(tmp_path, make.layer_tensors(0))
    for policy in ("error", "weight-only", "dynamic"):
        weights = load(path, on_missing_input_scale=policy)
        assert weights.l1_input_scale is not None
        assert (weights.activation_format, weights.activation_scale, weights.notes) == ("nvfp4", "static", ())
    assert load(path, on_missing_input_scale="ignore").l1_input_scale is None


def test_unknown_policy_is_refused(tmp_path):
    """A misspelt policy is an error that lists the valid ones."""
    with pytest.raises(ConfigError, match="weight-only"):
        load(make.write(tmp_path, make.layer_tensors(0)), on_missing_input_scale="weightonly")


def test_gate_and_up_input_scales_are_merged_to_the_larger(tmp_path):
    """gate and up read one activation: where their scales differ, the larger is used, and that is reported."""
    weights = load(broken(tmp_path, f"{BASE}.w3.input_scale", torch.tensor(0.75)))
    assert weights.l1_input_scale.tolist() == pytest.approx([0.01, 0.75, 0.03, 0.04])
    assert "expert 1" in weights.notes[0]


# Numbering, configuration and experts asked for.


def test_holes_in_the_numbering_are_refused(tmp_path):
    """Experts 0, 1, 3: expert 2 is reported missing when the checkpoint is opened."""
    tensors = {name: t for name, t in make.layer_tensors(0).items() if ".experts.2." not in name}
    with pytest.raises(CheckpointError, match=r"layer 0 has 3 experts.*missing \[2\]"):
        open_checkpoint(make.write(tmp_path, tensors))


def test_layers_with_different_expert_counts_are_refused(tmp_path):
    """Layer 1 has fewer experts than layer 0."""
    with pytest.raises(CheckpointError, match=r"layer 1 has 3 experts.*missing \[3\]"):
        open_checkpoint(make.write(tmp_path, make.layer_tensors(0) | make.layer_tensors(1, experts=3)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_routed_experts": 6}, r"missing \[4, 5\]"),
        ({"num_experts": 3}, r"unexpected \[3\]"),
        ({"hidden_size": 128}, "hidden_size 64, but config.json says 128"),
        ({"moe_intermediate_size": 16}, "moe_intermediate_size 32, but config.json says 16"),
        ({"n_routed_experts": "four"}, "n_routed_experts must be a positive integer, found 'four'"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be a positive integer"),
        ({"swiglu_limit": -1.0}, "swiglu_limit must be a positive number"),
        ({"quantization_config": {"quant_algo": "NVFP4", "group_size": 32}}, "group_size is 32"),
        (
            {"quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4", "group_size": 128}},
            "group_size is 128",
        ),
        (
            {
                "quantization_config": {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 8}},
                }
            },
            "layers.0.ffn.experts.*group_size is 8",
        ),
        ({"quantization_config": "NVFP4"}, "must be an object"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_contradicting_configuration_is_refused(tmp_path, config, message):
    """What config.json states must agree with the tensors; a group size other than 16 is no NVFP4."""
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(make.write(tmp_path, make.layer_tensors(0), config))


def test_group_size_of_other_algorithms_does_not_matter(tmp_path):
    """FP8's group size 128 beside NVFP4's 16 is nobody's error."""
    layers = {
        "layers.0.attn.wq_a": {"quant_algo": "FP8_PB_WO", "group_size": 128},
        "layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16},
    }
    config = {"quantization_config": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    with open_checkpoint(make.write(tmp_path, make.layer_tensors(0), config)) as checkpoint:
        assert checkpoint.quantization.expert_algorithm == "NVFP4"


def test_hf_quant_config_is_read(tmp_path):
    """The group size in hf_quant_config.json counts as well."""
    make.write(tmp_path, make.layer_tensors(0))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 64}})
    )
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: group_size is 64"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("ids", [[], [0, 0], [4], [-1], range(2, 6)])
def test_impossible_expert_ids_are_refused(tmp_path, ids):
    """No experts, repeated ones and ones that do not exist."""
    with (
        open_checkpoint(make.write(tmp_path, make.layer_tensors(0))) as checkpoint,
        pytest.raises(InputError, match=r"distinct ids in \[0, 4\)"),
    ):
        checkpoint.load_layer(0, ids)


def test_unknown_layer_is_refused(tmp_path):
    """A layer without routed experts is an error that lists those that have."""
    with (
        open_checkpoint(make.write(tmp_path, make.layer_tensors(3))) as checkpoint,
        pytest.raises(CheckpointError, match=r"layer 0 has no routed experts.*\[3\]"),
    ):
        checkpoint.load_layer(0)


def test_two_namings_in_one_layer_are_refused(tmp_path):
    """Experts named both ways would be two answers to one question."""
    tensors = make.layer_tensors(0) | make.names(make.expert(9), 0, 0, make.QWEN)
    with pytest.raises(CheckpointError, match=r"deepseek_v4.*prefix|transformers.*prefix"):
        open_checkpoint(make.write(tmp_path, tensors))


def test_other_formats_are_named(tmp_path):
    """Experts in a format that cannot be read: the message has the tensors' dtypes and the formats there are."""
    tensors = {
        f"model.layers.0.ffn.experts.0.{p}.weight": torch.zeros(4, 4, dtype=torch.int32) for p in ("w1", "w2", "w3")
    }
    with pytest.raises(CheckpointError, match=r"no format that can be read.*modelopt-nvfp4.*I32"):
        open_checkpoint(make.write(tmp_path, tensors))


# Files.


def test_no_experts_at_all(tmp_path):
    """A model without routed experts says so, with the names that were looked for."""
    with pytest.raises(CheckpointError, match=r"no routed experts among 1 tensors.*experts\.0\.w2"):
        open_checkpoint(make.write(tmp_path, {"model.embed.weight": torch.ones(2)}))


def test_nothing_there(tmp_path):
    """A path that does not exist, an empty folder, and a file of another kind."""
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.bin"):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, (8).to_bytes(8, "little") + b"not json"])
def test_damaged_files_are_refused(tmp_path, content):
    """A file that is not safetensors is an error that names it."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Which of the two would count is nobody's guess."""
    make.write(tmp_path, make.layer_tensors(0), file="a.safetensors")
    make.write(tmp_path, make.layer_tensors(0, experts=1), file="b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor .* is also in .*a\.safetensors"):
        open_checkpoint(tmp_path)


def rewrite_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def first(index) -> str:
    return min(index["weight_map"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", "outside the checkpoint"),
        ("/etc/outside.safetensors", "outside the checkpoint"),
        ("..\\outside.safetensors", "outside the checkpoint"),
        ("C:\\outside.safetensors", "outside the checkpoint"),
        ("a/../../outside.safetensors", "outside the checkpoint"),
        ("absent.safetensors", "missing from"),
        ("model.bin", r"ending in \.safetensors"),
        ("x\0.safetensors", "printable characters"),
        (7, "expected a file name"),
    ],
)
def test_index_with_bad_shards_is_refused(tmp_path, file, message):
    """An index may only name files that are there, inside the folder."""
    folder = make.write_sharded(tmp_path / "model", make.layer_tensors(0))
    make.write(tmp_path, make.layer_tensors(1), file="outside.safetensors")
    rewrite_index(folder, lambda index: index["weight_map"].update({first(index): file}))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert "index.json" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_malformed_index_is_refused(tmp_path, content):
    """Not JSON, not an object, no weight map."""
    folder = make.write_sharded(tmp_path, make.layer_tensors(0))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)


def test_index_that_disagrees_with_the_headers_is_refused(tmp_path):
    """A tensor that is in another shard than the index says, or in none."""
    folder = make.write_sharded(tmp_path, make.layer_tensors(0))
    name = "model.layers.0.ffn.experts.9.w1.weight"
    rewrite_index(folder, lambda index: index["weight_map"].update({name: index["weight_map"][first(index)]}))
    with pytest.raises(CheckpointError, match=r"places tensor .*experts\.9.*no file has it"):
        open_checkpoint(folder)


def test_links_out_of_the_folder_are_refused(tmp_path):
    """A shard that is a link to a file elsewhere is refused, with and without an index."""
    make.write(tmp_path, make.layer_tensors(0), file="elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "elsewhere.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)
    weight_map = dict.fromkeys(make.layer_tensors(0), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    """snapshots/<revision>/ links into blobs/ of its own repository: the ordinary layout of a download."""
    make.write(tmp_path / "blobs", make.layer_tensors(0), file="0123abcd")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/0123abcd", snapshot / "model.safetensors")
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.load_layer(0).num_experts == make.EXPERTS
