"""How fast our tokenizer trains and encodes, beside `tokenizers` and `sentencepiece`, in one run on the same text.

python bench/tokenizer.py

The text is all .py files of the Python that runs this (`python-stdlib`), in memory, one document a file; the pattern is
GPT-4's; every program has all the cores. Each figure is the best of --repeats, the programs taking turns.

train   from a list of strings to a tokenizer, without writing it. Megabytes of text a second.
encode  a list of strings to ids. The tokenizer is loaded anew before each repeat, so that our cache of chunks starts
        empty; ours starts its processes, and brings their ids back, within the time. Ids are compared afterwards.
"""

import gc
import io
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import regex
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import cli
from bench.results_file import write_results
from tokenizer import ByteLevelBPE
from tokenizer.bpe_training import GPT4_PATTERN, count_chunks, train_merges
from tokenizer.tokenizer_json import trained_spec

RESULTS = Path(__file__).parent / "results" / "tokenizer.json"
TARGETS = {"train": 1.2, "encode": 2.0}  # times the speed of tokenizers


@dataclass(frozen=True)
class BenchConfig:
    """Measure training and encoding side by side."""

    vocab_sizes: tuple[int, ...] = (8192, 32768)
    """Sizes of vocabulary, special token included."""
    repeats: int = 3
    """Repeats of each measurement, of which the best counts."""
    out: Path = RESULTS
    """The JSON file to write."""


def main(config: BenchConfig) -> None:
    texts = stdlib_texts()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    processes = os.cpu_count() or 1
    print(f"{len(texts)} documents, {megabytes:.1f} MB, {processes} cores; MB/s, best of {config.repeats}")
    rows = []
    for size in config.vocab_sizes:
        training = {
            "ours": lambda size=size: partial(train_ours, texts, size, processes),
            "tokenizers": lambda size=size: partial(train_theirs, texts, size),
            "sentencepiece": lambda size=size: partial(train_sentencepiece, texts, size, processes),
        }
        seconds, made = race(training, config.repeats)
        rows.append(row("train", size, megabytes, seconds))
        spec, model = made["tokenizers"].to_str(), made["sentencepiece"]
        encoding = {
            "ours": lambda spec=spec: partial(ByteLevelBPE(json.loads(spec), {}).encode_batch, texts, processes),
            "tokenizers": lambda spec=spec: partial(tokenizers.Tokenizer.from_str(spec).encode_batch, texts),
            "sentencepiece": lambda model=model: partial(encode_sentencepiece, loaded(model), texts, processes),
        }
        seconds, made = race(encoding, config.repeats, keep=ids_only)
        assert all(map(np.array_equal, made["ours"], made["tokenizers"])), "ours and tokenizers disagree"
        rows.append(row("encode", size, megabytes, seconds))
    text = {"source": "python-stdlib", "megabytes": round(megabytes, 2)}
    write_results(config.out, [np, regex, sentencepiece, tokenizers], text=text, repeats=config.repeats, rows=rows)


def stdlib_texts() -> list[str]:
    """The text of all .py files of the standard library that are UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue  # Python's own tests of other encodings
    return texts


def race(
    contestants: dict[str, Callable[[], Callable[[], Any]]],
    repeats: int,
    keep: Callable[[Any], Any] = lambda made: made,
) -> tuple[dict[str, float], dict[str, Any]]:
    """The least seconds of each contestant, and what it made last. What a contestant returns is timed, it is not."""
    seconds, made = dict.fromkeys(contestants, float("inf")), {}
    for _ in range(repeats):
        for name, prepare in contestants.items():
            work = prepare()
            gc.collect()
            started = time.perf_counter()
            result = work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
            made[name] = keep(result)
            del result
    return seconds, made


def train_ours(texts: list[str], size: int, processes: int) -> ByteLevelBPE:
    """Count, merge, and build the tokenizer."""
    merges = train_merges(count_chunks(texts, GPT4_PATTERN, 256, processes), size - 257)
    return ByteLevelBPE(trained_spec(merges, GPT4_PATTERN, ["<|endoftext|>"]), {})


def train_theirs(texts: list[str], size: int) -> tokenizers.Tokenizer:
    """The tokenizers library, with the same pattern, alphabet and size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_sentencepiece(texts: list[str], size: int, processes: int) -> bytes:
    """sentencepiece's BPE on the lines, as bytes where a character is rare: its own way of cutting, not GPT-4's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        normalization_rule_name="identity",
        num_threads=processes,
        minloglevel=2,
    )
    return model.getvalue()


def loaded(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a model."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def encode_sentencepiece(processor: sentencepiece.SentencePieceProcessor, texts: list[str], threads: int) -> list:
    """Ids of every text, by sentencepiece's own threads."""
    return processor.encode(texts, num_threads=threads)


def ids_only(encodings: list) -> list[np.ndarray]:
    """What a library returns, as arrays of ids."""
    return [np.array(getattr(encoding, "ids", encoding), np.uint32) for encoding in encodings]


def row(task: str, size: int, megabytes: float, seconds: dict[str, float]) -> dict:
    """One line of the results, printed too."""
    speeds = {name: round(megabytes / taken, 2) for name, taken in seconds.items()}
    ratio = round(speeds["ours"] / speeds["tokenizers"], 2)
    shown = "  ".join(f"{name} {speed:6.2f}" for name, speed in speeds.items())
    print(f"{task:6} {size:6,}  {shown}  ours / tokenizers {ratio:.2f} (target {TARGETS[task]})", flush=True)
    return {
        "task": task,
        "vocab_size": size,
        "megabytes_per_second": speeds,
        "ours_over_tokenizers": ratio,
        "target": TARGETS[task],
    }


if __name__ == "__main__":
    cli.run(main, BenchConfig)
