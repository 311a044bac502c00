"""Train a tokenizer on a corpus.

python -m tokenizer.train --input runs/corpus --vocab-size 8192 --out runs/tokenizer
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cli
from cli import UserError

from .base import Tokenizer
from .bpe import ByteLevelBPE
from .bpe_training import PATTERNS, count_chunks, train_merges
from .chat import CHATML_TEMPLATE
from .sentencepiece_tokenizer import SentencePieceTokenizer, sentencepiece_spec, train_sentencepiece
from .tokenizer_json import trained_spec

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAX_VOCABULARY = 1_000_000  # an id is written as one character, and there are 1,114,112
SAMPLE_BYTES = 4 << 20  # of text, on which a trained tokenizer's compression is measured


@dataclass(frozen=True)
class TrainConfig:
    """Train a tokenizer on the training split of a corpus."""

    input: Path
    """A corpus folder of data.curate (documents-*.jsonl), or one .jsonl or .txt file."""
    out: Path
    """The folder to write the tokenizer to."""
    vocab_size: int
    """Number of ids, special tokens included."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """bpe: byte-level BPE, trained here. sentencepiece: that library's trainer, with bytes for rare characters."""
    pattern: Literal["gpt2", "gpt4"] = "gpt4"
    """bpe: the regular expression that cuts text into chunks before merges."""
    max_chunk: int = 256
    """bpe: chunks of more characters are cut, so that a line without spaces does no harm."""
    algorithm: Literal["bpe", "unigram"] = "unigram"
    """sentencepiece: its algorithm."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens, after <|endoftext|>, <|im_start|> and <|im_end|>."""
    processes: int = os.cpu_count() or 1
    """Processes that count chunks (bpe), or threads (sentencepiece)."""


@dataclass(frozen=True)
class Documents:
    """The training texts in `files`; may be iterated over again and again, in several processes."""

    files: list[Path]

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from read_texts(file)


def main(config: TrainConfig) -> None:
    started = time.perf_counter()
    special_tokens = [*CHAT_TOKENS, *config.special_tokens]
    check_flags(config, special_tokens)
    documents = Documents(corpus_files(config.input))
    with cli.whole_folder(config.out, "tokenizer.json", "tokenizer_config.json", "tokenizer.model") as folder:
        if config.kind == "bpe":
            tokenizer, made = train_bpe(config, documents, special_tokens)
        else:
            tokenizer, made = train_sp(config, documents, special_tokens)
        tokenizer.save(folder)
        made += f", {measure(tokenizer, documents, config.processes)}"
    print(f"{config.out}: {tokenizer.vocab_size:,} ids, {made}, {time.perf_counter() - started:.1f} s")


def check_flags(config: TrainConfig, special_tokens: list[str]) -> None:
    """Raises UserError for flags that no corpus could serve."""
    least = 256 + len(special_tokens)
    if config.vocab_size < least:
        raise UserError(
            f"--vocab-size {config.vocab_size} is too small: 256 bytes and {len(special_tokens)} special "
            f"tokens take {least}"
        )
    if config.vocab_size > MAX_VOCABULARY:
        raise UserError(f"--vocab-size {config.vocab_size} is too large: at most {MAX_VOCABULARY}")
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise UserError("--special-tokens holds a token twice, or an empty one")
    if config.processes < 1 or config.max_chunk < 1:
        raise UserError("--processes and --max-chunk start at 1")


def corpus_files(source: Path) -> list[Path]:
    """The files of documents that --input names. Raises UserError where there are none."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"--input {source}: no such file or folder")
    files = sorted(source.glob("documents-*.jsonl"))
    if not files:
        raise UserError(f"--input {source} holds no documents-*.jsonl: make a corpus with python -m data.curate")
    return files


def read_texts(file: Path) -> Iterator[str]:
    """The training texts in one file. Raises UserError, with the line, for what is no UTF-8 or no document."""
    if file.suffix != ".jsonl":
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 (byte {error.start}): convert it with python -m data.curate") from None
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield from read_document(line, f"{file}:{number}")


def read_document(line: bytes, where: str) -> Iterator[str]:
    """The text of one JSON line, if it is of the training split. Raises UserError, saying `where`, for a bad line."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON in UTF-8 ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise UserError(f"{where}: no document: it needs a string in the field text")
    if document.get("split", "train") != "train":
        return
    try:
        document["text"].encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text holds a lone surrogate, which no UTF-8 can write") from None
    yield document["text"]


def train_bpe(config: TrainConfig, documents: Documents, special_tokens: list[str]) -> tuple[Tokenizer, str]:
    """A byte-level BPE tokenizer and what to say of its making. Raises UserError for too little text."""
    pattern = PATTERNS[config.pattern]
    counts = count_chunks(documents, pattern, config.max_chunk, config.processes)
    if not counts:
        raise UserError(f"--input {config.input} holds no text in its training split")
    new_tokens = config.vocab_size - 256 - len(special_tokens)
    merges = train_merges(counts, new_tokens)
    tokenizer = ByteLevelBPE(trained_spec(merges, pattern, special_tokens), tokenizer_config())
    if tokenizer.vocab_size < config.vocab_size:
        raise UserError(
            f"--vocab-size {config.vocab_size}: the corpus gives at most {tokenizer.vocab_size} (no other pair occurs "
            f"twice): add text or ask for fewer"
        )
    return tokenizer, f"{len(counts):,} unique chunks, {len(merges):,} merges"


def train_sp(config: TrainConfig, documents: Documents, special_tokens: list[str]) -> tuple[Tokenizer, str]:
    """A sentencepiece tokenizer and what to say of its making. Raises UserError for too little text."""
    if not any(documents):
        raise UserError(f"--input {config.input} holds no text in its training split")
    model = train_sentencepiece(documents, config.vocab_size, config.algorithm, special_tokens, config.processes)
    spec = sentencepiece_spec(model, config.algorithm)
    return SentencePieceTokenizer(model, tokenizer_config(), spec), f"sentencepiece {config.algorithm}"


def tokenizer_config() -> dict:
    """tokenizer_config.json of a tokenizer trained here."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
    }


def measure(tokenizer: Tokenizer, documents: Documents, processes: int) -> str:
    """How much text there was, and how far the tokenizer compresses the first of it."""
    total, sampled, sample = 0, 0, []
    for text in documents:
        size = len(text.encode())
        total += size
        if sampled < SAMPLE_BYTES:
            sampled += size
            sample.append(text)
    tokens = sum(map(len, tokenizer.encode_batch(sample, processes)))
    return f"{total:,} bytes read, {sampled / tokens:.2f} bytes a token (on the first {sampled:,})"


if __name__ == "__main__":
    cli.run(main, TrainConfig)
