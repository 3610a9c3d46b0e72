"""Loading an NVFP4 checkpoint as a Transformers model, and streaming text from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

import dsv4.integrations.transformers as dsv4_hf
from dsv4.config import ActivationFormat, ActivationScale
from dsv4.errors import CheckpointError, ConfigError

MAX_NUM_TOKENS = 2048
"""Tokens a call for which the layers' scratch is sized; longer prompts run in chunks."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None leaves a setting to the checkpoint's ``generation_config.json``.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this probability is drawn from.
        repetition_penalty: above 1 makes tokens that were there before less likely.
        seed: of the random numbers.
    """

    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For ``model.generate``."""
        chosen = {key: value for key, value in asdict(self).items() if value is not None and key != "seed"}
        if self.temperature == 0:
            # Transformers objects to sampling settings where nothing is sampled.
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**chosen, "do_sample": True} if self.temperature or self.top_p else chosen


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        prompt: as the model got it.
        text: what came after it.
        prompt_tokens: tokens of the prompt.
        tokens: tokens generated, an end-of-text token included.
        first_token_s: seconds until the first of them.
        seconds: seconds for all.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    first_token_s: float
    seconds: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed: without the prompt's pass, which gives the first token. None for fewer than two tokens."""
        if self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_token_s)


def load_model(
    folder: Path,
    activation_format: ActivationFormat = "nvfp4",
    activation_scale: ActivationScale = "static",
    *,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    progress: bool = False,
) -> PreTrainedModel:
    """The checkpoint's model, its experts NVFP4, in ``eval`` mode.

    Raises:
        Dsv4Error: the checkpoint cannot be read, or the settings do not go together.
    """
    model = dsv4_hf.from_pretrained(
        folder,
        activation_format=activation_format,
        activation_scale=activation_scale,
        device=device,
        dtype=dtype,
        max_num_tokens=MAX_NUM_TOKENS,
        progress=progress,
        moe_options={"backend": backend},
        local_files_only=True,
    )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    try:
        # Never code that comes with the checkpoint: without an answer, Transformers would ask the terminal.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any kind, tokenizers' own (a bare Exception) included
        raise CheckpointError(
            f"{folder}: no tokenizer that Transformers can load ({type(error).__name__}); expected a sound "
            f"tokenizer.json"
        ) from error
    return tokenizer


def clean_prompt(prompt: str) -> str:
    """``prompt`` without blanks at its end.

    Tokenizers put a blank before a word into the word's token. After a lone blank a model has hardly ever seen a word,
    and goes on badly.
    """
    return prompt.rstrip(" \t")


class _Stream(TextStreamer):
    """Passes text on as soon as it is certain, and counts and times the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._prompt_is_next = True
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self.times += [time.perf_counter() - self.start] * value.numel()
        self._prompt_is_next = False
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


@torch.inference_mode()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue ``prompt``.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        prompt: plain text; no chat template is applied.
        max_new_tokens: tokens to generate at most.
        sampling: how.
        write: is called with pieces of the text as they come.

    Raises:
        ConfigError: an empty prompt, or one that leaves no room for ``max_new_tokens``.
    """
    prompt = clean_prompt(prompt)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ConfigError("the prompt is empty: expected some text to go on from")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length + max_new_tokens > most:
        raise ConfigError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones are more than the {most} positions that the "
            f"model has: shorten the prompt, or generate fewer tokens"
        )
    set_seed(sampling.seed)
    pieces: list[str] = []

    def collect(text: str) -> None:
        pieces.append(text)
        write(text)

    stream = _Stream(tokenizer, collect)
    cast(Any, model).generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=stream,
        pad_token_id=tokenizer.eos_token_id,
        **sampling.arguments(),
    )
    return Generation(prompt, "".join(pieces), length, len(stream.times), stream.times[0], stream.times[-1])
