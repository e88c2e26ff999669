"""Text sampled from the model: drawn from the model's own distribution, and started as the tokenizer starts a text."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from lockkit.lock.sampling import draw, sample_rows
from lockkit.models.families import FAMILIES
from lockkit.progress import NoProgress


@pytest.mark.parametrize("vocab", [1, 7, 511, 512, 513, 1500])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(monkeypatch, vocab):
    monkeypatch.setattr("lockkit.measure.totals.CHUNK_LOGITS", 10_000 * min(vocab, 600))
    generator, count = torch.Generator().manual_seed(vocab), 40_000
    logits = torch.randn(vocab, generator=generator) * 2
    never = [3, vocab - 1] if vocab > 5 else []
    drawn = draw(logits.expand(count, -1), never, generator).flatten()
    expected = logits.clone()
    expected[never] = -torch.inf
    expected = expected.softmax(-1) * count
    found = drawn.bincount(minlength=vocab).float()
    assert found[never].sum() == 0
    often = expected >= 20
    # Pearson's statistic over the frequent tokens has about their number as its mean, and twice that as its variance.
    statistic = ((found - expected)[often].square() / expected[often]).sum().item()
    degrees = int(often.sum())
    assert abs(found[~often].sum() - expected[~often].sum()) <= 5 * expected[~often].sum().sqrt() + 5
    assert statistic <= degrees + 5 * (2 * degrees) ** 0.5 + 5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_are_as_likely_as_the_models_own_distribution_says(model_type):
    """The rows' log-likelihood, in one pass without a cache, is that of a sample: minus the entropy, on average."""
    model = tiny_model(model_type)
    model.config.eos_token_id = None
    rows = sample_rows(model, 24, 150, 3, NoProgress())
    with torch.no_grad():
        log_p = model(rows[:, :-1]).logits.double().log_softmax(-1)
    surprise = -log_p.gather(-1, rows[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p + entropy[..., None]).square()).sum()
    assert abs((surprise - entropy).sum()) < 5 * variance.sqrt()
    assert entropy.mean() < 8.2  # nats; the distribution of a guess among all tokens has 8.32


def test_rows_begin_with_the_start_tokens_and_never_end_the_text():
    model = tiny_model("llama")
    model.config.eos_token_id = [0, 5]
    rows = sample_rows(model, 40, 300, 0, NoProgress(), start=[7, 9])
    assert rows.shape == (300, 40)
    assert (rows[:, :2] == torch.tensor([7, 9])).all()
    assert not torch.isin(rows[:, 2:], torch.tensor([0, 5])).any()
    assert torch.equal(rows, sample_rows(model, 40, 300, 0, NoProgress(), start=[7, 9]))
    assert not torch.equal(rows, sample_rows(model, 40, 300, 1, NoProgress(), start=[7, 9]))
