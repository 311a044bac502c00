"""train_pretrain.py from end to end: what a run writes, and that no accident changes it by a bit."""

import contextlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPE, flags, losses, make_tokens, metrics, start, wait_for_lines

import checkpoint
import cli
import train_pretrain
import training
from checkpoint import best_checkpoint, checkpoints
from data import ngram
from data.loader import TokenBatches, open_tokens
from model import GPT
from model_folder import read_model_folder
from objectives import IGNORE
from tokenizer import load_tokenizer
from train_pretrain import PretrainConfig
from training import Run, TrainingConfig, learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
Pretrain = Callable[..., list[dict]]
# 411 windows of training tokens, 48 a step: the ninth step crosses the end of the epoch.
LONG = {"batch_size": 16, "gradient_accumulation": 3}


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(out / "checkpoints")]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a run is


def test_a_whole_run(pretrain: Pretrain, tokens: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    lines = pretrain(out, steps=12, learning_rate=0.01)
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["tokens"] for line in train] == [128 * step for step in range(1, 13)]
    config = TrainingConfig(steps=12, learning_rate=0.01, warmup_steps=3)
    assert [line["learning_rate"] for line in train] == [learning_rate(config, step) for step in range(12)]
    assert [(line["step"], line["tokens"]) for line in lines if line["split"] == "validation"] == [
        (5, 640),
        (10, 1280),
        (12, 1536),
    ]
    assert losses(lines)[0] == pytest.approx(math.log(259), abs=0.2) and losses(lines)[-1] < 4.5  # it learns
    assert all(0 < line["grad_norm"] < 20 for line in train)
    full = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    contract = ["step", "split", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "seconds"]
    assert list(full) == [*contract, "peak_memory_bytes"]

    # Checkpoints: each fourth step, before each evaluation, at the end; two are kept, and the best.
    assert names(out) == ["step-00000012", "step-00000010"]
    assert best_checkpoint(out / "checkpoints")["step"] == 12
    assert best_checkpoint(out / "checkpoints")["loss"] == losses(lines, "validation")[-1]

    record, dataset = json.loads((out / "run.json").read_text()), open_tokens(tokens)
    assert record["flags"].keys() == {field.name for field in fields(PretrainConfig)}
    assert (record["flags"]["steps"], record["flags"]["sequence_length"], record["seed"]) == (12, 32, 0)
    assert record["identity"]["data"] == dataset.fingerprint
    assert record["identity"]["tokenizer"] == dataset.manifest["tokenizer_sha256"]
    assert record["identity"]["shape"]["n_layer"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_commit"] is None or len(record["git_commit"]) == 40
    assert (out / "loss.png").stat().st_size > 5000
    assert "model in" in capsys.readouterr().out

    # The same command again has nothing to train, and leaves everything as it was.
    before = weights(out)
    assert pretrain(out, steps=12, learning_rate=0.01) == lines
    assert weights(out) == before


def test_transformers_opens_the_finished_folder(pretrain: Pretrain, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrain(tmp_path / "run", steps=3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ours = read_model_folder(tmp_path / "run").eval()
    text = "def wrap(text, width=70):"
    ids = load_tokenizer(tmp_path / "run").encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "run")(text)["input_ids"] == ids
    with torch.no_grad():
        ours_logits, theirs_logits = ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    assert (ours_logits - theirs_logits).abs().max() < 1e-4 and ours_logits.std() > 0.01


def test_validation_loss_by_hand(pretrain: Pretrain, tokens: Path, tmp_path: Path):
    """Every validation token is a target once, in windows of 32 fed with the token before; no batch size matters."""
    results = [
        next(line for line in pretrain(tmp_path / f"{size}", steps=1, **split) if line["split"] == "validation")
        for size, split in enumerate(
            [
                {"batch_size": 6},
                {"batch_size": 1, "gradient_accumulation": 6},
                {"batch_size": 2, "tokens_per_step": 192},
            ]
        )
    ]
    stream = torch.from_numpy(np.load(tokens / "validation-00000.npy").astype(np.int64))
    model, total = read_model_folder(tmp_path / "0").eval(), 0.0
    for first in range(0, len(stream), 32):
        targets = stream[first : first + 32]
        inputs = torch.cat([stream[first - 1 : first] if first else stream[-1:], targets[:-1]])
        with torch.no_grad():
            total -= float(model(inputs[None])[0].log_softmax(-1).gather(1, targets[:, None]).sum())
    text_bytes = open_tokens(tokens).manifest["splits"]["validation"]["bytes"]
    assert text_bytes == int((stream < 256).sum())  # a byte is a token here, and end-of-text is no text
    for result in results:
        assert result["loss"] == pytest.approx(total / len(stream), rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-6)


def test_tokens_per_step(pretrain: Pretrain, tmp_path: Path):
    """512 tokens a step are 4 micro-steps of 4 sequences of 32, and the same run as if these were given."""
    asked = pretrain(tmp_path / "a", steps=3, tokens_per_step=512)
    assert asked == pretrain(tmp_path / "b", steps=3, gradient_accumulation=4)
    assert [line["tokens"] for line in asked if line["split"] == "train"] == [512, 1024, 1536]


def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train 0 to 32 targets of each sequence, by a rule of its own content, so that every split sees the same."""
    whole = TokenBatches.sequences

    def sequences(self, step, first, stop):
        inputs, targets = whole(self, step, first, stop)
        for row in range(len(targets)):
            targets[row, int(inputs[row].sum()) % 33 :] = IGNORE
        return inputs, targets

    monkeypatch.setattr(TokenBatches, "sequences", sequences)


def test_accumulation_is_no_change(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    """1x8, 8x1 and 2x4 with ragged trained tokens and documents: the same losses, norms and weights."""
    ragged(monkeypatch)
    shapes = [
        {"batch_size": 8},
        {"batch_size": 1, "gradient_accumulation": 8},
        {"batch_size": 2, "tokens_per_step": 256},
    ]
    runs = [
        pretrain(tmp_path / f"{place}", document_mask=True, steps=10, clip=0.5, **shape)
        for place, shape in enumerate(shapes)
    ]
    spread = [line["tokens"] for line in runs[0] if line["split"] == "train"]
    assert len(set(np.diff(spread))) > 5  # the steps do train unequal numbers of tokens
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert one.keys() == other.keys() and one["tokens"] == other["tokens"]
            assert other["loss"] == pytest.approx(one["loss"], rel=2e-6)
            assert other.get("grad_norm", 0) == pytest.approx(one.get("grad_norm", 0), rel=1e-5)
    models = [read_model_folder(tmp_path / f"{place}") for place in range(3)]
    for name, parameter in models[0].named_parameters():
        for model in models[1:]:
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=2e-6, msg=name)


def test_documents_are_masked(pretrain: Pretrain, tokens: Path, tmp_path: Path, monkeypatch):
    """--document-mask hands the model each token's document; without it the model sees whole windows."""
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, x, documents=None: seen.append((x, documents)) or forward(self, x, documents)
    )
    pretrain(tmp_path / "masked", steps=2, document_mask=True)
    end = open_tokens(tokens).end_of_text
    assert any(int(documents.max()) > 0 for _, documents in seen)
    assert all(torch.equal(documents, (x == end).cumsum(-1)) for x, documents in seen)
    seen.clear()
    pretrain(tmp_path / "plain", steps=2)
    assert all(documents is None for _, documents in seen)


@pytest.mark.parametrize(("owner", "name"), [(TokenBatches, "validation_windows"), (training, "save_checkpoint")])
def test_what_is_no_training_time(owner, name, pretrain: Pretrain, tmp_path: Path, monkeypatch):
    """On a clock that each evaluation, or each checkpoint, puts forward by 1,000 seconds, no step takes that long."""
    late, clock, work = [0.0], time.perf_counter, getattr(owner, name)

    def slow(*arguments):
        late[0] += 1000.0
        return work(*arguments)

    monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock() + late[0])
    often = {"eval_every": 3, "save_every": 0} if owner is TokenBatches else {"eval_every": 0, "save_every": 3}
    pretrain(tmp_path / "run", steps=7, **often)
    assert late[0] == 3000.0
    assert training.read_metrics(tmp_path / "run", "train")[-1]["seconds"] < 500


def test_a_machine_without_git(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    pretrain(tmp_path / "run", steps=1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git_commit"] is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_learns_alike(dtype, pretrain: Pretrain, tmp_path: Path):
    whole = pretrain(tmp_path / "fp32", steps=8)
    half = pretrain(tmp_path / dtype, steps=8, dtype=dtype)
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), abs=0.02)
    assert read_model_folder(tmp_path / dtype).embed_tokens.weight.dtype == torch.float32


# Accidents


class Accident(BaseException):
    """Stands for the end of the process: nothing of the project catches it."""


def accident(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the `call`-th call of `owner.name` be the last thing this run does."""
    calls, whole = [0], getattr(owner, name)

    def die(*arguments, **named):
        calls[0] += 1
        if calls[0] == call:
            raise Accident
        return whole(*arguments, **named)

    monkeypatch.setattr(owner, name, die)


KINDS = {
    "fp32": {"mix": (("alpha", 1.0), ("beta", 2.0))},
    "fp32, documents, recomputed": {"document_mask": True, "checkpoint_activations": True},
    "bf16, Muon": {"dtype": "bf16", "optimizer": "muon"},
    "fp16": {"dtype": "fp16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_accidents_change_no_bit(kind, pretrain: Pretrain, tmp_path: Path, monkeypatch):
    """A run that dies before an update, in an evaluation, and in three stages of writing a checkpoint, over an epoch's
    end and with dropout, ends with the metrics and the weights of a run that nothing happened to."""
    # A scale that overflows at first and then grows, so that its state matters.
    monkeypatch.setattr(training, "FP16_START_SCALE", 2.0**20)
    monkeypatch.setattr(training, "FP16_GROWTH_STEPS", 2)
    settings = LONG | KINDS[kind] | {"steps": 12, "eval_every": 4, "save_every": 3}
    expected = pretrain(tmp_path / "calm", "dropout=0.2", **settings)
    skipped = [line["step"] for line in expected if line.get("grad_norm", 0) is None]
    assert 0 < len(skipped) < 6 if kind == "fp16" else not skipped

    out, died = tmp_path / "shaken", []
    for owner, name, call in (
        (Run, "update", 2),  # before any checkpoint
        (Run, "update", 6),
        (train_pretrain, "evaluate", 1),
        (checkpoint, "save_file", 2),
        (checkpoint, "sha256_file", 5),
        (train_pretrain, "mark_best", 2),
        (train_pretrain, "write_model_folder", 1),
    ):
        with monkeypatch.context() as patch, pytest.raises(Accident):
            accident(patch, owner, name, call)
            pretrain(out, "dropout=0.2", **settings)
        died.append(len(metrics(out)))
        assert not (out / "config.json").exists()  # no half-trained model passes for a whole one
    assert died[0] == 1 and died[-1] == len(expected)
    assert pretrain(out, "dropout=0.2", **settings) == expected
    assert weights(out) == weights(tmp_path / "calm")
    assert names(out) == names(tmp_path / "calm")
    assert best_checkpoint(out / "checkpoints") == best_checkpoint(tmp_path / "calm" / "checkpoints")
    state = "optimizer.pt", "model.safetensors"
    for name in state:
        last = [folder / "checkpoints" / "step-00000012" / name for folder in (out, tmp_path / "calm")]
        assert last[0].read_bytes() == last[1].read_bytes()
    assert not list((out / "checkpoints").glob(".step-*"))


def test_an_evaluation_that_dies_loses_no_step(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    """Even where no checkpoint is due by --save-every."""
    with monkeypatch.context() as patch, pytest.raises(Accident):
        accident(patch, train_pretrain, "evaluate", 1)
        pretrain(tmp_path / "run", save_every=0, eval_every=7)
    assert names(tmp_path / "run") == ["step-00000007"]


def test_a_damaged_checkpoint_is_passed_over(pretrain: Pretrain, tmp_path: Path, capsys):
    expected = pretrain(tmp_path / "calm", "dropout=0.2")
    pretrain(tmp_path / "run", "dropout=0.2")
    newest, before = names(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / newest / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    assert pretrain(tmp_path / "run", "dropout=0.2") == expected
    said = capsys.readouterr().out
    assert f"{damaged} is damaged" in said and f"resumed from {tmp_path / 'run' / 'checkpoints' / before}" in said
    assert weights(tmp_path / "run") == weights(tmp_path / "calm")
    assert checkpoint.verify(damaged.parent) is None


def test_kill_terminate_interrupt_and_go_on(pretrain: Pretrain, tokens: Path, tmp_path: Path):
    """One run is terminated, interrupted and killed in processes of its own, and ends as if it had been left alone."""
    settings = {"steps": 300, "eval_every": 40, "save_every": 25}
    out = tmp_path / "run"
    command = flags(tokens, out, "dropout=0.1", **settings)
    dice, reached = random.Random(0), 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        run = start(command)
        wait_for_lines(run, out, reached + dice.randrange(20, 60))
        run.send_signal(number)
        said, errors = run.communicate(timeout=120)
        assert run.returncode == status, errors
        assert not (out / "config.json").exists()
        reached = len(metrics(out))
        if number != signal.SIGKILL:
            done = max(line["step"] for line in metrics(out))
            assert names(out)[0] == f"step-{done:08d}"  # it finished its step and saved
            assert f"stopped by signal {int(number)} after step {done}, saved" in said and errors == ""
    run = start(command)
    said, errors = run.communicate(timeout=120)
    assert run.returncode == 0 and "resumed from" in said and errors == ""
    expected = pretrain(tmp_path / "calm", "dropout=0.1", **settings)
    assert metrics(out) == expected
    assert weights(out) == weights(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills(processes, tokens: Path, tmp_path: Path):
    """20 kills (6 of two processes), every other one while a checkpoint is being written."""
    settings = {"steps": 600, "eval_every": 60, "save_every": 3, "keep": 3}
    calm = start(flags(tokens, tmp_path / "calm", "dropout=0.1", **settings), processes)
    assert calm.wait(600) == 0
    out, dice, kills, in_writing = tmp_path / "run", random.Random(processes), 0, 0
    command = flags(tokens, out, "dropout=0.1", **settings)
    wanted = {1: 20, 2: 6}[processes]
    while kills < wanted:
        run = start(command, processes)
        lines = len(metrics_or_none(out))
        wait_for_lines(run, out, lines + dice.randrange(1, 25))
        while kills % 2 and run.poll() is None and not list((out / "checkpoints").glob(".step-*.partial")):
            pass
        kill_all(run)
        run.communicate()
        assert run.returncode != 0, "the run was over before all the kills: give it more steps"
        kills += 1
        in_writing += bool(list((out / "checkpoints").glob(".step-*.partial")))
    assert in_writing > 0
    assert start(command, processes).wait(600) == 0
    assert metrics(out) == metrics(tmp_path / "calm")
    assert weights(out) == weights(tmp_path / "calm")


def metrics_or_none(out: Path) -> list[bytes]:
    path = out / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.is_file() else []


def kill_all(run) -> None:
    """kill -9 a run and its workers."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in [str(run.pid), *children]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


# Going on, going back, going elsewhere


def test_resume_never_starts_anew(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    pretrain(out, seed=1, steps=9)
    first = weights(out)
    with monkeypatch.context() as patch, pytest.raises(Accident):
        accident(patch, Run, "update", 2)
        pretrain(out, seed=2, steps=4, resume="never")
    assert not (out / "config.json").exists()  # the old model is gone as soon as its run is
    lines = pretrain(out, seed=2, steps=4, resume="never")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    assert weights(out) != first and names(out) == ["step-00000004"]
    assert lines == pretrain(tmp_path / "fresh", seed=2, steps=4)
    assert weights(out) == weights(tmp_path / "fresh")


def test_more_steps_go_on(pretrain: Pretrain, tmp_path: Path):
    """With a constant rate, 8 steps and then 4 more are 12."""
    constant = {"schedule": "constant", "eval_every": 4}
    pretrain(tmp_path / "run", steps=8, **constant)
    extended = pretrain(tmp_path / "run", steps=12, **constant)
    assert extended == pretrain(tmp_path / "whole", steps=12, **constant)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    with pytest.raises(cli.UserError, match=r"step-00000012 has 12 steps behind it, --steps is 11: give 12 or more"):
        pretrain(tmp_path / "run", steps=11, **constant)


def test_resume_path_goes_back(pretrain: Pretrain, tmp_path: Path, capsys):
    """An older checkpoint of the run itself: what came later is deleted, said, and trained again to the same bits."""
    out = tmp_path / "run"
    expected = pretrain(out, "dropout=0.2", keep=9)
    before = weights(out)
    assert names(out)[0] == "step-00000012"
    capsys.readouterr()
    again = pretrain(out, "dropout=0.2", keep=2, resume=str(out / "checkpoints" / "step-00000004"))
    assert "deleted step-00000012, step-00000010" in capsys.readouterr().out
    assert again == expected and weights(out) == before
    assert names(out) == ["step-00000012", "step-00000010"]


def test_resume_path_of_another_folder(pretrain: Pretrain, tmp_path: Path):
    """A checkpoint of one run begins another: its metrics begin behind it, and its origin stays as it was."""
    expected = pretrain(tmp_path / "old", "dropout=0.2", keep=9)
    origin = tree(tmp_path / "old")
    path = str(tmp_path / "old" / "checkpoints" / "step-00000005")
    forked = pretrain(tmp_path / "new", "dropout=0.2", resume=path)
    assert forked == expected[5:]  # from the evaluation at step 5 on
    assert weights(tmp_path / "new") == weights(tmp_path / "old")
    assert tree(tmp_path / "old") == origin


def test_checkpoints_deleted_by_hand_do_not_free_the_folder(pretrain: Pretrain, tmp_path: Path):
    """A finished model without its checkpoints is still not another run's folder."""
    pretrain(tmp_path / "run", steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = tree(tmp_path / "run")
    with pytest.raises(cli.UserError, match="holds another run: seed was 0 and is now 1"):
        pretrain(tmp_path / "run", steps=2, seed=1)
    assert tree(tmp_path / "run") == before


def test_a_folder_killed_at_its_birth_is_taken(pretrain: Pretrain, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.partial").write_text("{")
    assert len(losses(pretrain(tmp_path / "run", steps=2))) == 2


def test_continued_pretraining(pretrain: Pretrain, tmp_path: Path):
    """--model goes on from the weights of a folder: the loss begins where it ended, optimizer and schedule anew."""
    base = pretrain(tmp_path / "base", steps=20, learning_rate=0.01)
    more = pretrain(tmp_path / "more", shape=(), model=tmp_path / "base", steps=6, eval_every=0)
    assert losses(more)[0] == pytest.approx(losses(base)[-1], abs=0.4) and losses(base)[0] - losses(more)[0] > 1
    assert [line["step"] for line in more if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert read_model_folder(tmp_path / "more").config == read_model_folder(tmp_path / "base").config
    assert weights(tmp_path / "more") != weights(tmp_path / "base")


def test_mix_draws_in_proportion(pretrain: Pretrain, tokens: Path, tmp_path: Path, monkeypatch):
    """Of 1,000 sequences, 300 come from beta, however few tokens it has."""
    seen, whole = [], TokenBatches.sequences
    monkeypatch.setattr(TokenBatches, "sequences", lambda *at: (lambda pair: seen.append(pair[0]) or pair)(whole(*at)))
    mix = (("alpha", 0.7), ("beta", 0.3))
    pretrain(tmp_path / "run", steps=20, batch_size=50, mix=mix, eval_every=0, save_every=0)
    stream = np.load(tokens / "train-00000.npy").astype(np.int64)
    spans = open_tokens(tokens).splits["train"].spans
    places = {}
    for source, (first, stop) in spans.items():
        ring = np.concatenate([stream[first:stop], stream[first : first + 32]])
        for start_at in range(stop - first):
            places.setdefault(ring[start_at : start_at + 32].tobytes(), set()).add(source)
    drawn = [places[row.tobytes()] for row in torch.cat(seen).numpy()]
    alpha, beta, both = (drawn.count(sources) for sources in ({"alpha"}, {"beta"}, {"alpha", "beta"}))
    assert alpha + beta + both == 1000 and both < 40  # few windows stand in both sources
    assert beta <= 300 <= beta + both


# The plan, the mirrors, the compiler


def test_dry_run_plans_and_writes_nothing(tokens: Path, tmp_path: Path, capsys):
    config = PretrainConfig(
        data=tokens, out=tmp_path / "run", shape=SHAPE, steps=100, dry_run=True, peak_tflops=1e-6, gpu_price=2.0
    )
    train_pretrain.main(config)
    plan = {line[:20].strip(): line[20:].strip() for line in capsys.readouterr().out.splitlines()}
    assert list(tmp_path.iterdir()) == []
    # 259 x 32 embeddings, 2 blocks of 4 x 32² + 3 x 32 x 704 and their gains 2 x 32 + 2 x 16, a last gain; RoPE, tied
    count = 259 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 128 + 2 * 32 + 2 * 16) + 32
    assert plan["parameters"] == f"{count:,}"
    per_token = 6 * count + 12 * 2 * 32 * 32
    assert plan["FLOPs a token"].split()[0] == f"{per_token:.4g}"
    assert plan["tokens"].startswith("25,600 (256 a step, 100 steps")
    hours = per_token * 25600 / (1e6 * 0.4) / 3600
    assert plan["hours"].split()[0] == f"{hours:,.2f}" and plan["cost"].split()[0] == f"{2 * hours:,.2f}"
    assert plan["epochs"].startswith(f"{25600 / len(open_tokens(tokens).splits['train']):.2f} of ")

    train_pretrain.main(PretrainConfig(data=tmp_path / "nowhere", out=tmp_path / "run", preset="gpt2-xl", dry_run=True))
    assert "1,557,611,200" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(pretrain: Pretrain, tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = pretrain(tmp_path / "run", steps=6, log="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for split in ("train", "validation"):
        logged = [(event.step, event.value) for event in events.Scalars(f"{split}/loss")]
        expected = [(line["step"], pytest.approx(line["loss"])) for line in lines if line["split"] == split]
        assert logged == expected
    assert "train/mfu" not in events.Tags()["scalars"]  # not known on a CPU


def test_wandb(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    pretrain(tmp_path / "run", steps=3, log="wandb")
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"validation/loss" in record.read_bytes()


def test_a_mirror_that_is_not_installed_is_named(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match="pip install wandb"):
        pretrain(tmp_path / "run", log="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_is_the_same(pretrain: Pretrain, tmp_path: Path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain = pretrain(tmp_path / "plain", steps=4)
    compiled = pretrain(tmp_path / "compiled", steps=4, compile=True)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(compiled, "validation") == pytest.approx(losses(plain, "validation"), abs=1e-4)


# The user's mistakes


@pytest.fixture
def mistake(monkeypatch, capfd, tmp_path: Path) -> Callable[[list[str], str], None]:
    """Runs a command line that must fail with status 2 and one line that says `what`, and write nothing."""

    def check(arguments: list[str], what: str) -> None:
        before = tree(tmp_path)
        folders = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(train_pretrain.main, PretrainConfig)
        errors = capfd.readouterr().err
        assert stop.value.code == 2, errors
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        assert what in errors, errors
        assert tree(tmp_path) == before and set(tmp_path.rglob("*")) == folders

    return check


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--data", "nowhere"], "nowhere/manifest.json is missing"),
        (["--preset", "tinny"], "tinny"),
        (["--batchsize", "3"], "--batch-size"),
        (["--sequense-length", "3"], "--sequence-length"),
        (["--steps", "many"], "--steps"),
        (["--steps", "-3"], "--steps must be positive"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--tokens-per-step", "-32"], "--tokens-per-step must not be negative"),
        (["--tokens-per-step", "1000"], "take 1,024"),
        (["--gpu-price", "-1"], "--gpu-price must not be negative"),
        (["--expected-mfu", "40"], "--expected-mfu is a fraction"),
        (["--sequence-length", "33"], "--sequence-length 33 is longer than the model's context of 32"),
        (["--shape", "n_lyer=2"], "perhaps n_layer"),
        (["--shape", "n_layer"], "--shape n_layer=: give int"),
        (["--shape", "n_layer=two"], "give int"),
        (["--shape", "n_layer=0"], "n_layer is 0"),
        (["--shape", "n_head=0"], "--shape: "),
        (["--shape", "n_hidden=-4"], "n_hidden is -4"),
        (["--shape", "n_embd=-4"], "--shape: "),
        (["--shape", "dropout=1.5"], "dropout is 1.5"),
        (["--shape", "sliding_window=0"], "sliding_window is 0"),
        (["--shape", "norm=batchnorm"], "layernorm or rmsnorm"),
        (["--shape", "bias=maybe"], "give bool"),
        (["--shape", "vocab_size=100"], "vocab_size 100 is below the data's 259"),
        (["--shape", "n_head=4", "n_kv_head=3"], "not a multiple"),
        (["--mix", "gamma", "1"], "no source gamma"),
        (["--mix", "alpha", "-1"], "weight of alpha"),
        (["--shape", "context_length=100000"], "fewer than one sequence"),
        (["--model", "nowhere"], "no config.json"),
        (["--resume", "step-1"], "no such checkpoint"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_mistakes_on_the_command_line(arguments, what, tokens: Path, tmp_path: Path, mistake):
    shape = [] if {"--shape", "--model"} & set(arguments) else ["--shape", *SHAPE]
    mistake(["--data", str(tokens), "--out", str(tmp_path / "run"), *shape, *arguments], what)


def test_mistakes_of_device_and_processes(tokens: Path, tmp_path: Path, mistake, monkeypatch):
    command = flags(tokens, tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mistake([*command, "--device", "cuda"], "--device cuda: PyTorch finds no such device here")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    mistake([*command, "--compile"], "needs a C++ compiler")
    monkeypatch.setenv("WORLD_SIZE", "2")
    mistake([*command, "--parallel", "none"], "torchrun started 2 processes but --parallel is none")


def test_mistakes_of_the_data(tokens: Path, tmp_path: Path, mistake):
    def damaged(name: str) -> Path:
        return shutil.copytree(tokens, tmp_path / name)

    half = damaged("half")
    (half / "manifest.json").unlink()
    mistake(flags(half, tmp_path / "run"), "manifest.json is missing")
    cut = damaged("cut")
    (cut / "train-00000.npy").write_bytes((tokens / "train-00000.npy").read_bytes()[:-10])
    mistake(flags(cut, tmp_path / "run"), "train-00000.npy")
    bare = damaged("bare")
    shutil.rmtree(bare / "tokenizer")
    mistake(flags(bare, tmp_path / "run"), "bare/tokenizer")
    mistake(flags(tokens / "train-00000.npy", tmp_path / "run"), "train-00000.npy/manifest.json is missing")
    mistake([*flags(tokens, tmp_path / "run"), "--dry-run", "--data", str(tmp_path)], "manifest.json is missing")


def test_a_token_out_of_range_names_the_shard(tokens: Path, tmp_path: Path, monkeypatch, capfd):
    """Found when it is read: the run ends with one line, and its folder holds no model."""
    bad = shutil.copytree(tokens, tmp_path / "bad")
    shard = np.load(bad / "train-00000.npy")
    shard[:] = 300
    np.save(bad / "train-00000.npy", shard)
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *flags(bad, tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        cli.run(train_pretrain.main, PretrainConfig)
    errors = capfd.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    assert "train-00000.npy: token 300" in errors and not (tmp_path / "run" / "config.json").exists()


def test_mistakes_of_the_out_folder(tokens: Path, tmp_path: Path, mistake, pretrain: Pretrain):
    (tmp_path / "file").write_text("mine")
    mistake(flags(tokens, tmp_path / "file"), "is a file")
    mistake(flags(tokens, tmp_path / "file" / "below"), "error: ")
    mistake(flags(tokens, Path("/proc/run")), "/proc/run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    mistake(flags(tokens, tmp_path / "mine"), "holds other files and no run")
    mistake(flags(tokens, tmp_path / "mine", resume="never"), "holds other files and no run")

    pretrain(tmp_path / "run", steps=2)
    other = make_tokens_elsewhere(tmp_path)
    for change, what in (
        (flags(tokens, tmp_path / "run", "n_layer=1", steps=2), "shape.n_layer was 2 and is now 1"),
        (flags(tokens, tmp_path / "run", steps=2, seed=3), "seed was 0 and is now 3"),
        (flags(tokens, tmp_path / "run", steps=2, batch_size=3), "sequences_a_step was 4 and is now 3"),
        (flags(tokens, tmp_path / "run", steps=2, optimizer="muon"), "optimizer was adamw and is now muon"),
        (flags(other, tmp_path / "run", steps=2), "data was"),
        (flags(tokens, tmp_path / "run", steps=1), "--steps is 1: give 2 or more"),
    ):
        mistake(change, what)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    mistake(flags(tokens, tmp_path / "new", "n_layer=1", resume=newest), "of a model of another shape")
    mistake(flags(tokens, tmp_path / "new", optimizer="muon", resume=newest), "another --optimizer")
    (newest / "state.json").write_text("{}")
    mistake(flags(tokens, tmp_path / "new", resume=newest), "state.json is damaged")
    mistake(flags(tokens, tmp_path / "run", steps=2), "no checkpoint in")
    (tmp_path / "run" / "run.json").write_text("{")
    mistake(flags(tokens, tmp_path / "run", steps=2), "run.json is damaged")


def make_tokens_elsewhere(folder: Path) -> Path:
    """Other tokens, made by another tokenizer."""
    (folder / "other").mkdir()
    return make_tokens(folder / "other", (ROOT / "cli.py").read_text(encoding="utf-8"))


def test_mistakes_of_the_model(tokens: Path, tmp_path: Path, mistake, pretrain: Pretrain):
    pretrain(tmp_path / "base", steps=1)
    command = ["--data", str(tokens), "--out", str(tmp_path / "run"), "--model", str(tmp_path / "base")]
    mistake([*command, "--shape", "n_layer=3"], "--shape changes a preset")
    mistake([*command, "--out", str(tmp_path / "base")], "holds another run")
    spec = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    ids = spec["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(spec))
    mistake(command, "was prepared with another tokenizer")
    (tmp_path / "base" / "config.json").write_text("{}")
    mistake(command, "model_type")


def test_a_real_mistake_of_a_real_process(tmp_path: Path):
    run = start(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")])
    said, errors = run.communicate(timeout=60)
    assert (run.returncode, said) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_set_beside_the_baselines(pretrain: Pretrain, tokens: Path, tmp_path: Path, capsys):
    """`data.ngram --run` prints the run's last validation; what is no such run is one line."""
    lines = pretrain(tmp_path / "run", steps=7)
    capsys.readouterr()
    ngram.main(ngram.NgramConfig(tokens, tmp_path / "run"))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:3]] == ["unigram", "bigram", str(tmp_path / "run")]
    assert said[3:] == ["the run is NOT below the bigram"]
    last = lines[-1]
    assert said[2].endswith(f"run: {last['loss']:.4f} nats a token, {last['bits_per_byte']:.4f} bits per byte")
    with pytest.raises(cli.UserError, match="not a training run"):
        ngram.main(ngram.NgramConfig(tokens, tmp_path))
    other = make_tokens(tmp_path, "Quite another text.\n\nOf a few paragraphs.\n\n" + inspect.getsource(inspect))
    with pytest.raises(cli.UserError, match="was trained on other tokens"):
        ngram.main(ngram.NgramConfig(other, tmp_path / "run"))


def test_a_log_file_sees_progress(pretrain: Pretrain, tmp_path: Path, capsys):
    """Where no bar is shown, ten lines of a run tell how far it is."""
    pretrain(tmp_path / "run", steps=20)
    said = [line for line in capsys.readouterr().out.splitlines() if " of 20: loss " in line]
    assert [int(line.split()[1]) for line in said] == list(range(2, 21, 2))
    assert all(line.endswith(" tokens/s") for line in said)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"learning_rate": math.inf}, "--learning-rate must be a finite number"),
        ({"weight_decay": math.inf}, "--weight-decay must be a finite number"),
        ({"shape": (*SHAPE, "norm_eps=nan")}, "--shape: norm_eps is nan: give a positive number"),
        ({"shape": (*SHAPE, "position=rope", "rope_theta=0")}, "--shape: rope_theta is 0"),
    ],
)
def test_numbers_that_are_none(flags, what, tokens: Path, tmp_path: Path):
    settings = {"data": tokens, "shape": SHAPE, "out": tmp_path / "run"} | flags
    with pytest.raises(cli.UserError, match=re.escape(what)):
        train_pretrain.main(PretrainConfig(**settings))
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_writes_no_model(pretrain: Pretrain, tmp_path: Path, monkeypatch):
    def poison(run, model, optimizers, rate):
        model.embed_tokens.weight.data[0] = math.nan
        return 1.0

    monkeypatch.setattr(Run, "update", poison)
    with pytest.raises(cli.UserError, match="the validation loss is no number, so no model is written"):
        pretrain(tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_damaged_best_is_named(pretrain: Pretrain, tmp_path: Path):
    pretrain(tmp_path / "run", steps=4)
    (tmp_path / "run" / "checkpoints" / "best.json").write_text('{"na')
    with pytest.raises(cli.UserError, match=r"best\.json is damaged: delete it"):
        pretrain(tmp_path / "run", steps=6)


def test_a_name_that_is_no_formula(pretrain: Pretrain, tmp_path: Path):
    pretrain(tmp_path / "cost$1^$", steps=1)
    assert (tmp_path / "cost$1^$" / "loss.png").is_file()
