"""data.prepare: the shards hold the corpus, token for token, over any number of processes; each mistake in one line."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import curate, prepare
from data.loader import TokenBatches, open_tokens
from data.ngram import bigram_bits_per_byte
from tokenizer import load_tokenizer, train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of two sources and a tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("made")
    lines = [
        json.dumps({"text": f"{source} wrote line {number} — über alles.\n" * 3, "source": source})
        for source in ("beta", "alpha")
        for number in range(40)
    ]
    (folder / "in.jsonl").write_text("\n".join(lines))
    curate.main(curate.CurateConfig((str(folder / "in.jsonl"),), folder / "corpus", validation_fraction=0.2))
    train.main(train.TrainConfig(input=folder / "corpus", out=folder / "tokenizer", vocab_size=300, processes=1))
    return folder


def config(made: Path, out: Path, **settings) -> prepare.PrepareConfig:
    return prepare.PrepareConfig(made / "corpus", made / "tokenizer", out, **settings)


def corpus(made: Path) -> list[dict]:
    return [json.loads(line) for line in (made / "corpus" / "documents-00000.jsonl").read_text().splitlines()]


def test_shards_hold_the_corpus(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Against the corpus encoded document by document; every figure of the manifest recounted."""
    prepare.main(config(made, tmp_path / "tokens", shard_tokens=500, processes=2))
    tokenizer, report = load_tokenizer(made / "tokenizer"), json.loads((made / "corpus" / "report.json").read_text())
    dataset = open_tokens(tmp_path / "tokens")
    assert dataset.vocab_size == 300 and dataset.end_of_text == tokenizer.end_of_text
    assert dataset.manifest["tokenizer_sha256"] == tokenizer.fingerprint()
    assert dataset.manifest["corpus_sha256"] == report["corpus_sha256"]
    for name, split in dataset.splits.items():
        documents = [document for document in corpus(made) if document["split"] == name]
        encoded = [[*tokenizer.encode(document["text"]), tokenizer.end_of_text] for document in documents]
        stream = [token for tokens in encoded for token in tokens]
        assert np.concatenate(split.shards).tolist() == stream == split.read(0, len(split)).tolist()
        assert {len(shard) for shard in split.shards[:-1]} <= {500} and split.shards[0].dtype == np.uint16
        described = dataset.manifest["splits"][name]
        assert [source["source"] for source in described["sources"]] == ["alpha", "beta"]
        for source in described["sources"]:
            own = [tokens for tokens, d in zip(encoded, documents, strict=True) if d["source"] == source["source"]]
            assert stream[source["start"] : source["stop"]] == [token for tokens in own for token in tokens]
            assert source["documents"] == len(own)
        assert described["bytes"] == sum(len(document["text"].encode()) for document in documents)
        assert (described["documents"], described["tokens"]) == (len(documents), len(stream))
        for path, shard in zip(split.paths, described["shards"], strict=True):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
    assert len(dataset.splits["train"].shards) > 2
    out = capsys.readouterr().out
    train_tokens = len(dataset.splits["train"])
    assert f"train: {train_tokens:,} tokens of" in out and "bytes a token" in out and "MB/s" in out


def test_same_tokens_over_any_number_of_processes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare.main(config(made, tmp_path / "one", processes=1))
    batches = prepare.CorpusReader.batches
    monkeypatch.setattr(prepare.CorpusReader, "batches", lambda reader: batches(reader, batch_bytes=2000))
    prepare.main(config(made, tmp_path / "three", processes=3))
    one, three = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.is_file()} for name in ("one", "three")
    )
    assert one == three and len(one) == 3


def test_the_tokenizer_travels_with_the_tokens(made: Path, tmp_path: Path):
    prepare.main(config(made, tmp_path / "tokens"))
    copy, original = load_tokenizer(tmp_path / "tokens" / "tokenizer"), load_tokenizer(made / "tokenizer")
    assert copy.fingerprint() == original.fingerprint()
    assert copy.encode("über alpha") == original.encode("über alpha")


def test_validation_text_comes_back(made: Path, tmp_path: Path):
    """From files to batches and back: the decoded validation targets are the held-out texts."""
    prepare.main(config(made, tmp_path / "tokens"))
    batches, tokenizer = TokenBatches(tmp_path / "tokens", 32, 4, seed=0), load_tokenizer(made / "tokenizer")
    targets = batches.validation(0, batches.validation_windows())[1]
    texts = [document["text"] for document in corpus(made) if document["split"] == "validation"]
    assert tokenizer.decode(targets[targets >= 0].tolist()) == "".join(text + "<|endoftext|>" for text in texts)


def test_large_vocabularies_take_uint32(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(made / "tokenizer")
    tokenizer.vocab_size = 2**16 + 1
    monkeypatch.setattr(prepare, "load_tokenizer", lambda folder: tokenizer)
    prepare.main(config(made, tmp_path / "tokens"))
    assert open_tokens(tmp_path / "tokens").splits["train"].shards[0].dtype == np.uint32


def test_command_line_from_text_to_baseline(made: Path, tmp_path: Path):
    """The three commands as a user types them."""
    (tmp_path / "book.txt").write_text("It was the best of times.\nIt was the worst of times.\n" * 50)
    for command in (
        "data.curate book.txt --out runs/corpus",
        f"data.prepare --input runs/corpus --tokenizer {made / 'tokenizer'} --out runs/tokens --processes 2",
        "data.ngram --data runs/tokens",
    ):
        done = command_line(command.split(), tmp_path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    figures = bigram_bits_per_byte(tmp_path / "runs" / "tokens")
    assert f"bigram: {figures['bigram_loss']:.4f} nats a token" in done.stdout
    assert f"{figures['bigram_bits_per_byte']:.4f} bits per byte" in done.stdout
    assert figures["bigram_loss"] < figures["unigram_loss"]


def command_line(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def edit_report(folder: Path, **changes) -> None:
    path = folder / "corpus" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    path = folder / "corpus" / "documents-00000.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


MISTAKES = {
    "no corpus": (lambda folder: shutil.rmtree(folder / "corpus"), "report.json is missing"),
    "no report": (
        lambda folder: (folder / "corpus" / "report.json").write_text("[]"),
        "is not a report of data.curate",
    ),
    "no validation": (
        lambda folder: edit_report(folder, splits={"train": {"documents": 9}}),
        "validation split is empty",
    ),
    "lines lost": (lambda folder: rewrite(folder, lambda lines: lines[:-1]), "not those of its report.json"),
    "line broken": (lambda folder: rewrite(folder, lambda lines: [lines[0], lines[1][:9]]), "documents-00000.jsonl:2"),
    "no split": (lambda folder: rewrite(folder, lambda lines: ['{"text": "", "source": "a"}\n']), "jsonl:1"),
    "unsorted": (lambda folder: rewrite(folder, lambda lines: lines + lines[:1]), "not sorted by source"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "holds no tokenizer"),
    "shards of nothing": (lambda folder: None, "--shard-tokens and --processes start at 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(made: Path, tmp_path: Path, mistake: str):
    plant, complaint = MISTAKES[mistake]
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    plant(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--input", "corpus", "--tokenizer", "tokenizer", "--out", "tokens", "--processes", "1"]
    flags += ["--shard-tokens", "0"] if mistake == "shards of nothing" else []
    done = command_line(["data.prepare", *flags], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and complaint in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_ngram_without_tokens_is_one_line(tmp_path: Path):
    done = command_line(["data.ngram", "--data", "nowhere"], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere/manifest.json is missing")
    assert done.stderr.count("\n") == 1
