#!/usr/bin/env python3
"""Train the small DeepSeek-V4 model that the tests and examples of this repository run on.

The architecture is the real one (Transformers' `deepseek_v4`: hash-routed and learned top-6 routers over 16 experts, a
shared expert, SwiGLU with limit 10, sliding, compressed-sparse and heavily-compressed attention, hyper-connections);
only the sizes are small. The text is one that every machine has: the Python standard library. Data order, tokenizer and
weights follow from fixed seeds; one CPU thread needs less than half an hour for the shipped run:

    python scripts/train_small_model.py --out models/tiny-deepseek-v4/bf16

Why the weights are worth shipping: a random model hides wrong kernels, since any garbage is as good as its output. Here
the experts carry the prediction, so swapped gate/up rows, rolled experts or a forgotten clamp all show in perplexity.

What a reader who changes this script should know (each point fails silently):

* `tid2eid`, the token-to-expert table of a hash-routed layer, initialises to zeros: every token would use expert 0 six
  times over. `fill_hash_table` gives each token six different experts and each expert the same number of tokens.
* The learned routers collapse onto a few experts unless something balances them. As DeepSeek does, a bias that only
  selects (it never weighs) moves by 1e-3 against each expert's load after every step. It is a buffer: no optimizer
  sees it, and it stays fp32 in the file.
* The indexer of compressed-sparse attention picks blocks through a top-k, which passes no gradient. It is frozen, and
  `index_topk` is at least context/4, so that it keeps every block and a cached decode equals the full forward.
* In so short a run no gate or up value reaches the SwiGLU limit of 10, and a kernel that forgets the clamp would pass.
  So after the main run `widen_up` moves a factor of 4 from the down projections to the up projections, which leaves the
  function as it is except where the clamp now bites, and 200 more steps let the model settle with it.
* Weights are trained in fp32 and rounded to bf16 once, at the end; the modules that Transformers keeps in fp32 (norms,
  sinks, hyper-connections, router bias) are saved in fp32.
* `save_pretrained` writes DeepSeek's own tensor names, one tensor per expert: `layers.N.ffn.experts.E.{w1,w3,w2}`.
* The standard library differs between Python versions. So held-out files are chosen by a hash of their name, and the
  numbers in the model card are measured on a fixed excerpt of them, `models/heldout.txt`, which ships.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256  # tokens per training sequence and per held-out window
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"  # ids 0 and 1: what DeepseekV4Config expects by default
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "encodings", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

# Sizes: the bf16 file and its NVFP4 twin together stay below 8 MB, with most parameters in the routed experts.
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "compressed_sparse", "heavily_compressed", "sliding")],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    "sliding_window": 64,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 512,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": True,
}


# ---------------------------------------------------------------------------------------------------------------- text


def stdlib_files() -> list[tuple[str, str]]:
    """(name, text) of every standard-library source, sorted by name; names are relative and use forward slashes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata* records how and where this interpreter was built: not a source, and different everywhere.
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            files.append((relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return files


def name_hash(name: str) -> int:
    """A hash that, unlike `hash()`, is the same in every process and Python version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """About 3 % of the text."""
    return name_hash(name) % 32 == 0


def heldout_excerpts(files: list[tuple[str, str]], excerpt_chars: int = 8192) -> str:
    """One contiguous excerpt of whole lines from the middle of each held-out file that is long enough."""
    excerpts = []
    for text in (text for name, text in files if is_held_out(name) and len(text) > 2 * excerpt_chars):
        start = text.index("\n", (len(text) - excerpt_chars) // 2) + 1
        excerpts.append(text[start : text.index("\n", start + excerpt_chars) + 1])
    return "\n".join(excerpts)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. The GPT-2 split keeps an indentation in one token, which is what Python text needs most."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=1024)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one int64 vector, each between BOS and EOS."""
    ids: list[int] = []
    for text_ids in tokenizer(texts, verbose=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def batches(stream: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [batch_size, CONTEXT + 1] batches: every epoch cuts the stream at another phase, in another order."""
    generator = torch.Generator().manual_seed(seed)
    pieces = (len(stream) - CONTEXT) // CONTEXT - 1
    while True:
        phase = int(torch.randint(CONTEXT, (1,), generator=generator))
        order = torch.randperm(pieces, generator=generator)
        for i in range(0, pieces - batch_size + 1, batch_size):
            starts = phase + CONTEXT * order[i : i + batch_size]
            yield stream[starts[:, None] + torch.arange(CONTEXT + 1)]


# --------------------------------------------------------------------------------------------------------------- model


def fill_hash_table(table: torch.Tensor, num_experts: int, seed: int) -> None:
    """Fill `tid2eid` [vocab, k] so that a row holds k different experts and each expert is used equally often.

    Every `num_experts` tokens share a random permutation of the experts; the i-th of them gets the k entries from i on,
    cyclically. The tokens of such a group are random, so that neighbouring ids have nothing in common.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, k = table.shape
    for group in torch.randperm(vocab, generator=generator).split(num_experts):
        permutation = torch.randperm(num_experts, generator=generator)
        table[group] = permutation[(torch.arange(len(group))[:, None] + torch.arange(k)) % num_experts]


def build_model(seed: int) -> DeepseekV4ForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**SIZES))
    model.set_experts_implementation("grouped_mm")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("indexer" not in name)
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            fill_hash_table(layer.mlp.gate.tid2eid, model.config.n_routed_experts, seed)
    return model


@torch.no_grad()
def widen_up(model: DeepseekV4ForCausalLM, factor: float = 4.0) -> None:
    """Multiply the experts' up projections and divide their down projections: the same function, but for the clamp."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj[:, experts.intermediate_dim :] *= factor
        experts.down_proj /= factor


class LoadBalancer:
    """Counts the tokens of every expert and moves the selection bias of each learned router against them."""

    def __init__(self, model: DeepseekV4ForCausalLM, speed: float = 1e-3) -> None:
        self.speed = speed
        self.routers = [layer.mlp.gate for layer in model.model.layers if not layer.mlp.is_hash]
        self.loads = torch.zeros(len(self.routers), model.config.n_routed_experts)
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Callable[..., None]:
        def count(router: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if router.training:
                self.loads[index] += output[2].flatten().bincount(minlength=self.loads.shape[1])

        return count

    def step(self) -> float:
        """Update the biases; returns the load of the busiest expert of any layer over the mean load (1 is perfect)."""
        mean = self.loads.mean(dim=1, keepdim=True)
        for router, error in zip(self.routers, mean - self.loads, strict=True):
            router.e_score_correction_bias += self.speed * error.sign()
        imbalance = float((self.loads / mean).max())
        self.loads.zero_()
        return imbalance


# ----------------------------------------------------------------------------------------------------------- optimizer


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix, for a stack [n, rows, cols] at once.

    The quintic and its coefficients are Keller Jordan's: singular values end up within about 0.7 to 1.2.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal update: every direction of a matrix learns at the same speed.

    A group holds stacks of matrices [n, rows, cols] of one shape (an expert tensor is a stack over the experts), so
    that one batched iteration serves all of them.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rows, cols = group["shape"]
            updates = []
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["buffer"] = torch.zeros_like(parameter)
                buffer = state["buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(buffer, group["momentum"])
                updates.append(nesterov.view(-1, rows, cols))
            update = orthogonalize(torch.cat(updates))
            scale = -group["lr"] * max(1.0, rows / cols) ** 0.5
            for parameter, part in zip(group["params"], update.split([len(u) for u in updates]), strict=True):
                parameter.add_(part.reshape(parameter.shape), alpha=scale)


def build_optimizers(model: DeepseekV4ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections; AdamW for embedding, routers, hyper-connections, norms, sinks and position biases."""
    stacks: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
    rest = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "proj" not in name:
            rest.append(parameter)
            continue
        rows, cols = parameter.shape[-2:]
        if name.endswith("gate_up_proj"):
            rows //= 2  # gate and up are two matrices
        elif name.endswith("o_a_proj.weight"):
            rows //= model.config.o_groups  # block-diagonal: one matrix per group of heads
        stacks.setdefault((rows, cols), []).append(parameter)
    groups = [{"params": parameters, "shape": shape} for shape, parameters in stacks.items()]
    return [
        Muon(groups, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_factor(step: int, steps: int, settle_steps: int, warmup: float = 0.03, decay: float = 0.6) -> float:
    """Linear warm-up, plateau, linear decay to zero over the last `decay` of `steps`; then a small tooth to settle."""
    if step >= steps:
        return 0.15 * (1 - (step - steps) / settle_steps)
    progress = (step + 1) / steps
    return min(1.0, progress / warmup, (1 - progress + 1 / steps) / decay)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, float]:
    """Loss over non-overlapping windows of CONTEXT tokens (each predicts its last CONTEXT - 1; the rest is dropped).

    Returns nats per token, perplexity, and bits per byte: the one that can be compared between tokenizers.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(float(model(input_ids=w, labels=w, use_cache=False).loss) * len(w) for w in windows.split(8))
    model.train(was_training)
    loss = total / len(windows)
    bits_per_byte = loss / math.log(2) * len(ids) / len(text.encode())
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte, "windows": len(windows)}


def report(title: str, numbers: dict[str, float]) -> None:
    print(title, json.dumps({key: round(value, 4) for key, value in numbers.items()}), flush=True)


# --------------------------------------------------------------------------------------------------------------- train


def train(model: DeepseekV4ForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> None:
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    balancer = LoadBalancer(model)
    first_step = 0
    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        first_step = saved["step"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    model.train()
    start = time.perf_counter()
    running_loss = math.nan
    for step, batch in enumerate(batches(stream, args.batch_size, args.seed)):
        if step == args.steps + args.settle_steps:
            break
        if step < first_step:
            continue  # resumed: the same batches in the same order
        if step == args.steps:
            widen_up(model)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        factor = lr_factor(step, args.steps, args.settle_steps)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        imbalance = balancer.step()

        running_loss = loss.item() if math.isnan(running_loss) else 0.95 * running_loss + 0.05 * loss.item()
        if step % 20 == 0 or step + 1 == args.steps + args.settle_steps:
            seconds = time.perf_counter() - start
            speed = (step + 1 - first_step) * batch[:, 1:].numel() / seconds
            print(
                f"step {step:5d}  loss {running_loss:.4f}  lr x{factor:.3f}  {speed:6.0f} tok/s"
                f"  busiest expert {imbalance:.2f}x  {seconds / 60:5.1f} min",
                flush=True,
            )
        if args.checkpoint and step % 100 == 99:
            states = [optimizer.state_dict() for optimizer in optimizers]
            temporary = args.checkpoint.with_suffix(".tmp")
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": states}, temporary)
            temporary.replace(args.checkpoint)


def round_to_bf16(model: DeepseekV4ForCausalLM) -> None:
    """bf16 weights, except the modules that Transformers itself keeps in fp32 when it loads bf16."""
    model.config.dtype = torch.bfloat16
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for config, weights and tokenizer")
    parser.add_argument("--heldout", type=Path, default=Path(__file__).parents[1] / "models" / "heldout.txt")
    parser.add_argument("--steps", type=int, default=2600, help="of the main run")
    parser.add_argument("--settle-steps", type=int, default=200, help="after the experts were widened")
    parser.add_argument("--batch-size", type=int, default=4, help=f"sequences of {CONTEXT} tokens per step")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.012)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more than one may change the sums' last bits")
    parser.add_argument("--checkpoint", type=Path, help="training state: written here, resumed from here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    files = stdlib_files()
    texts = [text for name, text in files if not is_held_out(name)]
    if not args.heldout.exists():  # written once, then fixed: another Python version has another library
        args.heldout.write_text(heldout_excerpts(files), encoding="utf-8")
    heldout = args.heldout.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(texts, SIZES["vocab_size"])
    stream = token_stream(tokenizer, texts)
    print(f"{len(texts)} files, {len(stream)} tokens; held out: {len(files) - len(texts)} files", flush=True)

    model = build_model(args.seed)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    print(f"{total} parameters, {routed} of them in routed experts", flush=True)

    train(model, stream, args)
    report("held-out, fp32 weights:", evaluate(model, tokenizer, heldout))
    round_to_bf16(model)
    # Greedy decoding of so small a model loops at once.
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}
    model.generation_config.update(**sampling)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for file in args.out.iterdir():
        file.chmod(0o644)  # safetensors creates files that only their owner can read

    reloaded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    report("held-out, reloaded bf16 weights:", evaluate(reloaded, tokenizer, heldout))


if __name__ == "__main__":
    main()
