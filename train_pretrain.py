"""Step 1, pretraining: tokens in, a model that predicts the next one out.

    python train_pretrain.py --data runs/tokens --preset tiny --steps 500 --out runs/base
    torchrun --standalone --nproc-per-node 8 train_pretrain.py --data runs/tokens --preset gpt2 --out runs/gpt2

With --model it goes on from a pretrained model's folder, with --mix on a weighted mixture of the data's sources.
"""

import difflib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import cli
from checkpoint import best_checkpoint, mark_best
from cli import UserError
from data.loader import TokenBatches, TokenDataset, documents, open_tokens
from distributed import choose_device, no_sync, parallelize, world_size
from model import CPU_REFERENCE_KEYS, GPT, PRESETS, GPTConfig, flops_per_token
from model_folder import family, read_config, read_model_folder, write_model_folder
from objectives import IGNORE, next_token_loss
from planning import activation_bytes, memory_parts, plan_lines
from tokenizer import Tokenizer, load_tokenizer
from training import (
    Run,
    TrainingConfig,
    build_optimizers,
    compute_dtype,
    known_peak_tflops,
    learning_rate,
    plot_loss,
    start_run,
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Pretrain a model on prepared tokens, or go on pretraining one."""

    data: Path = Path("runs/tokens")
    """Folder that data.prepare wrote."""
    preset: Literal[tuple(PRESETS)] = "tiny"
    """Shape of a new model; its vocabulary becomes the tokenizer's."""
    shape: tuple[str, ...] = ()
    """Changes to the preset, such as n_layer=6 n_embd=384 dropout=0.1: any field of model.GPTConfig."""
    model: Path | None = None
    """Model folder to go on from, in place of a preset."""
    mix: tuple[tuple[str, float], ...] = ()
    """Weights of the data's sources, such as domain 0.7 general 0.3; without it all tokens count alike."""
    tokens_per_step: int = 0
    """Global batch in tokens; gradient accumulation then follows from it."""
    document_mask: bool = False
    """Keep attention within a document, and restart positions in each."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    dry_run: bool = False
    """Print the plan (parameters, FLOPs, memory, tokens, cost) and stop."""
    gpu_price: float | None = None
    """Price of a device-hour, for the plan."""
    expected_mfu: float = 0.4
    """Fraction of --peak-tflops that the plan counts on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_step < 0:
            raise UserError(f"--tokens-per-step must not be negative, not {self.tokens_per_step}")
        if not 0 < self.expected_mfu <= 1:
            raise UserError(f"--expected-mfu is a fraction between 0 and 1, not {self.expected_mfu}")
        if self.gpu_price is not None and not self.gpu_price >= 0:
            raise UserError(f"--gpu-price must not be negative, not {self.gpu_price}")


def main(config: PretrainConfig) -> None:
    dataset = None if config.dry_run and not config.data.exists() else open_tokens(config.data)
    shape = model_shape(config, dataset)
    config = resolve_batch(config, shape)
    if config.dry_run:
        print_plan(config, shape, dataset)
        return
    rows = config.batch_size * config.gradient_accumulation  # sequences of a step that are this rank's
    batches = TokenBatches(config.data, config.sequence_length, rows * world_size(), config.seed, config.mix)
    tokenizer = data_tokenizer(config, dataset)
    with start_run(config, identity(config, shape, dataset)) as run:
        model = build_model(config, shape, run)
        optimizers = build_optimizers(model, config)
        first_step = run.resume(model, optimizers)
        engine = parallelize(torch.compile(model) if config.compile else model, run.world)
        first_row = run.world.rank * rows

        for step in run.steps(first_step):
            if run.due(step, config.eval_every):
                evaluate(run, step, engine, batches)
            inputs, targets = batches.sequences(step, first_row, first_row + rows)  # (rows, T) each
            # of the whole step, over all ranks
            trained_tokens = int(run.world.sum(float((targets != IGNORE).sum()))[0])
            step_loss = torch.zeros((), device=run.world.device)
            for start in range(0, rows, config.batch_size):
                micro = slice(start, start + config.batch_size)
                x, y = inputs[micro].to(run.world.device), targets[micro].to(run.world.device)  # (B, T) each
                with no_sync(engine, last=start + config.batch_size == rows):
                    loss_sum = next_token_loss(engine(x, document_of(x, config, dataset)), y)
                    run.backward(loss_sum / trained_tokens)
                step_loss += loss_sum.detach()
            rate = learning_rate(config, step)
            grad_norm = run.update(model, optimizers, rate)
            run.log_step(step + 1, step_loss, trained_tokens, rate, grad_norm)
            run.save(step + 1, model, optimizers)  # before the evaluation, so that no evaluation costs a trained step

        loss = evaluate(run, config.steps, engine, batches)
        if not math.isfinite(loss):
            raise UserError(
                "the validation loss is no number, so no model is written: lower --learning-rate, --resume never"
            )
        finish(run, model, tokenizer)


def model_shape(config: PretrainConfig, dataset: TokenDataset | None) -> GPTConfig:
    """The shape to train: that of --model, or the preset with its --shape changes and the data's vocabulary."""
    if config.model is not None:
        if config.shape:
            raise UserError("--shape changes a preset: it cannot change the model in --model")
        shape = read_config(config.model)
        if dataset is not None and dataset.vocab_size > shape.vocab_size:
            have = f"{config.data} uses {dataset.vocab_size:,} tokens, {config.model} knows {shape.vocab_size:,}"
            raise UserError(f"{have}: prepare the data with the model's own tokenizer")
        return shape
    changes = {} if dataset is None else {"vocab_size": dataset.vocab_size}
    for change in config.shape:
        name, _, text = change.partition("=")
        changes[name] = shape_value(name, text)
    preset = PRESETS[config.preset]
    # What follows from a changed width is worked out anew unless it is given too.
    if {"n_embd", "n_head"} & changes.keys():
        changes = {"n_kv_head": 0, "head_dim": 0, "n_hidden": 0} | changes
    try:
        shape = replace(preset, **changes)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--shape: {error}") from None
    check_shape(shape, dataset)
    return shape


def check_shape(shape: GPTConfig, dataset: TokenDataset | None) -> None:
    """Raise UserError for a shape that no model can have, or whose vocabulary is too small for the data."""
    sizes = ("vocab_size", "context_length", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_hidden")
    for name in sizes:
        if getattr(shape, name) < 1:
            raise UserError(f"--shape: {name} is {getattr(shape, name)}: give 1 or more")
    if shape.sliding_window is not None and shape.sliding_window < 1:
        raise UserError(f"--shape: sliding_window is {shape.sliding_window}: give 1 or more")
    for name in ("norm_eps", "rope_theta"):
        if not 0 < getattr(shape, name) < math.inf:
            raise UserError(f"--shape: {name} is {getattr(shape, name)}: give a positive number")
    if not 0 <= shape.dropout < 1:
        raise UserError(f"--shape: dropout is {shape.dropout}: give a fraction below 1")
    if dataset is not None and shape.vocab_size < dataset.vocab_size:
        raise UserError(f"--shape: vocab_size {shape.vocab_size:,} is below the data's {dataset.vocab_size:,}")


def shape_value(name: str, text: str) -> Any:
    """The value of `name=text` in --shape, of the field's own type."""
    kinds = get_type_hints(GPTConfig)
    if name not in kinds or name == "rope_scaling":
        nearest = difflib.get_close_matches(name, kinds, n=1)
        raise UserError(
            f"--shape: no field {name!r}" + (f", perhaps {nearest[0]}" if nearest else f": {', '.join(kinds)}")
        )
    kind = kinds[name]
    try:
        if get_origin(kind) is Literal:
            return get_args(kind)[get_args(kind).index(text)]
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return float(text) if kind is float else int(text)
    except (KeyError, ValueError):
        wanted = " or ".join(get_args(kind)) if get_origin(kind) is Literal else getattr(kind, "__name__", "int")
        raise UserError(f"--shape {name}={text}: give {wanted}") from None


def resolve_batch(config: PretrainConfig, shape: GPTConfig) -> PretrainConfig:
    """Fill in the sequence length, and the accumulation that --tokens-per-step asks for."""
    length = config.sequence_length or shape.context_length
    if length > shape.context_length:
        raise UserError(f"--sequence-length {length} is longer than the model's context of {shape.context_length}")
    config = replace(config, sequence_length=length)
    if not config.tokens_per_step:
        return config
    micro_step = config.batch_size * length * world_size()
    if config.tokens_per_step % micro_step:
        nearest = max(1, round(config.tokens_per_step / micro_step)) * micro_step
        have = f"--batch-size {config.batch_size} x {length} tokens x {world_size()} processes = {micro_step:,}"
        raise UserError(f"--tokens-per-step {config.tokens_per_step:,} is no multiple of {have}: take {nearest:,}")
    return replace(config, gradient_accumulation=config.tokens_per_step // micro_step)


def identity(config: PretrainConfig, shape: GPTConfig, dataset: TokenDataset) -> dict[str, Any]:
    """What makes two runs the same run: with it equal, a checkpoint of the one continues the other."""
    return {
        "shape": asdict(shape),
        "model": config.model and str(config.model),
        "data": dataset.fingerprint,
        "tokenizer": dataset.manifest["tokenizer_sha256"],
        "mix": config.mix,
        "seed": config.seed,
        "sequence_length": config.sequence_length,
        "sequences_a_step": config.batch_size * config.gradient_accumulation * world_size(),
        "document_mask": config.document_mask,
        "optimizer": config.optimizer,
    }


def data_tokenizer(config: PretrainConfig, dataset: TokenDataset) -> Tokenizer:
    """The tokenizer that made the data, which goes into the model's folder. UserError if --model has another."""
    tokenizer = load_tokenizer(config.data / "tokenizer")
    wanted = dataset.manifest["tokenizer_sha256"]
    if tokenizer.fingerprint() != wanted:
        raise UserError(f"{config.data / 'tokenizer'} is not the tokenizer of {config.data}: run data.prepare again")
    if config.model is not None and load_tokenizer(config.model).fingerprint() != wanted:
        raise UserError(f"{config.data} was prepared with another tokenizer than that of {config.model}")
    return tokenizer


def build_model(config: PretrainConfig, shape: GPTConfig, run: Run) -> GPT:
    """A new model, or the one in --model, ready to train on this run's device."""
    if config.model is None:
        with run.world.device:
            model = GPT(shape)
    else:
        model = read_model_folder(config.model, device=run.world.device)
    model.compute_dtype, model.attention = run.dtype, config.attention
    model.checkpointing = config.checkpoint_activations
    run.flops_per_token = flops_per_token(shape, config.sequence_length)
    count = sum(p.numel() for p in model.parameters())
    devices = f"{run.world.size} x {run.world.device.type}"
    run.say(f"{count:,} parameters, {str(run.dtype).removeprefix('torch.')} on {devices}, into {config.out}")
    return model


def document_of(inputs: Tensor, config: PretrainConfig, dataset: TokenDataset) -> Tensor | None:
    """Each token's document (B, T) where attention is to stay within it, else None."""
    return documents(inputs, dataset.end_of_text) if config.document_mask else None


@torch.no_grad()
def evaluate(run: Run, step: int, engine: nn.Module, batches: TokenBatches) -> float:
    """Log and return the loss over fixed windows that cover the validation split, in nats a token; log bits a byte."""
    engine.eval()
    size, windows = run.config.batch_size, batches.validation_windows()
    loss_sum = trained_tokens = 0.0
    for start in range(run.world.rank * size, windows, run.world.size * size):
        inputs, targets = batches.validation(start, min(start + size, windows))  # (B, T) each
        x, y = inputs.to(run.world.device), targets.to(run.world.device)
        loss_sum += float(next_token_loss(engine(x, document_of(x, run.config, batches.dataset)), y))
        trained_tokens += float((targets != IGNORE).sum())
    engine.train()
    loss_sum, trained_tokens = run.world.sum(loss_sum, trained_tokens)
    loss, bits_per_byte = loss_sum / trained_tokens, loss_sum / math.log(2) / batches.validation_split.bytes
    run.log(step, "validation", loss=loss, bits_per_byte=bits_per_byte, tokens=run.tokens)
    run.say(f"step {step}: validation loss {loss:.4f} nats a token, {bits_per_byte:.4f} bits per byte")
    if run.world.main:
        mark_best(run.checkpoints, step, loss)
    run.start_clock()  # an evaluation is no part of the next step's time
    return loss


def finish(run: Run, model: GPT, tokenizer: Tokenizer) -> None:
    """Write the model folder and the loss curve, and say where everything lies."""
    if not run.world.main:
        return
    out, best = run.config.out, best_checkpoint(run.checkpoints)
    write_model_folder(out, model, tokenizer)
    plot_loss(out)
    if family(model.config) == "gpt":
        run.say("this mixture of GPT-2 and Llama is a shape of our own, which transformers does not open")
    run.say(f"model in {out}, loss curve in {out / 'loss.png'}, {run.seconds:,.0f} s of training steps")
    if best and best["step"] != run.config.steps:
        run.say(f"the lowest validation loss was {best['loss']:.4f}, of {run.checkpoints / best['name']}")


def print_plan(config: PretrainConfig, shape: GPTConfig, dataset: TokenDataset | None) -> None:
    """What --dry-run prints: parameters, FLOPs, memory by part, tokens, hours and cost."""
    device = choose_device(config.device)
    dtype = compute_dtype(config.dtype, device)
    short = device.type == "cpu" and config.sequence_length <= CPU_REFERENCE_KEYS
    unfused = config.attention == "reference" or (config.attention == "auto" and short)
    # PyTorch's CPU attention is written out, too, where it has dropout.
    fused = not unfused and not (device.type == "cpu" and shape.dropout > 0)
    kept = activation_bytes(
        shape, config.batch_size, config.sequence_length, dtype, config.checkpoint_activations, fused
    )
    rows = config.batch_size * config.gradient_accumulation * world_size()
    lines = plan_lines(
        shape,
        memory_parts(shape, config.optimizer, kept),
        sequence_length=config.sequence_length,
        tokens_per_step=rows * config.sequence_length,
        steps=config.steps,
        devices=world_size(),
        data_tokens=None if dataset is None else len(dataset.splits["train"]),
        peak_tflops=config.peak_tflops or known_peak_tflops(device),
        expected_mfu=config.expected_mfu,
        gpu_price=config.gpu_price,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, PretrainConfig)
