"""The n-gram baseline against numbers worked by hand, and its probabilities against 1."""

import math
from pathlib import Path

import numpy as np
import pytest
from test_loader import write_tokens

from data.loader import open_tokens
from data.ngram import bigram_bits_per_byte, chunks, estimate_discount, fit_bigrams, smooth

VOCABULARY = 5
TRAIN, VALIDATION = [1, 2, 1, 2, 1, 3, 0], [1, 2, 0]  # 0 is the end-of-text token, 4 is never seen


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = write_tokens(tmp_path / "tokens", [("a", np.array(TRAIN))], np.array(VALIDATION), 4)
    manifest = (folder / "manifest.json").read_text()
    manifest = manifest.replace('"vocab_size": 60000', f'"vocab_size": {VOCABULARY}').replace(
        '"end_of_text": 99', '"end_of_text": 0'
    )
    (folder / "manifest.json").write_text(manifest)
    return folder


def test_hand_worked_probabilities(tokens: Path):
    """Bigrams 01, 12 twice, 21 twice, 13, 30: D2 = 3 / (3 + 2 * 2). Unigrams 1, 3, 2, 1, 0: D1 = 2 / (2 + 2).

    Continuations 1, 2, 1, 1, 0: D = 3 / (3 + 2), of which 0.6 * 4 / 5 / 5 = 0.096 goes to every token.
    """
    model = fit_bigrams(open_tokens(tokens).splits["train"])
    assert model.discount == 3 / 7
    assert model.unigram * 7 == pytest.approx([0.9, 2.9, 1.9, 0.9, 0.4])
    assert model.continuation == pytest.approx([0.176, 0.376, 0.176, 0.176, 0.096])
    previous, following = np.array([1, 1, 1, 0, 4]), np.array([2, 3, 4, 1, 2])
    expected = [(11 + 6 * 0.176) / 21, (4 + 6 * 0.176) / 21, 6 * 0.096 / 21, (4 + 3 * 0.376) / 7, 0.176]
    assert model.probability(previous, following) == pytest.approx(expected)


def test_hand_worked_bits_per_byte(tokens: Path):
    """Validation 1 2 0 after an end-of-text token; its manifest counts 7 bytes of text."""
    figures = bigram_bits_per_byte(tokens)
    unigram = -math.log(2.9 / 7) - math.log(1.9 / 7) - math.log(0.9 / 7)
    bigram = -math.log((4 + 3 * 0.376) / 7) - math.log((11 + 6 * 0.176) / 21) - math.log(3 / 14 * 0.176)
    assert figures["unigram_loss"] == pytest.approx(unigram / 3)
    assert figures["bigram_loss"] == pytest.approx(bigram / 3)
    assert figures["unigram_bits_per_byte"] == pytest.approx(unigram / math.log(2) / 7)
    assert figures["bigram_bits_per_byte"] == pytest.approx(bigram / math.log(2) / 7)


def test_every_row_sums_to_one(tmp_path: Path):
    words = np.random.default_rng(0).zipf(1.5, 5000) % 200
    folder = write_tokens(tmp_path / "tokens", [("a", words)], words[:9], 999)
    split = open_tokens(folder).splits["train"]
    object.__setattr__(split, "vocab_size", 250)
    model = fit_bigrams(split)
    every = np.arange(250)
    rows = [model.probability(np.full(250, context), every) for context in range(250)]
    assert np.allclose(np.sum(rows, 1), 1) and np.min(rows) > 0
    assert model.unigram.sum() == pytest.approx(1) and model.unigram.min() > 0


def test_counts_do_not_depend_on_the_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = np.random.default_rng(1).integers(0, 20, 500)
    split = open_tokens(write_tokens(tmp_path / "tokens", [("a", words)], words, 77)).splits["train"]
    whole = fit_bigrams(split)
    monkeypatch.setattr("data.ngram.chunks", lambda split: chunks(split, 37))
    parts = fit_bigrams(split)
    assert np.array_equal(parts.pairs, whole.pairs) and np.array_equal(parts.counts, whole.counts)
    naive = sorted({(int(v), int(w)) for v, w in zip(np.roll(words, 1), words, strict=True)})
    assert [divmod(int(pair), 60000) for pair in whole.pairs] == naive
    assert whole.counts.sum() == 500


def test_discounts():
    assert estimate_discount(np.array([1, 1, 1, 2, 5])) == 3 / 5
    assert estimate_discount(np.array([2, 2, 7])) == 0.5  # nothing seen once
    assert smooth(np.array([3, 0])) == pytest.approx([2.5 / 3 + 0.25 / 3, 0.25 / 3])
