#!/usr/bin/env python3
"""A small DeepSeek-V4 model with NVFP4 experts: text from it, and what 4 bits do to it.

    python examples/demo.py [--model FOLDER] [--picture FILE] [--json FILE]

First the NVFP4 checkpoint is loaded with Transformers, and text is generated through our experts (W4A4, with the
checkpoint's static activation scales). Then four models read the same held-out text: Transformers' own experts with
bf16 weights, computed in fp32, and our NVFP4 experts in three modes. The rest of the model is the same in all four, in
fp32, so that every difference comes from the routed experts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli._figures import check_matplotlib, plot_quality
from dsv4.cli._modes import BASELINE, MODES
from dsv4.cli._output import check_writable, console, dumps, quiet_transformers, write_text
from dsv4.errors import Dsv4Error

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("def read_file(path):", "class Error(Exception):", "import os\n")
COMPARED = ("w4a16", "w4a4-static", "w4a4-token")
GENERATES = "w4a4-static"


def generate(screen: Console, folder: Path, tokens: int) -> float:
    """Stream a continuation of each prompt; returns tokens per second."""
    from dsv4.cli._generation import Sampling, generate_text, load_model, load_tokenizer

    mode = MODES[GENERATES]
    model = load_model(folder, mode.activation_format, mode.activation_scale, dtype="float32")
    tokenizer = load_tokenizer(folder)
    sampling = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=2)
    decoded, seconds = 0, 0.0
    for prompt in PROMPTS:
        screen.rule(style="dim")
        screen.print(prompt, end="", style="bold")
        result = generate_text(
            model, tokenizer, prompt, tokens, sampling, lambda text: screen.print(text, end="", soft_wrap=True)
        )
        screen.print()
        decoded += result.tokens - 1
        seconds += result.seconds - result.first_token_s
    return decoded / seconds


def evaluate(folder: Path, text: str, most_windows: int | None) -> dict[str, Any]:
    """Perplexity, KL divergence and bytes of every mode, as a JSON document."""
    import torch
    from transformers import AutoModelForCausalLM

    import dsv4.integrations.transformers as dsv4_hf
    from dsv4.cli._evaluate import WINDOW, compare, read_windows
    from dsv4.cli._generation import load_model, load_tokenizer

    baseline = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.float32).eval()
    models: dict[str, PreTrainedModel] = {BASELINE: baseline}
    sizes = {BASELINE: 2 * sum(p.numel() for name, p in baseline.named_parameters() if ".experts." in name)}
    for name in COMPARED:
        mode = MODES[name]
        model = load_model(folder / "nvfp4", mode.activation_format, mode.activation_scale, dtype="float32")
        models[name] = model
        sizes[name] = sum(moe.weight_nbytes for moe in dsv4_hf.experts_of(model).values())
    windows = read_windows(load_tokenizer(folder / "nvfp4"), text, most=most_windows)
    scores = compare(models, windows, BASELINE)
    return {
        "tokens": scores[BASELINE].tokens,
        "window": WINDOW,
        "rows": [{"mode": name, **asdict(score), "expert_bytes": sizes[name]} for name, score in scores.items()],
    }


def show(screen: Console, document: dict[str, Any]) -> None:
    """The table."""
    from rich.table import Table

    rows = document["rows"]
    base = rows[0]
    table = Table(
        title=f"{document['tokens']:,} held-out tokens, in windows of {document['window']}", title_style="bold"
    )
    table.add_column("routed experts")
    for column in (
        "perplexity",
        "change",
        "KL to bf16\n[nats/token]",
        "same first\nchoice",
        "expert\nweights",
        "of bf16",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        quantized = row is not base
        table.add_row(
            MODES[row["mode"]].label if quantized else BASELINE,
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / base['perplexity'] - 1:+.2%}" if quantized else "",
            f"{row['kl']:.5f}" if quantized else "",
            f"{row['agreement']:.1%}" if quantized else "",
            f"{row['expert_bytes'] / 1e6:.2f} MB",
            f"{row['expert_bytes'] / base['expert_bytes']:.3f}" if quantized else "",
        )
    screen.print(table)
    screen.print(
        "bf16: Transformers' own experts, weights rounded to bf16, computed in fp32. All else is equal and in fp32.",
        style="dim",
    )


def run(args: argparse.Namespace) -> None:
    """The whole demonstration."""
    check_matplotlib(args.picture)
    check_writable(args.picture)
    check_writable(args.json)
    screen = console()
    with screen.status("starting"):
        quiet_transformers()
        import torch

        from dsv4.cli._machine import cpu_model, versions

    # Operations on a model this small take less time than waking a second thread, least of all on a busy machine.
    torch.set_num_threads(1)
    speed = generate(screen, args.model / "nvfp4", args.tokens)
    screen.rule(style="dim")
    with screen.status("reading the held-out text with every model"):
        text = args.heldout.read_text(encoding="utf-8")
        document = evaluate(args.model, text, args.windows)
    show(screen, document)
    screen.print(f"generation: {speed:.1f} tokens/s ({MODES[GENERATES].label}, {cpu_model()}, 1 thread)")
    title = (
        f"NVFP4 experts in a small DeepSeek-V4 model: what they cost and save ({document['tokens']:,} held-out tokens)"
    )
    plot_quality(document["rows"], title, args.picture)
    screen.print(f"picture: {args.picture}", soft_wrap=True)
    if args.json is not None:
        facts = {"cpu": cpu_model(), "versions": versions(), "tokens_per_s": round(speed, 2)}
        write_text(args.json, dumps({**facts, **document}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-deepseek-v4", help="has bf16/ and nvfp4/")
    parser.add_argument("--heldout", type=Path, default=ROOT / "models" / "heldout.txt")
    parser.add_argument("--tokens", type=int, default=120, help="to generate for each prompt")
    parser.add_argument("--windows", type=int, help="of the held-out text, at most (default: all)")
    parser.add_argument("--picture", type=Path, default=ROOT / "out" / "demo.png")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    try:
        run(parser.parse_args())
    except (Dsv4Error, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
