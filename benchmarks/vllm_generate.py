"""Tokens per second of vLLM on a whole Qwen3-MoE model with NVFP4 experts, with and without the plug-in.

    python benchmarks/vllm_generate.py --output benchmarks/results/h200_vllm_generate.json

The checkpoint is made here: the shapes of Qwen3-30B-A3B's layers, fewer of them, a smaller vocabulary, random codes.
Each setting is a process of its own, which loads the model through vLLM's own loader and generates greedily from random
prompts, all of one length, with CUDA graphs for decoding. One run warms up; the median of the others counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv4.cli._machine import storage_bytes
from dsv4.cli._output import check_writable, dumps, write_text

HIDDEN, INTER, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2048, 768, 128, 8, 32, 4, 128, 32768
INPUT_SCALES = {"gate_proj": 8 / 2688, "up_proj": 8 / 2688, "down_proj": 64 / 2688}


@dataclass(frozen=True)
class Setting:
    """One way to serve.

    Attributes:
        label: in tables.
        environment: what it is asked for by.
    """

    label: str
    environment: dict[str, str]


SETTINGS = {
    "vllm": Setting("vLLM's own", {"DSV4_VLLM": "0"}),
    "dsv4-w4a16": Setting("dsv4 W4A16", {"DSV4_VLLM_ACTIVATIONS": "bf16"}),
    "dsv4-w4a4": Setting("dsv4 W4A4 static", {"DSV4_VLLM_ACTIVATIONS": "static"}),
}


def make_checkpoint(folder: Path, layers: int, device: torch.device) -> None:
    """A random Qwen3-MoE checkpoint in ModelOpt's NVFP4 layout."""
    generator = torch.Generator(device).manual_seed(0)

    def bf16(*shape: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * std).bfloat16().cpu()

    def projection(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device, generator=generator)
        sf = torch.randint(0x28, 0x40, (rows, columns // 16), dtype=torch.uint8, device=device, generator=generator)
        return {
            f"{name}.weight": codes.cpu(),
            f"{name}.weight_scale": sf.view(torch.float8_e4m3fn).cpu(),
            f"{name}.weight_scale_2": torch.tensor(0.02 / 2.9),  # e2m1 codes at random have a mean square of 2.9^2
            f"{name}.input_scale": torch.tensor(INPUT_SCALES[name.rpartition(".")[2]]),
        }

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": bf16(VOCAB, HIDDEN, std=1.0),
        "model.norm.weight": ones,
        "lm_head.weight": bf16(VOCAB, HIDDEN),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        tensors |= {f"{layer}.{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = bf16(heads * HEAD_DIM, HIDDEN)
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{name}.weight"] = torch.ones(HEAD_DIM, dtype=torch.bfloat16)
        tensors[f"{layer}.self_attn.o_proj.weight"] = bf16(HIDDEN, HEADS * HEAD_DIM)
        tensors[f"{layer}.mlp.gate.weight"] = bf16(EXPERTS, HIDDEN, std=0.1)
        for expert in range(EXPERTS):
            name = f"{layer}.mlp.experts.{expert}"
            tensors |= projection(f"{name}.gate_proj", INTER, HIDDEN)
            tensors |= projection(f"{name}.up_proj", INTER, HIDDEN)
            tensors |= projection(f"{name}.down_proj", HIDDEN, INTER)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * INTER,
        "moe_intermediate_size": INTER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "group_size": 16,
            "ignore": ["lm_head", "*self_attn*", "*mlp.gate"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """One setting, in this process: its times, its first tokens and what computes its experts."""
    if args.boot:
        import_module(args.boot)
    from vllm import LLM, SamplingParams, __version__

    started = time.monotonic()
    batches = [int(b) for b in args.batches.split(",")]
    llm = LLM(
        str(args.model),
        skip_tokenizer_init=True,
        max_model_len=args.prompt + args.tokens,
        max_num_seqs=max(batches),
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        attention_backend=args.attention,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches},
    )
    loading = time.monotonic() - started
    weights = sum(llm.apply_model(storage_bytes))
    results, first = [], []
    for batch in batches:
        draw = torch.Generator().manual_seed(batch)
        prompts = [
            {"prompt_token_ids": torch.randint(1, VOCAB, (args.prompt,), generator=draw).tolist()} for _ in range(batch)
        ]
        seconds = {}
        for tokens in (1, args.tokens):  # the first token is the prompt's: what is left is decoding
            settings = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            samples = []
            for _ in range(1 + args.repeats):
                start = time.monotonic()
                outputs = llm.generate(prompts, settings, use_tqdm=False)
                samples.append(time.monotonic() - start)
            seconds[tokens] = statistics.median(samples[1:])
        first.append([list(output.outputs[0].token_ids) for output in outputs])
        decoding = seconds[args.tokens] - seconds[1]
        results.append(
            {
                "batch": batch,
                "decode_tokens_per_s": round(batch * (args.tokens - 1) / decoding, 1),
                "prefill_tokens_per_s": round(batch * args.prompt / seconds[1], 1),
            }
        )
    return {
        "vllm": __version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "experts": sorted(set(llm.apply_model(_experts)[0])),
        "loading_s": round(loading, 1),
        "parameters_gib": round(weights / 2**30, 2),
        "results": results,
        "tokens": first,
    }


def _experts(model: torch.nn.Module) -> list[str]:
    """What computes each layer's experts."""
    found = []
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            moe = getattr(module.quant_method, "nvfp4_moe", None)
            found.append(type(kernel.fused_experts).__name__ + (f" ({moe.backend_name})" if moe is not None else ""))
    return found


def agreement(one: list[list[list[int]]], other: list[list[list[int]]]) -> float:
    """The share of generated tokens before the first that differs, over all prompts."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    same = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs]
    return sum(same) / sum(len(a) for a, _ in pairs)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every setting, one process after the other."""
    runs: dict[str, Any] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "model"
        if args.model is None:
            make_checkpoint(model, args.layers, torch.device("cuda"))
        for name in args.settings.split(","):
            result = Path(scratch) / f"{name}.json"
            command = [sys.executable, __file__, "--run", str(result), "--model", str(model)]
            for option in ("prompt", "tokens", "batches", "repeats", "attention", "boot"):
                if getattr(args, option) is not None:
                    command += [f"--{option}", str(getattr(args, option))]
            done = subprocess.run(command, env={**os.environ, **SETTINGS[name].environment}, check=False)
            if done.returncode:  # said above, by the process itself; the others are measured all the same
                failed.append(name)
                continue
            runs[name] = json.loads(result.read_text(encoding="utf-8"))
            print(name, json.dumps({k: v for k, v in runs[name].items() if k != "tokens"}), flush=True)
    if not runs:
        raise SystemExit("no setting ran")
    tokens = {name: run.pop("tokens") for name, run in runs.items()}
    base = next(iter(tokens.values()))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "model": {"layers": args.layers, "hidden": HIDDEN, "intermediate": INTER, "experts": EXPERTS, "top_k": TOP_K},
        "prompt": args.prompt,
        "tokens": args.tokens,
        "attention": args.attention,
        "same_tokens_as_first_setting": {name: round(agreement(base, t), 4) for name, t in tokens.items()},
        "runs": runs,
        "failed": failed,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a random one is made")
    parser.add_argument("--layers", type=int, default=8, help="of the random checkpoint")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {','.join(SETTINGS)}")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="generated for each prompt")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention backend")
    parser.add_argument("--boot", help="a module to import before vLLM, where parts of it are absent")
    parser.add_argument("--commit")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and write, or be one of the processes."""
    args = parse()
    if args.run:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        write_text(args.run, json.dumps(generate(args)))
        return
    check_writable(args.output)
    document = measure(args)
    if args.output:
        write_text(args.output, dumps(document))


if __name__ == "__main__":
    main()
