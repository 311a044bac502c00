"""The loader: every window once an epoch, the same batches however a run is cut up, and each planted fault refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from data.loader import IGNORED, TokenBatches, apportion, documents, mix64, open_tokens, permute, window_starts

END = 99


def write_tokens(folder: Path, train: list[tuple[str, np.ndarray]], validation: np.ndarray, shard_tokens: int) -> Path:
    """A tokens folder as data.prepare writes it, from (source, tokens) pairs."""
    folder.mkdir(parents=True)
    splits = {}
    for name, parts in (("train", train), ("validation", [("a", validation)])):
        tokens = np.concatenate([part for _, part in parts]).astype(np.uint16)
        shards = []
        for start in range(0, len(tokens), shard_tokens):
            file = f"{name}-{len(shards):05d}.npy"
            np.save(folder / file, tokens[start : start + shard_tokens])
            shards.append({"file": file, "tokens": len(tokens[start : start + shard_tokens])})
        stops = np.cumsum([len(part) for _, part in parts]).tolist()
        starts = [0, *stops[:-1]]
        sources = [
            {"source": source, "start": start, "stop": stop}
            for (source, _), start, stop in zip(parts, starts, stops, strict=True)
        ]
        splits[name] = {"tokens": len(tokens), "bytes": 7, "shards": shards, "sources": sources}
    manifest = {"version": 1, "vocab_size": 60000, "dtype": "uint16", "end_of_text": END, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Sources a (tokens 1000..1102) and b (2000..2056) over shards of 40 tokens; 25 tokens of validation."""
    a, b = 1000 + np.arange(103), 2000 + np.arange(57)
    return write_tokens(tmp_path / "tokens", [("a", a), ("b", b)], np.append(np.arange(24), END), 40)


def all_batches(folder: Path, steps: range, **settings) -> torch.Tensor:
    batches = TokenBatches(folder, 8, 6, **settings)
    return torch.stack([torch.stack(batches.sequences(step, 0, 6)) for step in steps])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int):
    shuffled = permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, np.uint64))
    assert sorted(shuffled.tolist()) == list(range(size))


def test_permute_matches_plain_integers():
    """The vectorised network against one written with Python's own integers, one index and key at a time."""
    keys = [(key * 0x9E3779B97F4A7C15) % 2**64 for key in range(50)]
    got = permute(np.arange(50, dtype=np.uint64), 50, np.array(keys, np.uint64))
    assert got.tolist() == [permute_slowly(index, 50, key) for index, key in enumerate(keys)]


def permute_slowly(index: int, size: int, key: int) -> int:
    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    half = next(half for half in range(1, 32) if 4**half >= size)
    while True:
        left, right = divmod(index, 2**half)
        for turn in range(1, 7):
            left, right = right, left ^ (mix(right ^ (key + turn * 0x9E3779B97F4A7C15) % 2**64) % 2**half)
        index = left * 2**half + right
        if index < size:
            return index


def test_mix64_is_splitmix64():
    """The generator's first outputs from seed 0, as published: mix64 of 1, 2, 3 times the golden gamma."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(value) for value in mix64(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_permutation_looks_random():
    """Where index 0 of 100 goes over 10,000 keys: chi-square, 99 degrees of freedom, within five deviations."""
    places = permute(np.zeros(10_000, np.uint64), 100, mix64(np.arange(10_000, dtype=np.uint64)))
    counts = np.bincount(places.astype(int), minlength=100)
    assert abs(((counts - 100) ** 2 / 100).sum() - 99) < 5 * np.sqrt(2 * 99)


@pytest.mark.parametrize(("span", "length"), [((0, 160), 8), ((37, 140), 10), ((5, 13), 8)])
def test_every_window_once_an_epoch(span: tuple[int, int], length: int):
    size = span[1] - span[0]
    windows = size // length
    starts = window_starts(np.arange(4 * windows), span, length, key=7).reshape(4, windows)
    covered = [sorted(span[0] + (np.add.outer(epoch, np.arange(length)) - span[0]).ravel() % size) for epoch in starts]
    assert all(len(set(epoch)) == windows * length for epoch in covered)  # no token twice
    assert all(span[0] <= start < span[1] for start in starts.ravel())
    if windows > 1:
        ranks = {tuple(np.argsort((epoch - epoch[0]) % size)) for epoch in starts}
        assert len(ranks) == 4 and tuple(range(windows)) not in ranks  # shuffled, each epoch in an order of its own
        assert len({(epoch.min() - span[0]) % length for epoch in starts}) > 1  # and cut in other places


def test_sequences_are_the_stream(tokens: Path):
    """Every row against the concatenated shards, read as a ring; one epoch holds no token twice."""
    stream = np.concatenate([np.load(path) for path in sorted(tokens.glob("train-*.npy"))]).tolist()
    batches = TokenBatches(tokens, 8, 5, seed=3)
    seen = []
    for step in range(4):  # 160 tokens // 8 = 20 windows = 4 steps of 5
        inputs, targets = batches.sequences(step, 0, 5)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (5, 8)
        for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            start = stream.index(row[0])
            assert [*row, following[-1]] == [stream[(start + place) % 160] for place in range(9)]
            assert row[1:] == following[:-1]
            seen += row
    assert sorted(seen) == sorted(stream)


@pytest.mark.parametrize("mix", [(), (("a", 0.7), ("b", 0.3))])
def test_batches_do_not_depend_on_how_a_run_is_cut(tokens: Path, mix: tuple):
    """Ranks and micro-steps take rows of the global batch; a resumed run starts from nothing but its step."""
    whole = all_batches(tokens, range(30), seed=5, mix=mix)  # nine epochs
    for processes in (2, 3, 6):
        rows = 6 // processes
        ranks = [TokenBatches(tokens, 8, 6, seed=5, mix=mix) for _ in range(processes)]
        for step in (29, 0, 13):  # in any order
            parts = [rank.sequences(step, n * rows, (n + 1) * rows) for n, rank in enumerate(ranks)]
            assert torch.equal(torch.cat([torch.stack(part) for part in parts], 1), whole[step])
    assert not torch.equal(whole, all_batches(tokens, range(30), seed=6, mix=mix))


def test_batch_size_only_regroups_the_samples(tokens: Path):
    small, large = TokenBatches(tokens, 8, 3, seed=1), TokenBatches(tokens, 8, 6, seed=1)
    parts = [small.sequences(step, 0, 3)[0] for step in (4, 5)]
    assert torch.equal(torch.cat(parts), large.sequences(2, 0, 6)[0])


def test_apportion_by_largest_remainder():
    """Hamilton's method by hand: quotas 4.7, 3.3 and 2.0 of ten seats give 5, 3 and 2."""
    assert apportion([47, 33, 20], 10) == [5, 3, 2]
    assert apportion([1, 1, 1], 10) == [4, 3, 3]


def test_mix_follows_its_weights(tokens: Path):
    """Over 1,000 samples exactly 700 come from a; each source is walked window by window, epoch by epoch."""
    batches = TokenBatches(tokens, 8, 100, seed=2, mix=(("a", 7), ("b", 3)))
    firsts = torch.cat([batches.sequences(step, 0, 100)[0][:, 0] for step in range(10)])
    assert (firsts < 2000).sum() == 700
    windows = batches.sequences(0, 0, 100)[0]
    for source, size in ((0, 103), (1, 57)):
        rows = windows[(windows[:, 0] >= 2000) == bool(source)][: size // 8]
        assert len(rows.unique()) == size // 8 * 8  # the first epoch of the source: no token twice
    swapped = TokenBatches(tokens, 8, 100, seed=2, mix=(("b", 0.3), ("a", 0.7)))
    assert torch.equal(swapped.sequences(3, 0, 100)[0], batches.sequences(3, 0, 100)[0])


def test_a_source_keeps_its_order_beside_others(tokens: Path):
    """The windows drawn from a, in order, are the same alone and in a mixture."""
    alone = TokenBatches(tokens, 8, 100, seed=2, mix=(("a", 1),)).sequences(0, 0, 100)[0]
    mixed = TokenBatches(tokens, 8, 100, seed=2, mix=(("a", 1), ("b", 1))).sequences(0, 0, 100)[0]
    from_a = mixed[mixed[:, 0] < 2000]
    assert torch.equal(from_a, alone[: len(from_a)])


def test_validation_covers_the_split_once(tokens: Path):
    batches = TokenBatches(tokens, 8, 6, seed=0)
    assert batches.validation_windows() == 4  # 25 tokens in windows of 8
    inputs, targets = batches.validation(0, 4)
    split = [*range(24), END]
    assert targets[targets != IGNORED].tolist() == split
    assert inputs[targets != IGNORED].tolist() == [END, *split[:-1]]
    assert targets[3].tolist() == [END] + 7 * [IGNORED] and inputs[3].tolist() == [23] + 7 * [END]
    parts = [batches.validation(first, first + 1) for first in range(4)]
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_documents_open_at_end_of_text():
    inputs = torch.tensor([[5, END, 6, 7, END], [END, END, 5, 6, 7]])
    assert documents(inputs, END).tolist() == [[0, 1, 1, 1, 2], [1, 2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("mix", "complaint"),
    [
        ((("c", 1.0),), "no source c in the training tokens; there are: a, b"),
        ((("a", 0.0),), "the weight of a is 0.0"),
        ((("a", float("nan")),), "the weight of a is nan"),
        ((("a", 1.0), ("a", 2.0)), "named twice"),
        ((("a", 1.0), ("b", 1e-5)), "weight of b is below 1/1000"),
    ],
)
def test_wrong_mix(tokens: Path, mix: tuple, complaint: str):
    with pytest.raises(UserError, match=complaint):
        TokenBatches(tokens, 8, 6, seed=0, mix=mix)


def test_too_little_data_says_how_little(tokens: Path):
    with pytest.raises(UserError, match="all has 160 training tokens, fewer than one sequence of 161"):
        TokenBatches(tokens, 161, 6, seed=0)
    with pytest.raises(UserError, match="b has 57 training tokens, fewer than one sequence of 58"):
        TokenBatches(tokens, 58, 6, seed=0, mix=(("b", 1),))


def edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_shard(folder: Path) -> None:
    shard = folder / "train-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-2])


def change_span(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["sources"][0]["stop"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


FAULTS = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not a manifest"),
    "no splits": (lambda folder: edit(folder, splits={}), "manifest.json is not a manifest"),
    "span moved": (change_span, "the train split does not add up"),
    "no such dtype": (lambda folder: edit(folder, dtype="words"), "manifest.json is not a manifest"),
    "end of text": (lambda folder: edit(folder, end_of_text=60000), "end_of_text is outside the vocabulary"),
    "other dtype": (lambda folder: edit(folder, dtype="uint32"), "train-00000.npy holds uint16"),
    "shard gone": (lambda folder: (folder / "train-00001.npy").unlink(), "train-00001.npy is missing"),
    "shard cut": (cut_shard, "train-00001.npy is cut off"),
    "shard empty": (lambda folder: (folder / "train-00001.npy").write_bytes(b""), "train-00001.npy is cut off"),
    "shard longer": (lambda folder: np.save(folder / "train-00001.npy", np.zeros(41, np.uint16)), "shape .41,."),
    "pickle": (lambda folder: np.save(folder / "train-00001.npy", np.array([None])), "not a .npy file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused(tokens: Path, fault: str):
    plant, complaint = FAULTS[fault]
    plant(tokens)
    with pytest.raises(UserError, match=complaint):
        open_tokens(tokens)


def test_a_token_outside_the_vocabulary_is_refused_when_read(tokens: Path):
    np.save(tokens / "train-00001.npy", np.full(40, 60000, np.uint16))
    batches = TokenBatches(tokens, 8, 20, seed=0)
    with pytest.raises(UserError, match=r"train-00001.npy: token 60000 at about .* outside the vocabulary of 60000"):
        batches.sequences(0, 0, 20)


def test_uint32_tokens(tmp_path: Path):
    folder = write_tokens(tmp_path / "tokens", [("a", np.arange(30))], np.arange(9), 40)
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path).astype(np.uint32) + 100_000)
    edit(folder, dtype="uint32", vocab_size=200_000)
    assert TokenBatches(folder, 8, 2, seed=0).validation(0, 1)[1].tolist()[0] == list(range(100_000, 100_008))
