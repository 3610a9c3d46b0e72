"""Reading well-formed checkpoints: every layout and naming gives the same, right numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4.checkpoints import open_checkpoint
from dsv4.checkpoints.base import LayerWeights

from . import make


def decoded(weights: LayerWeights, row: int) -> dict[str, torch.Tensor]:
    """float64 gate, up and down of one row, decoded by the test's own code."""
    inter = weights.l1_fp4.shape[1] // 2
    return {
        "gate": make.decode64(weights.l1_fp4[row, :inter], weights.l1_sf[row, :inter], weights.l1_gs[row, 0]),
        "up": make.decode64(weights.l1_fp4[row, inter:], weights.l1_sf[row, inter:], weights.l1_gs[row, 1]),
        "down": make.decode64(weights.l2_fp4[row], weights.l2_sf[row], weights.l2_gs[row]),
    }


def assert_layer(weights: LayerWeights, layer: int, ids) -> None:
    """The rows of ``weights`` are experts ``ids`` of ``layer`` as :mod:`make` defines them, exactly."""
    assert weights.layer == layer
    assert weights.experts == tuple(ids)
    for row, e in enumerate(ids):
        expected = make.expert(100 * layer + e)
        for projection, values in decoded(weights, row).items():
            assert torch.equal(values, make.decode_parts(expected[projection])), (layer, e, projection)
        assert weights.l1_input_scale[row] == expected["gate"]["input_scale"]
        assert weights.l2_input_scale[row] == expected["down"]["input_scale"]


NAMINGS = [
    pytest.param(make.DEEPSEEK, "model.", id="deepseek"),
    pytest.param(make.DEEPSEEK, "", id="deepseek-no-prefix"),
    pytest.param(make.QWEN, "model.", id="qwen3"),
    pytest.param(make.QWEN, "", id="qwen3-no-prefix"),
    pytest.param(make.QWEN, "model.language_model.", id="qwen3-multimodal"),
]


@pytest.mark.parametrize(("family", "prefix"), NAMINGS)
def test_every_naming_gives_the_same_values(tmp_path, family, prefix):
    """DeepSeek and Qwen names, with and without prefix, decode to the written values; gate rows come first."""
    write = make.write(tmp_path, make.layer_tensors(3, family=family, prefix=prefix))
    with open_checkpoint(write) as checkpoint:
        assert checkpoint.format.name == "modelopt-nvfp4"
        assert checkpoint.moe_layers == (3,)
        assert checkpoint.num_experts == make.EXPERTS
        assert (checkpoint.shape.hidden_size, checkpoint.shape.intermediate_size) == (make.HIDDEN, make.INTER)
        assert_layer(checkpoint.load_layer(3), 3, range(make.EXPERTS))


@pytest.mark.parametrize("layout", ["file", "folder-of-one", "index", "folder-of-many"])
def test_every_layout_gives_the_same_values(tmp_path, layout):
    """One file, a folder with one, an indexed folder and a folder of files without an index read alike."""
    layers = {layer: make.layer_tensors(layer) for layer in (0, 1)}
    everything = layers[0] | layers[1]
    path = tmp_path
    if layout == "index":
        make.write_sharded(tmp_path, everything, shards=3)
    elif layout == "folder-of-many":
        for layer, tensors in layers.items():
            make.write(tmp_path, tensors, file=f"part{layer}.safetensors")
    else:
        make.write(tmp_path, everything)
        path = tmp_path / "model.safetensors" if layout == "file" else tmp_path
    with open_checkpoint(path) as checkpoint:
        for weights in checkpoint.iter_layers():
            assert_layer(weights, weights.layer, range(make.EXPERTS))
        assert checkpoint.moe_layers == (0, 1)


@pytest.mark.parametrize("ids", [range(1, 3), [3, 0], [2]])
def test_local_experts_only(tmp_path, ids):
    """A rank gets exactly its experts, a range or a list, in the order asked for."""
    make.write(tmp_path, make.layer_tensors(0))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_layer(checkpoint.load_layer(0, ids), 0, ids)


def test_ranks_read_only_their_own_tensors(tmp_path, monkeypatch):
    """Loading experts 2 and 3 reads no tensor of experts 0 and 1."""
    make.write(tmp_path, make.layer_tensors(0))
    with open_checkpoint(tmp_path) as checkpoint:
        seen: list[str] = []
        read = checkpoint.source.read
        monkeypatch.setattr(checkpoint.source, "read", lambda name: (seen.append(name), read(name))[1])
        checkpoint.load_layer(0, range(2, 4))
    assert {name.split(".experts.")[1][0] for name in seen} == {"2", "3"}


def test_scalars_may_have_one_dimension(tmp_path):
    """weight_scale_2 and input_scale stored as [1] read as the same numbers as []."""
    tensors = make.layer_tensors(0)
    reshaped = {name: t.reshape(1) if t.dim() == 0 else t for name, t in tensors.items()}
    with open_checkpoint(make.write(tmp_path, reshaped)) as checkpoint:
        assert_layer(checkpoint.load_layer(0), 0, range(make.EXPERTS))


def test_gate_and_up_keep_their_own_global_scales(tmp_path):
    """Different weight_scale_2 of w1 and w3 end up in the two columns of l1_gs."""
    with open_checkpoint(make.write(tmp_path, make.layer_tensors(0))) as checkpoint:
        gs = checkpoint.load_layer(0).l1_gs
    for e in range(make.EXPERTS):
        parts = make.expert(e)
        assert gs[e, 0] == parts["gate"]["weight_scale_2"]
        assert gs[e, 1] == parts["up"]["weight_scale_2"]
    assert (gs[:, 0] != gs[:, 1]).all()


def test_zero_block_scales_are_legal(tmp_path):
    """Blocks with scale 0 load and decode to 0, whatever their codes."""
    tensors = make.layer_tensors(0)
    name = "model.layers.0.ffn.experts.1.w2.weight_scale"
    tensors[name] = torch.zeros_like(tensors[name].view(torch.uint8)).view(torch.float8_e4m3fn)
    with open_checkpoint(make.write(tmp_path, tensors)) as checkpoint:
        assert (decoded(checkpoint.load_layer(0), 1)["down"] == 0).all()


def test_other_tensors_are_everything_but_routed_experts(tmp_path):
    """Shared experts, the router and the prediction head's own experts are not routed experts of a layer."""
    others = {
        "model.layers.0.ffn.shared_experts.w1.weight": torch.ones(2),
        "model.layers.0.ffn.gate.weight": torch.ones(2),
        "mtp.0.ffn.experts.0.w1.weight": torch.ones(2),
        "model.embed.weight": torch.ones(2),
    }
    with open_checkpoint(make.write(tmp_path, make.layer_tensors(0) | others)) as checkpoint:
        assert checkpoint.other_tensors() == sorted(others)
        assert checkpoint.num_experts == make.EXPERTS


class Allocations(TorchDispatchMode):
    """Collects the sizes of the storages that operations return, leaving out the mapped file's."""

    def __init__(self, file_bytes: int) -> None:
        super().__init__()
        self.file_bytes = file_bytes
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A read is a view into a storage that spans the whole mapped file; views and in-place results are not new.
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            size = out.untyped_storage().nbytes()
            if size != self.file_bytes:
                self.sizes.append(size)
        return out


def test_loading_takes_the_layer_and_one_expert(tmp_path):
    """While a layer loads, what is larger than one expert's tensor is a tensor of the result, each allocated once."""
    path = make.write(tmp_path, make.layer_tensors(0, experts=8)) / "model.safetensors"
    with open_checkpoint(path) as checkpoint, Allocations(path.stat().st_size) as allocations:
        weights = checkpoint.load_layer(0)
    one = make.INTER * make.HIDDEN // 2
    sizes = [t.untyped_storage().nbytes() for t in (weights.l1_fp4, weights.l1_sf, weights.l2_fp4, weights.l2_sf)]
    assert sorted(size for size in allocations.sizes if size > one) == sorted(size for size in sizes if size > one)


def test_progress_bar_counts_experts(tmp_path, capsys):
    """With progress=True a bar is drawn that ends at all experts; the values are the same."""
    pytest.importorskip("rich")
    make.write(tmp_path, make.layer_tensors(0))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_layer(checkpoint.load_layer(0, progress=True), 0, range(make.EXPERTS))
    assert "4/4" in capsys.readouterr().out


def test_configuration_is_read(tmp_path):
    """top_k and swiglu_limit come from config.json; a matching shape is accepted."""
    config = {
        "n_routed_experts": make.EXPERTS,
        "num_experts_per_tok": 2,
        "hidden_size": make.HIDDEN,
        "moe_intermediate_size": make.INTER,
        "swiglu_limit": 10.0,
        "quantization_config": {
            "quant_method": "fp8",
            "quant_algo": "MIXED_PRECISION",
            "moe_quant_algo": "NVFP4",
            "group_size": 16,
            "weight_block_size": [128, 128],
        },
    }
    with open_checkpoint(make.write(tmp_path, make.layer_tensors(0), config)) as checkpoint:
        assert (checkpoint.top_k, checkpoint.swiglu_limit) == (2, 10.0)
        assert checkpoint.config == config
        assert checkpoint.quantization.method == "fp8"
        assert checkpoint.quantization.expert_algorithm == "NVFP4"
        assert checkpoint.quantization.group_size == 16
