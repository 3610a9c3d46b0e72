"""``dsv4 generate``: text from an NVFP4 checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsv4.cli._output import note, print_json, quiet_transformers


class Format(StrEnum):
    """The values of :data:`dsv4.config.ActivationFormat`."""

    NVFP4 = "nvfp4"
    BF16 = "bf16"


class Scale(StrEnum):
    """The values of :data:`dsv4.config.ActivationScale` that need no calibration data."""

    STATIC = "static"
    TOKEN = "token"
    TENSOR = "tensor"


class Dtype(StrEnum):
    """Of everything but the experts."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def generate(
    model: Annotated[Path, typer.Argument(help="The folder of an NVFP4 checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, as it is: no chat template is applied.")] = "def main(",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 100,
    activation_format: Annotated[Format, typer.Option(help="nvfp4 is W4A4, bf16 is W4A16.")] = Format.NVFP4,
    activation_scale: Annotated[
        Scale, typer.Option(help="Of W4A4: the checkpoint's, each token's own, or one for all tokens of a call.")
    ] = Scale.STATIC,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of all but the experts; auto is the checkpoint's.")] = Dtype.AUTO,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy (default: the checkpoint's).")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Nucleus sampling (default: the checkpoint's).")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, help="Default: the checkpoint's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random numbers.")] = 0,
    backend: Annotated[str, typer.Option(help="A backend's name; see dsv4 doctor.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of streaming.")] = False,
) -> None:
    """Generate text with an NVFP4 checkpoint, through Transformers, offline."""
    from dsv4.checkpoints import open_checkpoint
    from dsv4.cli._machine import torch_device

    open_checkpoint(model).close()  # what is no checkpoint should be told before Transformers is imported, not after
    target = torch_device(device)

    quiet_transformers()
    from dsv4.cli._generation import Sampling, clean_prompt, generate_text, load_model, load_tokenizer

    if prompt != clean_prompt(prompt):
        note("the prompt's trailing blanks were dropped: they belong to the next word's token")
    tokenizer = load_tokenizer(model)
    loaded = load_model(
        model,
        activation_format.value,
        activation_scale.value,
        device=target,
        dtype=dtype.value,
        backend=backend,
        progress=sys.stderr.isatty() and not json,
    )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    sampling = Sampling(temperature, top_p, repetition_penalty, seed)
    if json:
        result = generate_text(loaded, tokenizer, prompt, max_new_tokens, sampling)
        modes = {"activation_format": activation_format.value, "activation_scale": activation_scale.value}
        print_json(
            {"model": str(model), **modes, "device": str(target), **asdict(result), "tokens_per_s": result.tokens_per_s}
        )
        return
    write(clean_prompt(prompt))
    result = generate_text(loaded, tokenizer, prompt, max_new_tokens, sampling, write)
    write("\n")
    speed = f", {result.tokens_per_s:.1f} tokens/s" if result.tokens_per_s else ""
    print(f"{result.tokens} tokens, the first after {result.first_token_s:.2f} s{speed}", file=sys.stderr)
