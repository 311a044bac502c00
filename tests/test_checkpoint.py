"""Checkpoints: whole or absent, every damaged byte seen, the newest and the best kept."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import checkpoint
from checkpoint import (
    FILES,
    MANIFEST,
    best_checkpoint,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    remove_after,
    save_checkpoint,
    verify,
)
from cli import UserError
from model import GPT, GPTConfig
from training import TrainingConfig, build_optimizers

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = GPTConfig(vocab_size=20, context_length=8, n_layer=1, n_head=2, n_embd=8)


def trained(optimizer: str = "adamw", seed: int = 0, **flags: float) -> tuple[GPT, list[Optimizer]]:
    """A model two steps into its training."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, **flags))
    for _ in range(2):
        train_a_step(model, optimizers)
    return model, optimizers


def train_a_step(model: nn.Module, optimizers: list[Optimizer]) -> None:
    model(torch.arange(8)[None]).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, *steps: int, keep: int = 9) -> None:
    model, optimizers = trained()
    for step in steps:
        save_checkpoint(folder, step, model, optimizers, {"tokens": 10 * step}, keep)


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loaded_checkpoint_goes_on_bit_for_bit(optimizer, tmp_path):
    model, optimizers = trained(optimizer)
    path = save_checkpoint(tmp_path, 2, model, optimizers, {"tokens": 7, "loss_scale": 0.1}, 1)
    other, others = trained(optimizer, seed=1)
    assert load_checkpoint(path, other, others) == {"step": 2, "tokens": 7, "loss_scale": 0.1}
    for _ in range(3):
        train_a_step(model, optimizers)
        train_a_step(other, others)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_todays_flags_go_on(tmp_path):
    """Weight decay and betas are flags, not state: those of the command that resumes are used."""
    path = save_checkpoint(tmp_path, 2, *trained(weight_decay=0.3, beta2=0.9), {}, 1)
    model, optimizers = trained(weight_decay=0.2, beta2=0.8)
    load_checkpoint(path, model, optimizers)
    matrices, vectors = optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"], matrices["betas"]) == (0.2, 0.0, (0.9, 0.8))


def damages(path: Path) -> list[tuple[str, str]]:
    """Damage `path` in ways that disks and users do, one after another; yields each after it is done."""
    whole = path.read_bytes()
    dice = random.Random(path.name)
    for place in {0, len(whole) - 1, *dice.sample(range(len(whole)), 12)}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
        yield f"bit flipped at {place}"
    for length in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        yield f"cut to {length}"
    path.write_bytes(whole + b"\n")
    yield "a byte added"
    path.unlink()
    yield "deleted"
    path.write_bytes(whole)


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_every_damage_is_seen_and_named(file, tmp_path):
    save(tmp_path, 5, 10)
    newest = tmp_path / "step-00000010"
    assert verify(newest) is None
    for damage in damages(newest / file):
        said = []
        assert latest_checkpoint(tmp_path, said.append) == tmp_path / "step-00000005", damage
        assert len(said) == 1 and "checkpoint before" in said[0]
        assert str(newest) in said[0]
        if file != MANIFEST:  # a manifest whose digest is damaged may name the file that it speaks of
            assert str(newest / file) in said[0], damage
    assert latest_checkpoint(tmp_path) == newest  # put back as it was


@pytest.mark.parametrize("text", ["null", "[]", '{"sha256": null}', '{"version": 1, "sha256": {}}', "\xff"])
def test_a_manifest_of_another_kind_is_damage(text, tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / MANIFEST).write_bytes(text.encode("latin-1"))
    assert MANIFEST in verify(tmp_path / "step-00000005")


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    save(tmp_path, 5)
    (tmp_path / "step-00000005" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="--resume never"):
        latest_checkpoint(tmp_path, lambda line: None)


def test_keep_and_best(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0), (5, 4.0)):
        save(tmp_path, step, keep=2)
        mark_best(tmp_path, step, loss)
    assert names(tmp_path) == ["step-00000005", "step-00000004", "step-00000002"]
    assert best_checkpoint(tmp_path) == {"name": "step-00000002", "step": 2, "loss": 2.0}  # the first of equals
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006", "step-00000002"]
    mark_best(tmp_path, 6, 1.0)
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007", "step-00000006"]
    mark_best(tmp_path, 8, 0.5)  # no such checkpoint
    mark_best(tmp_path, 7, float("nan"))
    assert best_checkpoint(tmp_path)["step"] == 6


class Killed(BaseException):
    """Stands for kill -9: nothing of the project catches it."""


@pytest.mark.parametrize("last", ["save_file", "sha256_file", "manifest_text"])
def test_a_writer_killed_midway_leaves_no_checkpoint(last, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    save(tmp_path, 5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, last, die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clear up nothing
        save(tmp_path, 10)
    assert (tmp_path / ".step-00000010.partial").is_dir()  # the fault was planted
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000005"
    save(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_a_remover_killed_midway_leaves_no_half(tmp_path, monkeypatch):
    def die(path, **_):
        if not path.exists():
            return
        (path / "optimizer.pt").unlink()
        raise Killed

    save(tmp_path, 5, 10)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", die)
        checkpoint.remove_checkpoint(tmp_path / "step-00000005")
    assert names(tmp_path) == ["step-00000010"]
    remove_after(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010"]


def test_going_back_removes_what_came_later(tmp_path):
    save(tmp_path, 5, 10, 15)
    mark_best(tmp_path, 15, 1.0)
    (tmp_path / ".step-00000020.partial").mkdir()
    assert [path.name for path in remove_after(tmp_path, 10)] == ["step-00000015"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]
    mark_best(tmp_path, 10, 2.0)
    remove_after(tmp_path, 10)
    assert best_checkpoint(tmp_path)["step"] == 10


def test_another_model_or_optimizer_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 2, *trained(), {}, 1)
    model, optimizers = trained("muon")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="--optimizer"):
        load_checkpoint(path, model, optimizers)
    wider = GPT(GPTConfig(vocab_size=21, context_length=8, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(UserError, match=r"another shape \(at embed_tokens.weight\)"):
        load_checkpoint(path, wider, [])
    deeper = GPT(GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=2, n_embd=8))
    deep = save_checkpoint(tmp_path, 3, deeper, [], {}, 2)
    with pytest.raises(UserError, match="extra tensors"):
        load_checkpoint(deep, GPT(SHAPE), [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_pickle_is_trusted(tmp_path):
    """An optimizer.pt that would run code is refused even where the manifest's digests agree with it."""
    path = save_checkpoint(tmp_path, 2, *trained(), {}, 1)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save([Evil()], path / "optimizer.pt")
    digests = json.loads((path / MANIFEST).read_text())["sha256"]
    digests["optimizer.pt"] = checkpoint.sha256_file(path / "optimizer.pt")
    (path / MANIFEST).write_text(checkpoint.manifest_text(digests))
    assert verify(path) is None
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_checkpoint(path, *trained())
    assert not (tmp_path / "owned").exists()
