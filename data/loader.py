"""Batches of tokens, read from memory-mapped shards as a pure function of (seed, step, global batch size).

Nothing here has a state to save. Sample number `i = step * global_batch_size + row` decides everything:

    epoch  = i // windows                            how often this source has been walked
    window = permute(i % windows, windows, key)      a keyed permutation, computed and never stored
    start  = (offset(epoch) + window * T) mod n      where its T + 1 tokens begin in the source's n tokens

so 1, 2 or 8 processes that each take their rows of the global batch see the same tokens in the same order, a resumed
run goes on where it stopped, and the end of an epoch is nothing special.

A source is read as a ring: its last document closes with the end-of-text token, so its first document follows as any
other would. That lets every epoch start its cuts at another place and still hold the same number of windows.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import UserError

IGNORED = -100  # a target that no loss counts, as in torch's cross entropy
MIX_CYCLE = 1000  # a mixture repeats after this many samples: weights are honoured to a tenth of a percent
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: SplitMix64's step
_FEISTEL_ROUNDS = 6  # Luby and Rackoff prove 4 for large blocks; two more because small data sets make small blocks


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split: shards on disk, read as one run. Offsets count tokens from the split's first."""

    paths: tuple[Path, ...]
    shards: tuple[np.ndarray, ...]  # (tokens,) uint16 or uint32 each, memory-mapped
    ends: np.ndarray  # (shards,) int64: the offset behind each shard
    spans: dict[str, tuple[int, int]]  # source -> (start, stop)
    bytes: int  # of UTF-8 text, the end-of-text tokens not counted
    vocab_size: int

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop, (stop - start,), in the shards' dtype.

        Raises UserError, naming the shard, for a token outside the vocabulary: checked here, on what is read, since a
        check of everything at the start would read a terabyte to train on a part of it.
        """
        pieces = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[shard]) - len(self.shards[shard])
            piece = self.shards[shard][start - begin : stop - begin]
            if piece.max() >= self.vocab_size:
                where = f"{self.paths[shard]}: token {piece.max()} at about {start - begin}"
                raise UserError(f"{where} is outside the vocabulary of {self.vocab_size}: run data.prepare again")
            pieces.append(piece)
            start += len(piece)
            shard += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read_ring(self, span: tuple[int, int], start: int, length: int) -> np.ndarray:
        """`length` tokens from offset `start`, going on at the span's first token behind its last."""
        span_start, span_stop = span
        if start + length <= span_stop:
            return self.read(start, start + length)
        wrapped = start + length - span_stop
        return np.concatenate([self.read(start, span_stop), self.read(span_start, span_start + wrapped)])


@dataclass(frozen=True)
class TokenDataset:
    """A folder that `data.prepare` wrote, opened and checked."""

    folder: Path
    manifest: dict[str, Any]
    fingerprint: str  # sha256 of manifest.json, which holds the sha256 of every shard
    splits: dict[str, TokenSplit]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["end_of_text"]


def open_tokens(folder: Path) -> TokenDataset:
    """Open a tokens folder; the shards are mapped, not read.

    Raises UserError for a missing or malformed manifest, and for a shard that is missing, cut off, of another length or
    of another dtype than the manifest says.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: make the tokens with python -m data.prepare --out {folder}")
    text = path.read_bytes()
    try:
        manifest = json.loads(text)
        splits = {name: _open_split(path.parent, name, manifest) for name in ("train", "validation")}
        if not 0 <= manifest["end_of_text"] < manifest["vocab_size"]:
            raise UserError(f"{path}: end_of_text is outside the vocabulary: run data.prepare again")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest ({error!r}): run data.prepare again") from None
    return TokenDataset(path.parent, manifest, hashlib.sha256(text).hexdigest(), splits)


def _open_split(folder: Path, name: str, manifest: dict[str, Any]) -> TokenSplit:
    """Map the shards of one split and check the manifest's figures against each other and against the files."""
    split, dtype = manifest["splits"][name], np.dtype(manifest["dtype"])
    paths = tuple(folder / shard["file"] for shard in split["shards"])
    lengths = [shard["tokens"] for shard in split["shards"]]
    shards = tuple(_open_shard(path, tokens, dtype) for path, tokens in zip(paths, lengths, strict=True))
    spans = {source["source"]: (source["start"], source["stop"]) for source in split["sources"]}
    edges = [0, *(edge for span in spans.values() for edge in span), split["tokens"]]
    meet = edges[::2] == edges[1::2] and all(start < stop for start, stop in spans.values())
    if not shards or not meet or sum(lengths) != split["tokens"]:
        raise UserError(f"{folder / 'manifest.json'}: the {name} split does not add up: run data.prepare again")
    ends = np.cumsum(lengths)
    return TokenSplit(paths, shards, ends, spans, split["bytes"], manifest["vocab_size"])


def _open_shard(path: Path, tokens: int, dtype: np.dtype) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run data.prepare again") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is cut off or not a .npy file ({error}): run data.prepare again") from None
    if shard.shape != (tokens,) or shard.dtype != dtype:
        found = f"{shard.dtype} of shape {shard.shape}"
        raise UserError(f"{path} holds {found}, the manifest says {dtype} ({tokens},): run data.prepare again")
    return shard.view(np.ndarray)  # slices of np.memmap cost three times those of a plain array


def mix64(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one by one: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 15)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The place of `index` in a pseudo-random permutation of range(size) that `key` chooses. No table: O(1) memory.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; a result outside range(size) is fed in
    again until it falls inside, "cycle walking" (Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
    section 3), which takes fewer than four turns on average.

    Args: index, (N,) uint64 below size; key, (N,) uint64, well mixed. Returns (N,) uint64 below size.
    """
    result = _feistel(index, size, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], size, key[outside])
    return result


def _feistel(block: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    left, right = block >> half, block & mask
    for _ in range(_FEISTEL_ROUNDS):
        key = key + _GOLDEN_GAMMA
        left, right = right, left ^ (mix64(key ^ right) & mask)
    return (left << half) | right


def source_key(seed: int, source: str) -> int:
    """A 64-bit key of (seed, source): a source's order does not depend on which others are in the mixture."""
    return int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:8], "little")


def window_starts(number: np.ndarray, span: tuple[int, int], sequence_length: int, key: int) -> np.ndarray:
    """Where the windows of a source's samples begin.

    Args: number, (N,) int64, counts the samples drawn from this source; span, its (start, stop); key, `source_key`.
    Returns (N,) int64 offsets in the split. Any `windows = (stop - start) // sequence_length` samples that make up an
    epoch are stretches without overlap, each taken once.
    """
    start, stop = span
    windows = (stop - start) // sequence_length
    epoch, index = np.divmod(number.astype(np.uint64), np.uint64(windows))
    epoch_key = mix64(np.uint64(key) ^ mix64(epoch + np.uint64(1)))
    offset = mix64(epoch_key) % np.uint64(stop - start)
    window = permute(index, windows, epoch_key)
    return start + ((offset + window * np.uint64(sequence_length)) % np.uint64(stop - start)).astype(np.int64)


class Mixture:
    """Which source each sample comes from: MIX_CYCLE slots shared out by weight, shuffled by the key, repeated."""

    def __init__(self, weights: dict[str, float], key: int):
        self.sources = sorted(weights)  # the order of the flags changes nothing
        slots = apportion([weights[source] for source in self.sources], MIX_CYCLE)
        if 0 in slots:
            rare = self.sources[slots.index(0)]
            raise UserError(f"--mix: the weight of {rare} is below 1/{MIX_CYCLE} of the sum: raise it or leave it out")
        cycle = np.repeat(np.arange(len(slots)), slots)
        order = permute(np.arange(MIX_CYCLE, dtype=np.uint64), MIX_CYCLE, np.full(MIX_CYCLE, key, np.uint64))
        self.cycle = cycle[order.astype(np.int64)]  # (MIX_CYCLE,) index into sources
        drawn = self.cycle[:, None] == np.arange(len(slots))  # (MIX_CYCLE, sources)
        self.slots = drawn.sum(0)  # (sources,)
        self.before = drawn.cumsum(0) - drawn  # (MIX_CYCLE, sources): drawn earlier in the same cycle

    def draw(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples, (N,) int64 -> the index of each one's source, and its number among that source's samples."""
        turn, slot = np.divmod(sample, MIX_CYCLE)
        source = self.cycle[slot]
        return source, turn * self.slots[source] + self.before[slot, source]


def apportion(weights: list[float], seats: int) -> list[int]:
    """Share `seats` out in proportion to `weights` by largest remainder (Hamilton's method); the sum is exact."""
    quotas = [weight / sum(weights) * seats for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda place: shares[place] - quotas[place])
    for place in by_remainder[: seats - sum(shares)]:
        shares[place] += 1
    return shares


class TokenBatches:
    """The batches of a training run, and the fixed windows of its validation.

    Args: folder, a tokens folder; sequence_length, T; global_batch_size, sequences an optimizer step over all ranks and
    micro-steps; seed, of the order; mix, (source, weight) pairs, or none for all tokens as one stream.
    Raises UserError for what `open_tokens` refuses, for an unknown source or a weight that is not positive, and where a
    source has fewer tokens than one sequence.
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        mix: tuple[tuple[str, float], ...] = (),
    ):
        self.dataset = open_tokens(folder)
        self.train, self.validation_split = self.dataset.splits["train"], self.dataset.splits["validation"]
        self.sequence_length, self.global_batch_size = sequence_length, global_batch_size
        spans = self.train.spans if mix else {"all": (0, len(self.train))}
        weights = check_mix(mix, spans) if mix else {"all": 1.0}
        self.mixture = Mixture(weights, source_key(seed, "the mixture"))
        self.spans = [spans[source] for source in self.mixture.sources]
        self.keys = [source_key(seed, source) for source in self.mixture.sources]
        for source, (start, stop) in zip(self.mixture.sources, self.spans, strict=True):
            if stop - start < sequence_length:
                have = f"{folder}: {source} has {stop - start:,} training tokens"
                raise UserError(
                    f"{have}, fewer than one sequence of {sequence_length:,}: add text or shorten --sequence-length"
                )

    def sequences(self, step: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows start..stop of the global batch of `step`: inputs and targets, (stop - start, T) int64 each."""
        sample = step * self.global_batch_size + np.arange(start, stop, dtype=np.int64)
        source, number = self.mixture.draw(sample)
        rows = np.empty((len(sample), self.sequence_length + 1), np.int64)
        for index in np.unique(source):
            places = np.flatnonzero(source == index)
            starts = window_starts(number[places], self.spans[index], self.sequence_length, self.keys[index])
            for place, begin in zip(places, starts.tolist(), strict=True):
                rows[place] = self.train.read_ring(self.spans[index], begin, self.sequence_length + 1)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def validation_windows(self) -> int:
        """How many windows of T targets cover the validation split."""
        return -(-len(self.validation_split) // self.sequence_length)

    def validation(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Windows start..stop of the validation split: inputs and targets, (stop - start, T) int64 each.

        Over all windows every token of the split is a target once, the first one predicted from the end-of-text token
        that closes the split; behind the last token targets are -100 and inputs end-of-text.
        """
        split, length = self.validation_split, self.sequence_length
        inputs = np.full((stop - start, length), self.dataset.end_of_text, np.int64)
        targets = np.full((stop - start, length), IGNORED, np.int64)
        for row, window in enumerate(range(start, stop)):
            first, last = window * length, min((window + 1) * length, len(split))
            tokens = split.read_ring((0, len(split)), (first - 1) % len(split), last - first + 1)
            inputs[row, : last - first] = tokens[:-1]
            targets[row, : last - first] = tokens[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def check_mix(mix: tuple[tuple[str, float], ...], known: dict[str, Any]) -> dict[str, float]:
    """`--mix` as a dict. Raises UserError for an unknown or repeated source or a weight that is not positive."""
    for source, weight in mix:
        if source not in known:
            raise UserError(f"--mix: no source {source} in the training tokens; there are: {', '.join(sorted(known))}")
        if not 0 < weight < float("inf"):
            raise UserError(f"--mix: the weight of {source} is {weight}: give a positive number")
    weights = dict(mix)
    if len(weights) < len(mix):
        raise UserError(f"--mix: a source is named twice: {' '.join(source for source, _ in mix)}")
    return weights


def documents(inputs: Tensor, end_of_text: int) -> Tensor:
    """The document each input token belongs to, counted from 0 in each row: (B, T) -> (B, T) int64.

    An end-of-text token opens the next document rather than closing its own: at its place the target is the first token
    of the next document, which the model must predict without seeing the one before. As a target it still belongs to
    the document it ends, since the place that predicts it is that document's last token.
    """
    return (inputs == end_of_text).cumsum(-1)
