"""Perplexity and divergence, against torch's own functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from dsv4.cli._evaluate import compare, read_windows

VOCABULARY = 23


class Bigram(torch.nn.Module):
    """A language model: the next token's logits depend on the last token alone."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        super().__init__()
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.table += noise * torch.randn(self.table.shape, generator=torch.Generator().manual_seed(99))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(5))


def test_scores(windows):
    """Perplexity is exp(cross entropy) of all tokens but each window's first; KL is torch's; agreement is counted."""
    models = {"base": Bigram(0), "near": Bigram(0, noise=0.3)}
    scores = compare(models, windows, batch_size=3)
    logits = {name: model.table[windows[:, :-1]].flatten(0, 1).double() for name, model in models.items()}
    targets = windows[:, 1:].flatten()
    for name, score in scores.items():
        assert score.tokens == 7 * 11
        expected = functional.cross_entropy(logits[name], targets).exp().item()
        assert score.perplexity == pytest.approx(expected, rel=1e-6)
    base, near = (logits[name].log_softmax(dim=1) for name in models)
    expected = functional.kl_div(near, base, log_target=True, reduction="batchmean").item()
    assert scores["near"].kl == pytest.approx(expected, rel=1e-5)
    assert scores["near"].agreement == pytest.approx((near.argmax(1) == base.argmax(1)).double().mean().item())
    assert (scores["base"].kl, scores["base"].agreement) == (0.0, 1.0)


def test_batches_do_not_matter(windows):
    """Any batch size gives the same scores: an incomplete last batch has no larger weight."""
    models = {"base": Bigram(0), "far": Bigram(1)}
    one, many = compare(models, windows, batch_size=1), compare(models, windows, batch_size=7)
    assert one["far"].perplexity == pytest.approx(many["far"].perplexity, rel=1e-12)
    assert one["far"].kl == pytest.approx(many["far"].kl, rel=1e-12)


def test_standard_error(windows):
    """The error of KL is that of a mean over windows; one window has none."""
    models = {"base": Bigram(0), "far": Bigram(1)}
    single = [compare(models, window[None])["far"] for window in windows]
    assert single[0].kl_error is None
    spread = torch.tensor([score.kl for score in single], dtype=torch.float64).std().item()
    assert compare(models, windows)["far"].kl_error == pytest.approx(spread / 7**0.5, rel=1e-6)


def test_windows():
    """Windows follow each other without overlap, and what is left over is dropped."""

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    windows = read_windows(tokenizer, "abcdefgh", length=3)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert read_windows(tokenizer, "abcdefgh", length=3, most=1).tolist() == [[97, 98, 99]]
