"""Files that nvidia-modelopt and compressed-tensors write themselves load to the values that they decode."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dsv4.checkpoints import open_checkpoint
from dsv4.errors import CheckpointError
from dsv4.nvfp4 import Nvfp4Tensor

from . import make

LAYERS, EXPERTS, HIDDEN, INTER = 2, 4, 64, 32
VALUES = LAYERS * EXPERTS * 3 * HIDDEN * INTER
THEIRS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def module_name(layer: int, expert: int, projection: str, prefix: str = "model.") -> str:
    return f"{prefix}layers.{layer}.mlp.experts.{expert}.{THEIRS[projection]}"


def every_matrix():
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for projection in THEIRS:
                yield layer, expert, projection


def clear_of_ties(exact: torch.Tensor) -> torch.Tensor:
    """Where two fp32 roundings (2^-23 at most) on the way to bf16 cannot change which bf16 number is the nearest.

    The libraries multiply code, block scale and global scale in another order than dsv4, and round in between.
    """
    return (exact * (1 - 2.0**-23)).bfloat16() == (exact * (1 + 2.0**-23)).bfloat16()


# nvidia-modelopt


@pytest.fixture(scope="module")
def modelopt_export(tmp_path_factory):
    """A small Qwen3-MoE model, calibrated, quantized and exported by ModelOpt alone."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    export = pytest.importorskip("modelopt.torch.export")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        moe_intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 64, (4, 32))
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda quantized: quantized(ids))
    folder = tmp_path_factory.mktemp("modelopt")
    export.export_hf_checkpoint(model, export_dir=folder)
    return folder


def test_modelopt_export_loads_to_modelopts_values(modelopt_export):
    """Every matrix of the export decodes to the bf16 numbers that ModelOpt decodes it to, and in float64 to what the
    bytes say exactly; its input scales are found."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    compared = 0
    with (
        safe_open(modelopt_export / "model.safetensors", framework="pt") as stored,
        open_checkpoint(modelopt_export) as opened,
    ):
        assert opened.format.name == "modelopt-nvfp4"
        assert (opened.moe_layers, opened.num_experts) == (tuple(range(LAYERS)), EXPERTS)
        assert (opened.quantization.expert_algorithm, opened.quantization.group_size) == ("NVFP4", 16)
        for layer, expert, projection in every_matrix():
            name = module_name(layer, expert, projection)
            codes, sf, gs, input_scale = (
                stored.get_tensor(f"{name}.{suffix}")
                for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale")
            )
            shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
            theirs = NVFP4QTensor(shape, torch.bfloat16, codes).dequantize(
                scale=sf, double_scale=gs, block_sizes={-1: 16}
            )
            weights = opened.read_expert(layer, expert)
            ours = weights.projection(projection)
            exact = make.decode64(codes, sf, float(gs))
            assert torch.equal(ours.dequantize(torch.float64), exact)
            clear = clear_of_ties(exact)
            assert torch.equal(ours.dequantize(torch.bfloat16)[clear], theirs[clear]), name
            assert weights.input_scales[projection].value == float(input_scale)
            compared += int(clear.sum())
        layer = opened.load_layer(1)
    assert compared > 0.99 * VALUES  # or little was compared
    assert (layer.activation_format, layer.activation_scale) == ("nvfp4", "static")


# compressed-tensors


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTER, bias=False)
        self.down_proj = nn.Linear(INTER, HIDDEN, bias=False)


class Layers(nn.Module):
    """Modules whose parameters have the names of a model's experts, ``model.layers.N.mlp.experts.E.*_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            layer.mlp = nn.Module()
            layer.mlp.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
            self.model.layers.append(layer)


def compress(folder, preset: str, power_of_two: bool = False):
    """Quantize and write a model with compressed-tensors; returns its decoded weights by module name and dtype.

    Args:
        folder: where to write.
        preset: ``"NVFP4"``, or ``"NVFP4A16"`` for weights alone.
        power_of_two: choose divisors for which both ways to decode are exact.
    """
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    torch.manual_seed(1)
    model = Layers().requires_grad_(False)
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme})
    quantization.apply_quantization_config(model, config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for number, module in enumerate(linears.values()):
        blocks = module.weight.unflatten(-1, (-1, 16))
        divisor = generate_gparam(module.weight.min(), module.weight.max())
        if power_of_two:
            divisor = torch.exp2(torch.log2(divisor).floor())
        scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=divisor)
        module.weight_global_scale.copy_(divisor)
        module.weight_scale.copy_(scales)
        if preset == "NVFP4":
            module.input_global_scale.copy_(generate_gparam(torch.tensor(-3.0), torch.tensor(5.0 + number)))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_experts": EXPERTS}))
    compressor.update_config(folder)
    decoded = {}
    for name, module in linears.items():
        codes = unpack_fp4_from_uint8(module.weight_packed, module.weight_packed.shape[0], module.in_features)
        for dtype in (torch.float32, torch.float64):
            decoded[name, dtype] = dequantize(
                codes.to(dtype),
                module.weight_scale.to(dtype),
                args=scheme.weights,
                global_scale=module.weight_global_scale.to(dtype),
                dtype=dtype,
            )
    compressor.decompress_model(model)
    return decoded | {(name, torch.bfloat16): module.weight for name, module in linears.items()}


def test_compressed_tensors_values_with_powers_of_two(tmp_path):
    """Where the divisor is a power of two, every matrix equals the library's decode in fp32, bit for bit."""
    decoded = compress(tmp_path, "NVFP4", power_of_two=True)
    with open_checkpoint(tmp_path) as opened:
        assert opened.format.name == "compressed-tensors-nvfp4"
        assert (opened.quantization.method, opened.quantization.expert_algorithm) == ("compressed-tensors", "NVFP4")
        assert opened.quantization.group_size == 16
        for layer, expert, projection in every_matrix():
            ours = opened.read_expert(layer, expert).projection(projection).dequantize()
            assert torch.equal(ours, decoded[module_name(layer, expert, projection), torch.float32])


def test_compressed_tensors_values(tmp_path):
    """With divisors from the data: within fp32's rounding of the library's decode in float64, and the very bf16 number
    that it decompresses to."""
    decoded = compress(tmp_path, "NVFP4")
    compared = 0
    with open_checkpoint(tmp_path) as opened:
        for layer, expert, projection in every_matrix():
            name = module_name(layer, expert, projection)
            exact = decoded[name, torch.float64]
            ours = opened.read_expert(layer, expert).projection(projection)
            # One rounding, of the divisor's reciprocal: half a unit in the last place of fp32.
            assert ((ours.dequantize(torch.float64) - exact).abs() <= exact.abs() * 2.0**-24).all()
            theirs = decoded[name, torch.bfloat16]
            assert theirs.dtype == torch.bfloat16
            clear = clear_of_ties(exact)
            assert torch.equal(ours.dequantize(torch.bfloat16)[clear], theirs[clear])
            compared += int(clear.sum())
    assert compared > 0.99 * VALUES  # or little was compared


def test_compressed_tensors_scales_become_multipliers(tmp_path):
    """Both scalars are turned round: ``gs * divisor = 1``; each projection keeps its own."""
    compress(tmp_path, "NVFP4")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored, open_checkpoint(tmp_path) as opened:
        for layer, expert, projection in every_matrix():
            name = module_name(layer, expert, projection)
            weights = opened.read_expert(layer, expert)
            for suffix, value in (
                ("weight_global_scale", float(weights.projection(projection).gs)),
                ("input_global_scale", weights.input_scales[projection].value),
            ):
                divisor = float(stored.get_tensor(f"{name}.{suffix}"))
                assert abs(value * divisor - 1) <= 2.0**-24
        layer = opened.load_layer(0)
    assert (layer.activation_format, layer.activation_scale) == ("nvfp4", "static")
    assert layer.notes[0].startswith("input scales of gate and up differ")  # as written above


def test_compressed_tensors_for_weights_alone(tmp_path):
    """A weight-only export has no input scales, which is said, and is no error where they are not needed."""
    compress(tmp_path, "NVFP4A16")
    with open_checkpoint(tmp_path) as opened:
        with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.input_global_scale' is missing"):
            opened.load_layer(0)
        assert opened.load_layer(0, on_missing_input_scale="weight-only").activation_format == "bf16"


# compressed-tensors, what is refused


def packed_expert(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """projection -> suffix -> tensor."""
    return {
        projection: {
            "weight_packed": part["weight"],
            "weight_scale": part["weight_scale"],
            "weight_global_scale": torch.tensor([1024.0 + seed]),
            "input_global_scale": torch.tensor([64.0]),
        }
        for projection, part in make.expert(seed).items()
    }


def packed_checkpoint(folder, changes: dict[str, torch.Tensor | None] | None = None, config: dict | None = None):
    """Two experts; ``changes`` are to expert 1's gate."""
    parts = packed_expert(1)
    for suffix, tensor in (changes or {}).items():
        if tensor is None:
            del parts["gate"][suffix]
        else:
            parts["gate"][suffix] = tensor
    tensors = make.names(packed_expert(0), 0, 0, make.QWEN) | make.names(parts, 0, 1, make.QWEN)
    return make.write(folder, tensors, config)


def refused(folder) -> str:
    with open_checkpoint(folder) as opened, pytest.raises(CheckpointError) as error:
        opened.load_layer(0)
    return str(error.value)


GATE = "model.layers.0.mlp.experts.1.gate_proj"


def test_hand_written_file_decodes(tmp_path):
    """The files that the refusals below are made from are good: they decode to codes * sf / divisor."""
    with open_checkpoint(packed_checkpoint(tmp_path)) as opened:
        weights = opened.read_expert(0, 1)
    for projection, part in packed_expert(1).items():
        ours: Nvfp4Tensor = weights.projection(projection)
        expected = make.decode64(part["weight_packed"], part["weight_scale"], 1.0) / 1025.0
        assert ((ours.dequantize(torch.float64) - expected).abs() <= expected.abs() * 2.0**-24).all()
        assert weights.input_scales[projection].value == 1 / 64


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
def test_bad_divisors_are_refused(tmp_path, suffix, value):
    """Zero, negative, NaN, Inf, and a number whose reciprocal is Inf: the tensor is named, with what was found."""
    message = refused(packed_checkpoint(tmp_path, {suffix: torch.tensor([value])}))
    assert f"{GATE}.{suffix}" in message
    assert f"found {torch.tensor(value).item()}" in message


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_global_scale"])
def test_missing_tensors_are_refused(tmp_path, suffix):
    """A tensor that is not there is named in full."""
    message = refused(packed_checkpoint(tmp_path, {suffix: None}))
    assert f"{GATE}.{suffix}" in message
    assert "missing" in message


WRONG = {
    "packed-dtype": ("weight_packed", torch.zeros(32, 32, dtype=torch.int32), "U8"),
    "packed-shape": ("weight_packed", torch.zeros(32, 28, dtype=torch.uint8), "multiple of 16"),
    "scale-dtype": ("weight_scale", torch.zeros(32, 4, dtype=torch.bfloat16), "F8_E4M3"),
    "scale-shape": ("weight_scale", torch.zeros(4, 32).to(torch.float8_e4m3fn), "[32, 4]"),
    "global-shape": ("weight_global_scale", torch.ones(32), "one number"),
    "zero-point": ("weight_zero_point", torch.zeros(32, 4), "not part of this format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_and_dtypes_are_refused(tmp_path, case):
    """Each tensor's dtype and shape is checked, and tensors of other schemes are not dropped."""
    suffix, tensor, expected = WRONG[case]
    message = refused(packed_checkpoint(tmp_path, {suffix: tensor}))
    assert f"{GATE}.{suffix}" in message
    assert expected in message


def test_bad_block_scales_are_refused(tmp_path):
    """A NaN among the block scales is named with its position."""
    sf = make.expert(1)["gate"]["weight_scale"].clone()
    sf.view(torch.uint8)[3, 2] = 0x7F
    message = refused(packed_checkpoint(tmp_path, {"weight_scale": sf}))
    assert f"{GATE}.weight_scale" in message
    assert "[3, 2]" in message


def group(**weights) -> dict:
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, **weights}}},
        }
    }


def test_config_group_with_another_group_size_is_refused(tmp_path):
    """A group of this format that states other than 16 values a block scale contradicts the format."""
    with pytest.raises(CheckpointError, match=r"config_groups\['group_0'\].*group_size is 32"):
        open_checkpoint(packed_checkpoint(tmp_path, config=group(group_size=32)))


def test_config_group_names_a_missing_tensor(tmp_path):
    """With a config group of this format, an expert without its global scales is an error about these, by name."""
    parts = packed_expert(0)
    for part in parts.values():
        del part["weight_global_scale"]
    folder = make.write(tmp_path, make.names(parts, 0, 0, make.QWEN), group(group_size=16))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight_global_scale' is missing"):
        open_checkpoint(folder)


def test_rotated_activations_are_refused(tmp_path):
    """A transform that rotates activations at run time would be left out silently; one that is part of the weights is
    not our business."""
    config = group(group_size=16)
    apply = [{"targets": ["Linear"], "location": "weight_input"}]
    transforms = {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}
    config["quantization_config"]["transform_config"] = transforms
    folder = packed_checkpoint(tmp_path, config=config)
    open_checkpoint(folder).source.close()
    apply.append({"targets": ["Linear"], "location": "input"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="applies a rotation to activations"):
        open_checkpoint(folder)
