"""The baseline that a language model must beat: unigrams and bigrams of tokens, fitted on the training split.

    python -m data.ngram --data runs/tokens [--run runs/base]

With --run, the last validation of a training run on these tokens is printed beside them.

Both are smoothed by absolute discounting with interpolation, the bigrams after Kneser and Ney (Ney, Essen and Kneser
1994, "On structuring probabilistic dependences in stochastic language modelling"; Chen and Goodman 1998, "An empirical
study of smoothing techniques for language modeling", compares the family). With c the counts, N1+ the numbers of
different neighbours and V the vocabulary:

    P(w)     = max(c(w) - D1, 0) / c()  +  D1 N1+ / c() * 1 / V
    P_KN(w)  = the same of the continuation counts N1+(. w), the number of different tokens seen before w
    P(w | v) = max(c(v w) - D2, 0) / c(v)  +  D2 N1+(v .) / c(v) * P_KN(w)

and each discount is n1 / (n1 + 2 n2), of the n1 counts that are one and the n2 that are two.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError, run

from .loader import TokenSplit, open_tokens

CHUNK = 2**24  # tokens counted at a time


@dataclass(frozen=True)
class NgramConfig:
    """Bits per byte of token unigrams and bigrams."""

    data: Path
    """Tokens folder, written by data.prepare."""
    run: Path | None = None
    """Folder of a training run to set beside the baselines."""


@dataclass(frozen=True)
class Bigrams:
    """A fitted model."""

    unigram: np.ndarray  # (V,) float64: P(w)
    continuation: np.ndarray  # (V,) float64: P_KN(w)
    pairs: np.ndarray  # (pairs,) int64, sorted: v * V + w of every bigram seen
    counts: np.ndarray  # (pairs,) int64: c(v w)
    contexts: np.ndarray  # (V,) int64: c(v)
    followers: np.ndarray  # (V,) int64: N1+(v .)
    discount: float  # D2

    def probability(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """P(following | previous): (N,) and (N,) token ids -> (N,) float64. An unseen context leaves P_KN alone."""
        pair = previous.astype(np.int64) * len(self.unigram) + following
        place = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        count = np.where(self.pairs[place] == pair, self.counts[place], 0)
        seen = np.maximum(self.contexts[previous], 1)
        left_over = np.where(self.contexts[previous] > 0, self.discount * self.followers[previous] / seen, 1.0)
        return np.maximum(count - self.discount, 0) / seen + left_over * self.continuation[following]


def bigram_bits_per_byte(folder: Path) -> dict[str, float]:
    """Fit on the training split, measure on the validation split of a tokens folder.

    Returns `{unigram,bigram}_loss`, nats a token over every token of the split, end-of-text tokens among them, and
    `{unigram,bigram}_bits_per_byte`, the same nats / ln 2 / bytes of the validation text. Raises UserError as
    `open_tokens` does.
    """
    dataset = open_tokens(folder)
    model = fit_bigrams(dataset.splits["train"])
    validation = dataset.splits["validation"]
    nats = np.zeros(2)
    for tokens in chunks(validation):
        previous, following = tokens[:-1], tokens[1:]
        nats[0] -= np.log(model.unigram[following]).sum()
        nats[1] -= np.log(model.probability(previous, following)).sum()
    loss, bits = nats / len(validation), nats / math.log(2) / validation.bytes
    return {
        "unigram_loss": float(loss[0]),
        "unigram_bits_per_byte": float(bits[0]),
        "bigram_loss": float(loss[1]),
        "bigram_bits_per_byte": float(bits[1]),
    }


def chunks(split: TokenSplit, size: int = CHUNK) -> Iterator[np.ndarray]:
    """The split's tokens, `size` at a time, each chunk led by the token before it; the first by the split's last.

    That last token is an end-of-text, so that the first document, like every other, is predicted from one.
    """
    total = len(split)
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield split.read_ring((0, total), (start - 1) % total, stop - start + 1)


def fit_bigrams(split: TokenSplit) -> Bigrams:
    """Count the bigrams of a split, a bounded number of tokens at a time, and smooth them."""
    vocabulary = split.vocab_size
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for tokens in tqdm(chunks(split), desc="count bigrams", disable=None, leave=False):
        new = np.unique(tokens[:-1].astype(np.int64) * vocabulary + tokens[1:], return_counts=True)
        pairs, counts = add_counts((pairs, counts), new)
    first, second = np.divmod(pairs, vocabulary)
    contexts = np.bincount(first, counts, vocabulary).astype(np.int64)
    unigrams = np.bincount(second, counts, vocabulary).astype(np.int64)
    followers = np.bincount(first, minlength=vocabulary)
    predecessors = np.bincount(second, minlength=vocabulary)
    unigram, continuation = smooth(unigrams), smooth(predecessors)
    return Bigrams(unigram, continuation, pairs, counts, contexts, followers, estimate_discount(counts))


Counts = tuple[np.ndarray, np.ndarray]  # (keys,) sorted and (keys,) counts


def add_counts(one: Counts, other: Counts) -> Counts:
    """The sum of two sparse counts."""
    keys, places = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    counts[places[: len(one[0])]] += one[1]
    counts[places[len(one[0]) :]] += other[1]
    return keys, counts


def estimate_discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2), by leaving one out; 0.5 where nothing was seen once, since what is unseen needs a share."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else 0.5


def smooth(counts: np.ndarray) -> np.ndarray:
    """(V,) counts -> (V,) float64 probabilities: discounted, and what that frees shared out evenly."""
    discount = estimate_discount(counts)
    left_over = discount * np.count_nonzero(counts) / counts.sum()
    return np.maximum(counts - discount, 0) / counts.sum() + left_over / len(counts)


def last_validation(run: Path, data: Path) -> tuple[float, float]:
    """Loss and bits per byte of a run's last validation. UserError if it has none, or was on other tokens."""
    try:
        trained_on = json.loads((run / "run.json").read_text())["identity"]["data"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss, bits = [(m["loss"], m["bits_per_byte"]) for m in lines if m["split"] == "validation"][-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--run {run}: not a training run with a validation loss ({error!r})") from None
    if loss is None:
        raise UserError(f"--run {run}: its last validation loss is no number: the run diverged")
    if trained_on != open_tokens(data).fingerprint:
        raise UserError(f"--run {run} was trained on other tokens than {data}: give --data the folder of that run")
    return loss, bits


def main(config: NgramConfig) -> None:
    """Print both baselines, and the run's figures under them."""
    run_figures = config.run and last_validation(config.run, config.data)  # its mistakes show before the counting
    figures = bigram_bits_per_byte(config.data)
    rows = [(order, figures[f"{order}_loss"], figures[f"{order}_bits_per_byte"]) for order in ("unigram", "bigram")]
    for name, loss, bits in rows + ([(str(config.run), *run_figures)] if run_figures else []):
        print(f"{name}: {loss:.4f} nats a token, {bits:.4f} bits per byte")
    if run_figures:
        print(f"the run is {'below' if run_figures[1] < figures['bigram_bits_per_byte'] else 'NOT below'} the bigram")


if __name__ == "__main__":
    run(main, NgramConfig)
