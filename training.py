"""What every training loop is made of: flags, precision, schedules, optimizers, metrics, signals, the run's folder.

The loops themselves stand in the scripts. A `Run` is their hand: it holds no model and decides nothing about a loss.
"""

import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_after,
    save_checkpoint,
    verify,
)
from cli import UserError
from distributed import Device, Parallel, World, end_world, start_world
from model import Attention

# Dense bf16 peak, TFLOP/s, by a part of the device's name (the vendors' data sheets).
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A30": 165, "4090": 165}
FP16_START_SCALE, FP16_GROWTH_STEPS = 2.0**16, 2000
BAD_STEPS_LIMIT = 20
SAVED_STATE = ("tokens", "seconds", "loss_scale", "good_steps", "bad_steps")  # of a Run, in each checkpoint
RUN_PARTIAL = ".run.partial"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags that all training scripts share."""

    out: Path = Path("runs/base")
    """Folder of the run: metrics, checkpoints, and at the end the model."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences a device and micro-step."""
    sequence_length: int = 0
    """Tokens a sequence; 0 takes the model's context length."""
    gradient_accumulation: int = 1
    """Micro-steps whose gradients are added up before an optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course after the warmup; wsd stays at the peak and falls linearly over the last fifth."""
    final_learning_rate: float = 0.1
    """Where the schedule ends, as a fraction of the peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for embeddings, head, gains and biases."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices alone."""
    beta2: float = 0.95
    """Decay of AdamW's second moment; small batches like 0.99."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation; parameters and optimizer stay fp32. auto: bf16 where the hardware multiplies it."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start, faster steps after."""
    attention: Attention = "auto"
    """Attention implementation; auto takes the fastest one for the device and length."""
    parallel: Parallel = "auto"
    """How processes share the work; auto is ddp under torchrun."""
    seed: int = 0
    """Seed of initialisation, batches and dropout."""
    eval_every: int = 250
    """Steps between evaluations; 0 evaluates at the end alone."""
    save_every: int = 250
    """Steps between checkpoints, besides one before each evaluation; 0 saves none between."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    resume: str = "auto"
    """auto goes on from the newest whole checkpoint in --out, never starts anew, a path names one checkpoint."""
    log: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"
    """Where metrics go beside metrics.jsonl."""
    device: Device = "auto"
    """Device to compute on."""
    peak_tflops: float | None = None
    """The device's peak, TFLOP/s, for MFU and --dry-run; known for common GPUs."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "keep", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "save_every", "weight_decay", "clip", "sequence_length"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} must not be negative, not {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(field.name)} must be a finite number, not {value}")
        if not 0 <= self.final_learning_rate <= 1 or not 0 < self.beta2 < 1:
            raise UserError("--final-learning-rate and --beta2 are fractions between 0 and 1")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UserError(f"--peak-tflops must be positive, not {self.peak_tflops}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be 0 or more and below 2^32, not {self.seed}")


def flag(name: str) -> str:
    """A field's name as the user types it."""
    return "--" + name.replace("_", "-")


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of step number `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":  # warmup, stable, decay (Hu et al. 2024, "MiniCPM")
        start = max(start, math.floor(0.8 * config.steps))
    progress = min(1.0, max(0, step - start) / max(1, config.steps - start))
    if config.schedule == "constant":
        progress = 0.0
    elif config.schedule == "cosine":  # Loshchilov and Hutter 2017, "SGDR"
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return config.learning_rate * (1 + (config.final_learning_rate - 1) * progress)


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), decaying matrices alone; or Muon on the blocks' matrices, AdamW on the rest.

    Muon (Jordan et al. 2024) has its update scaled to AdamW's root mean square (Liu et al. 2025, "Muon is scalable"),
    so that one learning rate serves both.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in trained if config.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.")]
    ours = {id(p) for p in muon}
    matrices = [p for _, p in trained if p.dim() >= 2 and id(p) not in ours]
    vectors = [p for _, p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=(0.9, config.beta2), fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision `dtype` asks for; auto is bf16 where the device multiplies it natively, else fp32."""
    if dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel.

    Activations of megabytes are freed and taken again every step; mapping and zeroing their pages anew costs a CPU a
    tenth of the step and more. Elsewhere than on Linux with glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


class StopSignal:
    """Remembers SIGTERM or SIGINT so that the step in work can end; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class Run:
    """One training run: its processes, folder, metrics, gradient scale and clock. Made by `start_run`.

    Nothing is written before `resume`, so that whatever building the model finds wrong leaves no trace.
    """

    def __init__(self, config: TrainingConfig, world: World, identity: dict[str, Any]) -> None:
        self.config, self.world, self.identity = config, world, identity
        self.dtype = compute_dtype(config.dtype, world.device)
        self.loss_scale = FP16_START_SCALE if self.dtype == torch.float16 else 1.0
        self.good_steps = self.bad_steps = 0
        self.tokens = 0  # trained so far
        self.seconds = 0.0  # of training steps so far
        self.flops_per_token = 0.0
        self.checkpoints = config.out / "checkpoints"
        self.signal = StopSignal()
        self.stopping = False
        self.metrics: TextIO | None = None  # the first rank's, from `resume` on
        self.mirror: Mirror | None = None
        self.bar: tqdm | None = None

    def steps(self, first: int) -> Iterator[int]:
        """Step numbers `first` ... config.steps - 1 under a progress bar. Exits with 128 + the signal if one came."""
        # disable=None: no bar where stderr is a file, whose only lines are then errors
        hide = None if self.world.main else True
        self.bar = tqdm(total=self.config.steps, initial=first, unit="step", disable=hide, smoothing=0.1)
        self.start_clock()
        for step in range(first, self.config.steps):
            # Dropout as a pure function of (seed, step, rank): there is no generator state to save or to lose.
            self.world.seed((self.config.seed * 1_000_003 + step) * 1_009 + self.world.rank)
            yield step
            if self.stopping:
                self.bar.close()
                number = self.signal.number or signal.SIGTERM
                self.say(f"stopped by signal {number} after step {step + 1}, saved; the same command goes on")
                sys.exit(128 + number)
        self.bar.close()

    def start_clock(self) -> None:
        """Measure the step's time from here on."""
        self.started = time.perf_counter()

    def due(self, step: int, every: int) -> bool:
        """Whether something done `every` steps is due after `step` finished steps; at the end it always is."""
        return step == self.config.steps or (every > 0 and step > 0 and step % every == 0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this rank's share of the step's mean over all ranks' trained tokens."""
        # DDP averages over ranks where a sum is wanted.
        (loss * (self.loss_scale * self.world.size)).backward()

    def update(self, model: nn.Module, optimizers: list[Optimizer], rate: float) -> float:
        """Unscale and clip the gradients, step the optimizers at rate `rate`, clear; returns the gradient norm.

        A step whose gradient is not finite changes nothing: in fp16 the loss scale is halved (Micikevicius et al. 2018,
        "Mixed precision training"); 20 such steps in a row are an error.
        """
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) / self.loss_scale
        if math.isfinite(norm):
            factor = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
            if factor != 1.0 or self.loss_scale != 1.0:
                torch._foreach_mul_(gradients, factor / self.loss_scale)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        self.adapt_scale(math.isfinite(norm))
        if not math.isfinite(norm):
            scale = f", loss scale now {self.loss_scale:g}" if self.dtype == torch.float16 else ""
            self.say(f"the gradient is not finite: the step changes nothing{scale}")
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm

    def adapt_scale(self, finite: bool) -> None:
        self.good_steps, self.bad_steps = (self.good_steps + 1, 0) if finite else (0, self.bad_steps + 1)
        if self.bad_steps >= BAD_STEPS_LIMIT:
            raise UserError(f"the gradient was not finite {BAD_STEPS_LIMIT} steps in a row: lower --learning-rate")
        if self.dtype != torch.float16:
            return
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps % FP16_GROWTH_STEPS == 0:
            self.loss_scale *= 2

    def log_step(self, step: int, loss_sum: Tensor, trained_tokens: int, rate: float, grad_norm: float) -> None:
        """Log a finished training step. `loss_sum`, this rank's; `trained_tokens`, of the whole step and all ranks.

        Every rank calls it: here they also agree on whether a signal asked them to stop.
        """
        total, stop = self.world.sum(float(loss_sum), float(self.signal.number > 0))
        self.stopping = stop > 0
        elapsed = time.perf_counter() - self.started  # from the last step's end: all but evaluations and checkpoints
        self.start_clock()
        self.tokens += trained_tokens
        self.seconds += elapsed
        speed = trained_tokens / elapsed
        self.log(
            step,
            "train",
            loss=total / trained_tokens,
            tokens=self.tokens,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            mfu=self.mfu(speed),
            seconds=self.seconds,
            peak_memory_bytes=peak_memory(self.world.device),
        )
        if self.bar is not None:
            progress = f"loss {total / trained_tokens:.3f}, {speed:,.0f} tokens/s"
            self.bar.set_postfix_str(progress, refresh=False)
            self.bar.update()
            if self.bar.disable and self.due(step, math.ceil(self.config.steps / 10)):  # nobody watches: a log file
                self.say(f"step {step} of {self.config.steps}: {progress}")

    def log(self, step: int, split: str, **values: float | None) -> None:
        """One line of metrics.jsonl, and of the mirror if one was asked for. Other ranks than the first do nothing."""
        if self.metrics is None:
            return
        # JSON has no NaN or infinity; null says "not a finite number" to every reader.
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps({"step": step, "split": split} | finite) + "\n")
        self.metrics.flush()
        if self.mirror is not None:
            self.mirror.write({f"{split}/{name}": value for name, value in finite.items() if value is not None}, step)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation a device (Chowdhery et al. 2022), or None where the device's peak is not known."""
        peak = self.config.peak_tflops or known_peak_tflops(self.world.device)
        return None if not peak else self.flops_per_token * tokens_per_second / self.world.size / (peak * 1e12)

    def say(self, line: str) -> None:
        """Print a line above the progress bar, once for all ranks."""
        if self.world.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def save(self, step: int, model: nn.Module, optimizers: list[Optimizer]) -> None:
        """Save a checkpoint after `step` finished steps if one or an evaluation is due, or if the run is stopping."""
        due = self.due(step, self.config.save_every) or self.due(step, self.config.eval_every)
        if not (self.stopping or due):
            return
        if self.world.main:
            os.fsync(self.metrics.fileno())  # no checkpoint outlives the metrics of its own steps
            state = {name: getattr(self, name) for name in SAVED_STATE}
            save_checkpoint(self.checkpoints, step, model, optimizers, state, self.config.keep)
        self.world.barrier()
        self.start_clock()

    def resume(self, model: nn.Module, optimizers: list[Optimizer]) -> int:
        """Fill model and optimizers from the checkpoint that --resume names, if any, and open the run's folder.

        Returns the steps already done. From here on the run writes.
        """
        path = find_checkpoint(self.config, self.checkpoints, self.say)
        fresh = {"step": 0} | {name: getattr(self, name) for name in SAVED_STATE}
        state = fresh if path is None else load_checkpoint(path, model, optimizers)
        step = state["step"]
        if step > self.config.steps:
            raise UserError(f"{path} has {step} steps behind it, --steps is {self.config.steps}: give {step} or more")
        for name in SAVED_STATE:
            setattr(self, name, state[name])
        self.world.barrier()  # all ranks have read what the first one is about to clear up
        if self.world.main:
            open_folder(self.config, self.identity)
            if removed := remove_after(self.checkpoints, step):
                self.say(f"going on from step {step}: deleted {', '.join(later.name for later in removed)}")
            self.metrics = reopen_metrics(self.config.out / "metrics.jsonl", step)
            self.mirror = open_mirror(self.config, step)
        if path is not None:
            self.say(f"resumed from {path}")
        return step

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Close bar and files. After an error the process group is left as it is: its other ranks may be gone."""
        for file in (self.bar, self.metrics, self.mirror):
            if file is not None:
                file.close()
        if kind in (None, SystemExit):
            self.world.barrier()  # a rank that leaves while the first still writes would break its connections
            end_world()


def start_run(config: TrainingConfig, identity: dict[str, Any]) -> Run:
    """Join the other processes, seed, open the run's folder.

    `identity` is what makes two runs the same one: shape, data, seed, batch. A folder that holds a run of another
    identity, or anything that is no run, is refused.
    """
    world = start_world(config.device, config.parallel)
    if world.device.type == "cpu":
        keep_freed_memory()
    check_compiler(config, world)
    if config.log != "jsonl" and importlib.util.find_spec(config.log) is None:
        raise UserError(f"--log {config.log}: pip install {config.log}")
    check_folder(config, identity)  # on all ranks, before any writes: they fail alike or not at all
    world.barrier()
    torch.manual_seed(config.seed)
    return Run(config, world, json.loads(json.dumps(identity)))


def check_folder(config: TrainingConfig, identity: dict[str, Any]) -> None:
    """Raise UserError unless --out is new, empty, or holds a run that these flags may go on with or replace."""
    out, record = config.out, config.out / "run.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if not record.is_file():
        if out.exists() and any(path.name != RUN_PARTIAL for path in out.iterdir()):
            raise UserError(f"--out {out} holds other files and no run: name a new or empty folder")
        return
    begun = (out / "config.json").exists() or any(checkpoints(out / "checkpoints"))
    if config.resume == "never" or not begun:
        return
    try:
        old = flatten(json.loads(record.read_text())["identity"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{record} is damaged: name another --out, or --resume never to replace the run") from None
    new = flatten(json.loads(json.dumps(identity)))
    if changed := [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]:
        was = "; ".join(f"{name} was {old.get(name)} and is now {new.get(name)}" for name in changed[:3])
        raise UserError(f"{out} holds another run: {was}. Name another --out, or --resume never to replace it")


def flatten(identity: dict[str, Any]) -> dict[str, Any]:
    """Nested keys as one, joined by dots."""
    flat = {}
    for name, value in identity.items():
        flat |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def open_folder(config: TrainingConfig, identity: dict[str, Any]) -> None:
    """Make --out and write its run.json; with --resume never the model that stands there is no model any more."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.resume == "never":
        (config.out / "config.json").unlink(missing_ok=True)
    partial = config.out / RUN_PARTIAL
    partial.write_text(json.dumps(describe_run(config, identity), indent=2, default=str) + "\n")
    partial.replace(config.out / "run.json")


def reopen_metrics(path: Path, step: int) -> TextIO:
    """metrics.jsonl, cut off where a run that goes on from `step` steps logs anew; a torn last line goes too."""
    kept = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        if not logged_before(line, step):
            break
        kept += len(line)
    file = path.open("a", encoding="utf-8")
    file.truncate(kept)
    return file


def logged_before(line: bytes, step: int) -> bool:
    """Whether this line was written before the checkpoint of `step`, which precedes that step's evaluation."""
    try:
        logged = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and (logged["step"], logged["split"] != "train") < (step, True)


def describe_run(config: TrainingConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json: resolved flags, seed, versions, git commit, fingerprints."""
    here = Path(__file__).parent
    asked = ["git", "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(asked, cwd=here, capture_output=True, text=True, check=False)
    return {
        "script": Path(sys.argv[0]).name,
        "flags": dataclasses.asdict(config),
        "seed": config.seed,
        "identity": identity,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git_commit": (git and git.stdout.strip()) or None,
    }


def find_checkpoint(config: TrainingConfig, folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that --resume means. UserError for a path that is none or is damaged."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return latest_checkpoint(folder, say)
    path = Path(config.resume)
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such checkpoint (auto, never, or a folder named step-...)")
    if damage := verify(path):
        raise UserError(f"--resume: {damage}")
    return path


def check_compiler(config: TrainingConfig, world: World) -> None:
    if config.compile and world.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile needs a C++ compiler on a CPU: install g++, or leave --compile out")


def known_peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, if its name is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: of the GPU's memory where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Mirror:
    """Where metrics are copied to: `write` takes names with values and the step."""

    write: Callable[[dict[str, float], int], Any]
    close: Callable[[], None]


def open_mirror(config: TrainingConfig, step: int) -> Mirror | None:
    """TensorBoard or Weights & Biases, if asked for. What a killed run wrote there after `step` is hidden or left."""
    if config.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(config.out / "tensorboard", purge_step=step + 1)
        return Mirror(lambda values, at: [writer.add_scalar(*item, at) for item in values.items()], writer.close)
    if config.log == "wandb":
        import wandb

        run = wandb.init(dir=config.out, name=config.out.name, config=dataclasses.asdict(config))
        return Mirror(lambda values, at: run.log(values, step=at), run.finish)
    return None


def read_metrics(folder: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that belong to `split`."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def plot_loss(folder: Path) -> Path:
    """Draw the run's training and validation loss over tokens into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train, validation = read_metrics(folder, "train"), read_metrics(folder, "validation")
    axes.plot([line["tokens"] for line in train], [line["loss"] for line in train], lw=0.8, alpha=0.6, label="training")
    points = [line["tokens"] for line in validation], [line["loss"] for line in validation]
    axes.plot(*points, "o-", ms=4, label="validation")
    if validation and points[1][-1] is not None:
        last, place = (points[0][-1], points[1][-1]), {"xytext": (0, 8), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{last[1]:.3f}", last, **place)
    axes.set(xlabel="tokens trained", ylabel="loss (nats a token)")
    axes.set_title(f"{folder.name}: loss".encode("utf-8", "replace").decode(), parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    return folder / "loss.png"
