"""How fast, and how well, a small GPT trains on a CPU, beside nanoGPT in one run on the same bytes.

python bench/pretrain_cpu.py --nanogpt PATH

The text is tinyshakespeare as bytes, its last tenth held out. Two sizes: nanoGPT's README recipe for a CPU (4 layers,
width 128, 64 bytes of context), and 6 layers of width 384 with 256 bytes; 12 sequences a step in both. Both programs
run as their users run them: train_pretrain.py on its prepared tokens, nanoGPT's train.py, uncompiled, on its own.

speed  Short runs, the programs taking turns. A run's figure is the median of its steps after the first few, a
       program's that of its best run: a neighbour on the machine slows some runs by a third. Ratios are of tokens a
       second.
loss   One whole run each. Ours is the mean over every byte held out; nanoGPT's its own estimate, on as many bytes.
floor  What the matrix products of a step take alone as PyTorch multiplies them here, attention's in full, in fp32 and
       bf16.

Each size writes a file of results, if the peer ran beside it. Ours has RoPE in place of learned positions, a higher
learning rate and a linear schedule to 0; nanoGPT the rest of its own recipe for this text.
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import cli
from bench.results_file import write_results
from cli import UserError
from data import curate, prepare
from tokenizer import train

ROOT = Path(__file__).parents[1]
BATCH, WARM_STEPS = 12, 5  # sequences a step; steps that no time is taken of
OUR_FLAGS = ["--schedule", "linear", "--final-learning-rate", "0", "--warmup-steps", "50", "--eval-every", "0"]
OUR_SHAPE = ["bias=false", "mlp=gelu", "position=rope"]
NANOGPT_FLAGS = ["--device=cpu", "--compile=False", "--log_interval=1", "--dropout=0.0", "--dataset=bytes"]


@dataclass(frozen=True)
class Size:
    """A model, how long each program trains it, and what is aimed at."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    context: int
    learning_rate: float  # of ours
    steps: int  # of ours
    nanogpt_steps: int
    timed_steps: int  # of a short run
    target_speed: float  # times nanoGPT's tokens a second
    target_loss: float | None  # nats a byte held out; None: nanoGPT's


SIZES = [
    Size("small", 4, 4, 128, 64, 4e-3, 1000, 2000, 150, 1.5, 1.886),
    Size("medium", 6, 6, 384, 256, 2e-3, 300, 300, 15, 3.5, None),
]


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and loss of pretraining on a CPU."""

    nanogpt: Path | None = None
    """A checkout of nanoGPT; without it ours runs alone."""
    text: Path = ROOT.parent / "shared" / "data" / "shakespeare" / "tinyshakespeare.txt"
    """The text, in ASCII."""
    sizes: tuple[Literal["small", "medium"], ...] = ("small", "medium")
    """Sizes to run."""
    rounds: int = 5
    """Short runs of each program."""
    out: Path = Path(__file__).parent / "results"
    """Folder of pretrain_cpu_small.json and so on."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"--rounds must be positive, not {self.rounds}")
        if self.nanogpt is not None and not (self.nanogpt / "train.py").is_file():
            raise UserError(f"--nanogpt {self.nanogpt} is no checkout of nanoGPT: it has no train.py")
        if not self.text.is_file() or not self.text.read_bytes().isascii():
            raise UserError(f"--text {self.text}: name a file of ASCII text, such as tinyshakespeare")


def main(config: BenchConfig) -> None:
    sizes = [size for size in SIZES if size.name in config.sizes]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = {"ours": OurProgram(config.text, folder)}
        if config.nanogpt is not None:
            programs["nanogpt"] = NanoGPT(config.nanogpt, config.text, folder)
        for size in sizes:
            row = measure(size, programs, config.rounds)
            if config.nanogpt is not None:
                path = config.out / f"pretrain_cpu_{size.name}.json"
                write_results(path, [torch, np], threads=torch.get_num_threads(), rounds=config.rounds, **row)


class OurProgram:
    """train_pretrain.py on tokens that are bytes."""

    def __init__(self, text: Path, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        content = text.read_text(encoding="ascii")
        cut = len(content) * 9 // 10
        parts = {"train": content[:cut], "validation": content[cut:]}
        lines = [json.dumps({"text": part, "split": split, "source": "text"}) for split, part in parts.items()]
        (folder / "text.jsonl").write_text("\n".join(lines))
        curate.main(curate.CurateConfig((str(folder / "text.jsonl"),), folder / "corpus"))
        train.main(train.TrainConfig(folder / "corpus", folder / "tokenizer", 256 + len(train.CHAT_TOKENS)))
        prepare.main(prepare.PrepareConfig(folder / "corpus", folder / "tokenizer", folder / "tokens"))

    def train(self, size: Size, timed: bool) -> tuple[list[float], float]:
        """Seconds of each step, and the final validation loss."""
        self.runs += 1
        out, steps = self.folder / f"run{self.runs}", size.timed_steps if timed else size.steps
        shape = [f"{name}={getattr(size, name)}" for name in ("n_layer", "n_head", "n_embd")]
        command = [ROOT / "train_pretrain.py", "--data", self.folder / "tokens", "--out", out, *OUR_FLAGS]
        command += ["--preset", "tiny-gpt2", "--shape", *shape, f"context_length={size.context}", *OUR_SHAPE]
        command += ["--batch-size", BATCH, "--steps", steps, "--learning-rate", size.learning_rate]
        for _ in watch(command, ROOT, steps, f"ours {size.name}"):
            pass
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = [size.context * BATCH / line["tokens_per_second"] for line in lines if line["split"] == "train"]
        return seconds[WARM_STEPS:], lines[-1]["loss"]


class NanoGPT:
    """A copy of a nanoGPT checkout with the same bytes as its data."""

    def __init__(self, checkout: Path, text: Path, folder: Path) -> None:
        self.copy = folder / "nanogpt"
        (self.copy / "data" / "bytes").mkdir(parents=True)
        for name in ("train.py", "model.py", "configurator.py", "config"):
            (self.copy / name).symlink_to((checkout / name).resolve())
        content = np.frombuffer(text.read_bytes(), np.uint8).astype(np.uint16)
        cut = len(content) * 9 // 10
        content[:cut].tofile(self.copy / "data" / "bytes" / "train.bin")
        content[cut:].tofile(self.copy / "data" / "bytes" / "val.bin")
        # nanoGPT reads the vocabulary's size from a pickle, and takes GPT-2's without one
        (self.copy / "data" / "bytes" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
        self.held_out = len(content) - cut

    def train(self, size: Size, timed: bool) -> tuple[list[float], float]:
        """Seconds of each step, and the final validation loss."""
        steps = size.timed_steps if timed else size.nanogpt_steps
        # It evaluates before the first step too; short runs evaluate little and keep the schedule of the whole one.
        batches = 1 if timed else self.held_out // (BATCH * size.context)
        flags = {"block_size": size.context, "batch_size": BATCH, "max_iters": steps, "eval_interval": steps}
        flags |= {"n_layer": size.n_layer, "n_head": size.n_head, "n_embd": size.n_embd, "eval_iters": batches}
        words = [f"--{name}={value}" for name, value in (flags | {"lr_decay_iters": size.nanogpt_steps}).items()]
        command = ["train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS, *words]
        said = list(watch(command, self.copy, steps, f"nanoGPT {size.name}"))
        times = [float(found[1]) / 1e3 for line in said if (found := re.search(r"^iter.* time ([\d.]+)ms", line))]
        losses = [float(found[1]) for line in said if (found := re.search(r"^step .* val loss ([\d.]+)", line))]
        return times[WARM_STEPS:-1], losses[-1]  # the last step's time holds the evaluation


def watch(command: list, folder: Path, steps: int, name: str) -> Iterator[str]:
    """Run a Python script in `folder`; yields its lines under a progress bar. RuntimeError where it fails."""
    words = [sys.executable, *map(str, command)]
    pipe, together = subprocess.PIPE, subprocess.STDOUT
    with (
        subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=together, text=True, env=os.environ) as run,
        tqdm(total=steps, desc=name, unit="step", leave=False, disable=None) as bar,
    ):
        last = ""
        for line in run.stdout:
            last = line
            if found := re.match(r"(?:iter|step) (\d+)", line):
                bar.update(int(found[1]) - bar.n)
            yield line
    if run.returncode:
        raise RuntimeError(f"{name} failed: {last}")


def measure(size: Size, programs: dict, rounds: int) -> dict:
    """The row of one size, printed too: speed, loss, and what the products take."""
    seconds = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(statistics.median(program.train(size, timed=True)[0]))
    step = {name: min(medians) for name, medians in seconds.items()}
    loss = {name: program.train(size, timed=False)[1] for name, program in programs.items()}
    floor = {
        str(dtype).removeprefix("torch."): products_alone(size, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    row = {"size": size.name, "seconds_a_step": step, "seconds_a_step_of_each_round": seconds}
    row |= {"validation_loss": loss, "products_alone_seconds": floor}
    row |= {"tokens_a_second": {name: round(BATCH * size.context / value) for name, value in step.items()}}
    row |= {"steps": {"ours": size.steps, "nanogpt": size.nanogpt_steps}}
    row |= {"target_loss": size.target_loss or loss.get("nanogpt")}
    if "nanogpt" in step:
        row |= {"ours_over_nanogpt": round(step["nanogpt"] / step["ours"], 2), "target_speed": size.target_speed}
        row |= {"nanogpt_over_bf16_products": round(step["nanogpt"] / floor["bfloat16"], 2)}
    print_row(row)
    return row


def print_row(row: dict) -> None:
    """What was measured, beside what was aimed at."""
    name, floor = row["size"], row["products_alone_seconds"]
    shown = ", ".join(f"{program} {seconds * 1e3:.1f} ms a step" for program, seconds in row["seconds_a_step"].items())
    print(f"{name}: {shown}")
    print(f"{name}: the products alone {floor['float32'] * 1e3:.1f} ms in fp32, {floor['bfloat16'] * 1e3:.1f} in bf16")
    if "ours_over_nanogpt" in row:
        print(f"{name}: {row['ours_over_nanogpt']} times nanoGPT's tokens a second (target {row['target_speed']})")
        print(f"{name}: {row['nanogpt_over_bf16_products']} times, were all but the products in bf16 free")
    losses = [f"{who} {loss:.4f} after {row['steps'][who]:,} steps" for who, loss in row["validation_loss"].items()]
    aim = f" (target {row['target_loss']})" if row["target_loss"] else ""
    print(f"{name}: validation loss in nats a byte: {', '.join(losses)}{aim}", flush=True)


def products_alone(size: Size, dtype: torch.dtype) -> float:
    """Seconds that the matrix products of one training step take: forward, both gradients, attention's too."""
    rows, width, heads = BATCH * size.context, size.n_embd, BATCH * size.n_head
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    total = 0.0
    for n_in, n_out in [*layer * size.n_layer, (width, 256)]:
        x, w, g = (torch.randn(shape, dtype=dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
        total += best_time(lambda x=x, w=w, g=g: (x @ w.t(), g @ w, g.t() @ x))
    q = torch.randn(heads, size.context, width // size.n_head, dtype=dtype)
    p = torch.randn(heads, size.context, size.context, dtype=dtype)
    attention = lambda: (q @ q.mT, p @ q, p.mT @ q, q @ q.mT, p @ q, p.mT @ q)
    return total + size.n_layer * best_time(attention)


def best_time(work, repeats: int = 5) -> float:
    """The least of some timings, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    cli.run(main, BenchConfig)
