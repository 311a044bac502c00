"""Two processes under torchrun, gloo on a CPU: the same run as one process at the same global batch."""

import json
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import flags, losses, metrics, start, wait_for_lines

from distributed import World, parallelize, start_world
from model_folder import read_model_folder

pytestmark = pytest.mark.usefixtures("one_thread")
Pretrain = Callable[..., list[dict]]

# The run as it is, but with 0 to 32 trained targets in each sequence, by a rule of its own content.
RAGGED = """
import sys

import cli
import train_pretrain
from data.loader import TokenBatches

whole = TokenBatches.sequences


def sequences(self, step, first, stop):
    inputs, targets = whole(self, step, first, stop)
    for row in range(len(targets)):
        targets[row, int(inputs[row].sum()) % 33 :] = -100
    return inputs, targets


if __name__ == "__main__":
    TokenBatches.sequences = sequences
    cli.run(train_pretrain.main, train_pretrain.PretrainConfig)
"""


def finished(run) -> str:
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return said


def assert_alike(one: Path, two: Path) -> None:
    """Equal losses, train and validation, to 1e-5, and weights as near as summing in another order leaves them."""
    first, second = metrics(one), metrics(two)
    assert [(line["step"], line["split"], line["tokens"]) for line in first] == [
        (line["step"], line["split"], line["tokens"]) for line in second
    ]
    for split in ("train", "validation"):
        assert losses(second, split) == pytest.approx(losses(first, split), rel=0, abs=1e-5)
    norms = [[line["grad_norm"] for line in lines if line["split"] == "train"] for lines in (first, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    other = read_model_folder(two)
    for name, parameter in read_model_folder(one).named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_are_one(tokens: Path, tmp_path: Path):
    """With ragged trained tokens and documents, accumulation 2 on each of two ranks against 1 on one."""
    script = tmp_path / "ragged.py"
    script.write_text(RAGGED)
    settings = {"document_mask": True, "steps": 15, "clip": 0.5, "keep": 9}
    one = start(flags(tokens, tmp_path / "one", **settings, batch_size=8), 1, script)
    finished(one)
    two = start(flags(tokens, tmp_path / "two", **settings, batch_size=2, gradient_accumulation=2), 2, script)
    said = finished(two)
    assert said.count("parameters, float32 on 2 x cpu") == 1  # one process speaks
    assert said.count("validation loss") == 3
    assert_alike(tmp_path / "one", tmp_path / "two")
    trained = [line["tokens"] for line in metrics(tmp_path / "one") if line["split"] == "train"]
    assert trained[0] != 256 and len({b - a for a, b in pairwise(trained)}) > 5
    record = json.loads((tmp_path / "two" / "run.json").read_text())["identity"]
    assert record == json.loads((tmp_path / "one" / "run.json").read_text())["identity"]


def test_two_processes_are_terminated_and_go_on(tokens: Path, tmp_path: Path, pretrain: Pretrain):
    """SIGTERM to torchrun stops both ranks after the same step, saved; the run that goes on is bit-identical to one
    that was never stopped, and a single process can take over a checkpoint of two."""
    settings = {"steps": 200, "eval_every": 30, "save_every": 0, "keep": 99, "optimizer": "muon", "seed": 5}
    command = flags(tokens, tmp_path / "run", "dropout=0.1", **settings)
    stopped = 0
    for one_rank in (False, True):  # to torchrun, which passes it on, or to the second worker alone
        run = start(command, 2)
        wait_for_lines(run, tmp_path / "run", stopped + 20)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(workers[-1]) if one_rank else run.pid, signal.SIGTERM)
        said, errors = run.communicate(timeout=120)
        assert run.returncode != 0 and not (tmp_path / "run" / "config.json").exists()
        before, stopped = stopped, max(line["step"] for line in metrics(tmp_path / "run"))
        assert before + 15 <= stopped < 200, errors
        assert f"after step {stopped}, saved" in said
        assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    assert "resumed from" in finished(start(command, 2))
    calm = flags(tokens, tmp_path / "calm", "dropout=0.1", **settings)
    finished(start(calm, 2))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "calm")
    last = [tmp_path / name / "model.safetensors" for name in ("run", "calm")]
    assert last[0].read_bytes() == last[1].read_bytes()
    alone = pretrain(
        tmp_path / "alone",
        "dropout=0.1",
        **settings | {"batch_size": 8, "resume": str(tmp_path / "run" / "checkpoints" / "step-00000180")},
    )
    assert losses(alone, "validation")[0] == pytest.approx(losses(metrics(tmp_path / "run"), "validation")[5], abs=1e-5)


def test_a_mistake_under_torchrun_writes_nothing(tokens: Path, tmp_path: Path):
    run = start([*flags(tokens, tmp_path / "run"), "--parallel", "none"], 2)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "error: torchrun started 2 processes but --parallel is none" in errors
    assert not any("Traceback" in line for line in errors.split("error: ")[1].splitlines()[:1])
    assert list(tmp_path.iterdir()) == []


def test_world_of_one():
    world = start_world("cpu", "auto")
    assert (world.rank, world.size, world.main, world.device.type) == (0, 1, True, "cpu")
    assert world.sum(1.5, 2.0) == [1.5, 2.0]
    world.barrier()
    model = torch.nn.Linear(1, 1)
    assert parallelize(model, world) is model
    assert not World(1, 2, world.device).main
