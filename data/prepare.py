"""A corpus and a tokenizer in, shards of tokens out, for `data.loader` to map into memory.

    python -m data.prepare --input runs/corpus --tokenizer runs/tokenizer --out runs/tokens

Each document is followed by the end-of-text token. A corpus is sorted by source, so that in each split a source is one
span of tokens, which is what a mixture draws from. `manifest.json` holds the counts, the spans and what they were made
of; the tokenizer is copied to `tokenizer/`, so that a training run can write a whole model folder.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli import UserError, run, whole_folder
from tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 32 * 10**6  # of text that is tokenised at a time: bounds memory, and is worth starting processes for


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenise a corpus."""

    input: Path
    """Corpus folder, written by data.curate."""
    tokenizer: Path
    """Tokenizer folder, written by tokenizer.train, or any model folder."""
    out: Path
    """Folder to write the tokens to."""
    processes: int = os.cpu_count() or 1
    """Processes to tokenise with."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard; the last one of a split is shorter."""


class SplitWriter:
    """Writes one split: fills shards with documents, and keeps count."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int):
        self.folder, self.name = folder, name
        self.buffer = np.empty(shard_tokens, dtype)  # memory is taken as it is filled, not here
        self.filled = self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray, source: str, text_bytes: int) -> None:
        """One document: its tokens, end-of-text included."""
        if not self.sources or self.sources[-1]["source"] != source:
            first = {"source": source, "start": self.tokens, "stop": self.tokens, "documents": 0, "bytes": 0}
            self.sources.append(first)
        self.tokens += len(tokens)
        span = self.sources[-1]
        span["stop"] = self.tokens
        span["documents"] += 1
        span["bytes"] += text_bytes
        while len(tokens):
            part = tokens[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write what the buffer holds as a shard."""
        if not self.filled:
            return
        path = self.folder / f"{self.name}-{len(self.shards):05d}.npy"
        np.save(path, self.buffer[: self.filled])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"file": path.name, "tokens": self.filled, "sha256": digest})
        self.filled = 0

    def finish(self) -> dict[str, Any]:
        """Write the last shard. Returns the split's part of the manifest."""
        self.flush()
        documents = sum(source["documents"] for source in self.sources)
        text_bytes = sum(source["bytes"] for source in self.sources)
        counts = {"tokens": self.tokens, "documents": documents, "bytes": text_bytes}
        return counts | {"shards": self.shards, "sources": self.sources}


class CorpusReader:
    """The documents of a corpus, in its order, with a check that it is whole and fingerprints of its sources."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.report = read_report(folder)
        self.sources: dict[str, Any] = {}  # source -> sha256 of its lines

    def batches(self, batch_bytes: int = BATCH_BYTES) -> Iterator[list[dict[str, Any]]]:
        """Lists of documents with about `batch_bytes` of text each.

        Raises UserError if a document is malformed, a source is not in one piece, or the whole is not what
        report.json says.
        """
        corpus, batch, size = hashlib.sha256(), [], 0
        for path in sorted(self.folder.glob("documents-*.jsonl")):
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    corpus.update(line)
                    batch.append(self._document(line, f"{path}:{number}"))
                    size += len(line)
                    if size >= batch_bytes:
                        yield batch
                        batch, size = [], 0
        if batch:
            yield batch
        if corpus.hexdigest() != self.report["corpus_sha256"]:
            raise UserError(f"{self.folder}: the documents are not those of its report.json: run data.curate again")

    def _document(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            document = json.loads(line)
            source = str(document["source"])
            if document["split"] not in ("train", "validation") or not isinstance(document["text"], str):
                raise ValueError("split or text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not a document of data.curate ({error!r}): run data.curate again") from None
        if source in self.sources and source != next(reversed(self.sources)):
            raise UserError(f"{where}: the corpus is not sorted by source: run data.curate again")
        self.sources.setdefault(source, hashlib.sha256()).update(line)
        return document


def read_report(folder: Path) -> dict[str, Any]:
    """A corpus's report.json. Raises UserError if there is none, or if a split is empty."""
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: make a corpus with python -m data.curate INPUT --out {folder}")
    try:
        report = json.loads(path.read_bytes())
        counts = {split: report["splits"].get(split, {}).get("documents", 0) for split in ("train", "validation")}
        _ = report["corpus_sha256"], report["bytes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a report of data.curate ({error!r}): run data.curate again") from None
    for split, documents in counts.items():
        if not documents:
            raise UserError(f"{path}: the {split} split is empty: run data.curate again with more text")
    return report


def main(config: PrepareConfig) -> None:
    """Tokenise `config.input` into `config.out`. Raises UserError; nothing is left half-written."""
    if config.shard_tokens < 1 or config.processes < 1:
        raise UserError("--shard-tokens and --processes start at 1")
    started = time.perf_counter()
    reader, tokenizer = CorpusReader(config.input), load_tokenizer(config.tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with whole_folder(config.out, "manifest.json", "tokenizer", "train-*.npy", "validation-*.npy") as folder:
        names = ("train", "validation")
        writers = {name: SplitWriter(folder, name, dtype, config.shard_tokens) for name in names}
        tokenize(reader, tokenizer, writers, config.processes)
        manifest = {
            "version": 1,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            "end_of_text": tokenizer.end_of_text,
            "tokenizer_sha256": tokenizer.fingerprint(),
            "corpus_sha256": reader.report["corpus_sha256"],
            "source_fingerprints": {source: digest.hexdigest() for source, digest in reader.sources.items()},
            "splits": {name: writer.finish() for name, writer in writers.items()},
        }
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print_summary(manifest, config.out, time.perf_counter() - started, config.processes)


def tokenize(reader: CorpusReader, tokenizer: Tokenizer, writers: dict[str, SplitWriter], processes: int) -> None:
    """Every document through the tokenizer into the writer of its split."""
    end = np.array([tokenizer.end_of_text], np.uint32)
    total = reader.report["bytes"]
    with tqdm(total=total, desc="prepare", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for batch in reader.batches():
            ids = tokenizer.encode_batch([document["text"] for document in batch], processes=processes)
            for document, tokens in zip(batch, ids, strict=True):
                tokens = np.concatenate([tokens, end])
                assert tokens.max() < tokenizer.vocab_size, "an id outside the vocabulary would wrap around in uint16"
                text_bytes = len(document["text"].encode())
                writers[document["split"]].add(tokens, document["source"], text_bytes)
                progress.update(text_bytes)


def print_summary(manifest: dict[str, Any], out: Path, seconds: float, processes: int) -> None:
    """Tokens, bytes a token, and how fast."""
    splits = manifest["splits"]
    for name, split in splits.items():
        rate = split["bytes"] / split["tokens"]
        print(f"{name}: {split['tokens']:,} tokens of {split['documents']:,} documents, {rate:.2f} bytes a token")
    speed = sum(split["bytes"] for split in splits.values()) / seconds / 1e6
    shards = sum(len(split["shards"]) for split in splits.values())
    vocabulary = f"vocabulary {manifest['vocab_size']:,}"
    print(f"{out}: {shards} shards of {manifest['dtype']}, {vocabulary}, {speed:.1f} MB/s over {processes} processes")


if __name__ == "__main__":
    run(main, PrepareConfig)
