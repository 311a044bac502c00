"""What several test files share: a tiny folder of tokens, made of real text by the project's own commands, and runs."""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data import curate, prepare
from tokenizer import train as tokenizer_train
from train_pretrain import PretrainConfig
from train_pretrain import main as pretrain_main

ROOT = Path(__file__).parents[1]
SHAPE = ("n_layer=2", "n_embd=32", "n_head=2", "context_length=32")
TINY_RUN = {"steps": 12, "batch_size": 4, "warmup_steps": 3, "eval_every": 5, "save_every": 4, "dtype": "fp32"}
TIMES = ("tokens_per_second", "seconds", "mfu", "peak_memory_bytes")


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokens folder of ragged documents: 259 ids, sources alpha and beta, beta half the size."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_tokens(folder, inspect.getsource(textwrap))


def make_tokens(folder: Path, text: str) -> Path:
    """The first paragraphs of `text` as documents, curated, tokenised as bytes, and prepared, under `folder`."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()][:40]
    lines = [{"text": part, "source": "beta" if place % 3 == 0 else "alpha"} for place, part in enumerate(paragraphs)]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    curate.main(curate.CurateConfig((str(folder / "in.jsonl"),), folder / "corpus", validation_fraction=0.2))
    tokenizer_train.main(tokenizer_train.TrainConfig(folder / "corpus", folder / "tokenizer", 259, processes=1))
    prepare.main(prepare.PrepareConfig(folder / "corpus", folder / "tokenizer", folder / "tokens", processes=1))
    return folder / "tokens"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as in the subprocesses: bit-identity is promised for equal machines. Signal handlers are put back."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def pretrain(tokens: Path, one_thread: None) -> Callable[..., list[dict[str, Any]]]:
    """Runs train_pretrain in this process on a tiny model; returns the metrics without the fields that tell time."""

    def run(out: Path, *changes: str, **flags: Any) -> list[dict[str, Any]]:
        settings = {"data": tokens, "shape": SHAPE + changes} | TINY_RUN | flags
        pretrain_main(PretrainConfig(out=out, **settings))
        return metrics(out)

    return run


def metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the fields that tell time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def losses(lines: list[dict[str, Any]], split: str = "train") -> list[float]:
    return [line["loss"] for line in lines if line["split"] == split]


def flags(data: Path, out: Path, *changes: str, **settings: Any) -> list[str]:
    """The command line of a tiny run."""
    words = ["--data", str(data), "--out", str(out), "--shape", *SHAPE, *changes]
    for name, value in (TINY_RUN | settings).items():
        word = "--" + name.replace("_", "-")
        words += [word] if value is True else [word, str(value)]
    return words


def start(arguments: list[str], processes: int = 1, script: str | Path = "train_pretrain.py") -> subprocess.Popen:
    """A run in a process of its own, or in several under torchrun, with one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_lines(run: subprocess.Popen, out: Path, count: int) -> None:
    """Until the run has logged `count` lines, or has ended."""
    path = out / "metrics.jsonl"
    while run.poll() is None and (not path.is_file() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.002)  # a poll: whatever it misses only moves the place of the blow
