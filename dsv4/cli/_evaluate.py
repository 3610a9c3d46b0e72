"""How well a model predicts a text, and how far its predictions are from another model's.

Perplexity is ``exp`` of the mean negative log-likelihood of the next token. It moves little under quantization, and in
both directions. KL divergence compares the whole distribution at every position with that of a reference model: it is
zero only where the two agree, and tells small differences apart that perplexity does not.

::

    KL(p || q) = sum over the vocabulary of p * (log p - log q)          p: reference, q: the model; in nats

The models read the text side by side, batch by batch, so that no distributions have to be stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

WINDOW = 256


@dataclass(frozen=True)
class Quality:
    """What :func:`compare` says about one model.

    Attributes:
        tokens: predictions that were scored.
        perplexity: on the text.
        kl: mean ``KL(reference || model)`` a token, in nats; 0 for the reference itself.
        kl_error: standard error of ``kl``, from how it varies between windows; None for one window.
        agreement: the share of positions where the model's most likely token is the reference's.
    """

    tokens: int
    perplexity: float
    kl: float
    kl_error: float | None
    agreement: float


def read_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int = WINDOW, most: int | None = None
) -> Tensor:
    """``text`` as non-overlapping windows of tokens, int64 ``[n, length]``; an incomplete last one is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[:most]


@torch.inference_mode()
def compare(
    models: Mapping[str, nn.Module], windows: Tensor, reference: str | None = None, batch_size: int = 8
) -> dict[str, Quality]:
    """Score ``models`` on the same text. In each window all tokens but the first are predicted.

    Args:
        models: causal language models in ``eval`` mode, by name.
        windows: int64 ``[n, length]``.
        reference: the name of the model that KL and agreement refer to; by default the first.
        batch_size: windows at a time.
    """
    reference = reference or next(iter(models))
    totals = {name: _Totals() for name in models}
    for batch in windows.split(batch_size):
        targets = batch[:, 1:]
        base = _log_probabilities(models[reference], batch)
        for name, model in models.items():
            predicted = base if name == reference else _log_probabilities(model, batch)
            totals[name].add(predicted, base, targets)
    return {name: total.quality() for name, total in totals.items()}


def _log_probabilities(model: nn.Module, batch: Tensor) -> Tensor:
    """fp32 ``[n, length - 1, vocabulary]``: of the token after each position."""
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[:, :-1].float().log_softmax(dim=-1)


class _Totals:
    """Running sums over batches."""

    def __init__(self) -> None:
        self._loss: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._agree: list[Tensor] = []

    def add(self, predicted: Tensor, base: Tensor, targets: Tensor) -> None:
        """One batch's means, window by window."""
        self._loss.append(-predicted.gather(2, targets.unsqueeze(2)).squeeze(2).double().mean(dim=1))
        # Each term of the sum is weighed by p: where p is 0 in fp32, log p is finite, and the term 0.
        self._kl.append((base.exp() * (base - predicted)).sum(dim=2).double().mean(dim=1))
        self._agree.append((predicted.argmax(dim=2) == base.argmax(dim=2)).double().mean(dim=1))
        self._length = targets.shape[1]

    def quality(self) -> Quality:
        loss, kl, agree = (torch.cat(parts) for parts in (self._loss, self._kl, self._agree))
        windows = len(loss)
        error = kl.std().item() / math.sqrt(windows) if windows > 1 else None
        return Quality(
            windows * self._length, math.exp(loss.mean().item()), kl.mean().item(), error, agree.mean().item()
        )
