"""Checkpoints: save, verify, find, load. A checkpoint is whole or absent, and is checked before it is believed.

`checkpoints/step-00000500/` holds `model.safetensors` (parameters under our own names), `optimizer.pt`, `state.json`
and `manifest.json` with the SHA-256 of each. No state of a random generator is among them: batches and dropout are pure
functions of (seed, step, rank).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from cli import UserError, whole_folder

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.pt", "state.json")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizers: list[Optimizer], state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` under `folder`, then delete all but the newest `keep` and the best."""
    target = folder / f"step-{step:08d}"
    with whole_folder(target, MANIFEST, *FILES) as partial:
        save_file({name: p.detach().cpu() for name, p in model.named_parameters()}, partial / "model.safetensors")
        torch.save([optimizer.state_dict() for optimizer in optimizers], partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": step} | state))
        (partial / MANIFEST).write_text(manifest_text({name: sha256_file(partial / name) for name in FILES}))
    for old in list(checkpoints(folder))[keep:]:
        if old.name != best_checkpoint(folder).get("name"):
            remove_checkpoint(old)
    return target


def manifest_text(digests: dict[str, str]) -> str:
    """The one spelling of a manifest, so that a damaged byte of the manifest itself shows."""
    return json.dumps({"version": 1, "sha256": digests})


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint: first its name, so that no half of it is ever found under it, then its files."""
    hidden = path.with_name(f".{path.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_after(folder: Path, step: int) -> list[Path]:
    """Delete what a run that goes on from `step` leaves behind: later checkpoints, and halves of killed writers.

    A later checkpoint is damaged or of a course that was abandoned: kept, it would pass for the newest one. Returns
    the deleted checkpoints.
    """
    later = [path for path in checkpoints(folder) if int(path.name[5:]) > step]
    for path in later:
        remove_checkpoint(path)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)
    if best_checkpoint(folder).get("step", 0) > step:
        (folder / "best.json").unlink()
    return later


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Fill `model` and `optimizers` from the checkpoint at `path`, which `verify` has passed; return its state."""
    device = next(model.parameters()).device
    tensors = load_file(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    unlike = [name for name, p in parameters.items() if name not in tensors or tensors[name].shape != p.shape]
    if unlike or tensors.keys() != parameters.keys():
        raise UserError(f"{path} is of a model of another shape (at {unlike[0] if unlike else 'its extra tensors'})")
    saved = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
    groups = [[len(group["params"]) for group in one["param_groups"]] for one in saved]
    if groups != [[len(group["params"]) for group in one.param_groups] for one in optimizers]:
        raise UserError(f"{path} was trained with another --optimizer")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    for optimizer, state in zip(optimizers, saved, strict=True):
        # The moments are the checkpoint's; weight decay and betas are today's flags, as the learning rate is.
        today = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": today})
    return json.loads((path / "state.json").read_text())


def checkpoints(folder: Path) -> Iterator[Path]:
    """The checkpoints under `folder`, newest first."""
    yield from sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), reverse=True)


def latest_checkpoint(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none. Damaged ones are named and passed over."""
    found = list(checkpoints(folder))
    for path in found:
        if (damage := verify(path)) is None:
            return path
        say(f"{damage}: using the checkpoint before it")
    if found:
        raise UserError(f"no checkpoint in {folder} is whole: start anew with --resume never")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, naming the file, or None if every byte is as it was written."""
    try:
        text = (path / MANIFEST).read_text()
        digests = json.loads(text)["sha256"]
        if text != manifest_text({name: digests[name] for name in FILES}):
            return f"{path / MANIFEST} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} is missing or damaged ({type(error).__name__})"
    for name in FILES:
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if sha256_file(path / name) != digests[name]:
            return f"{path / name} is damaged"
    return None


def mark_best(folder: Path, step: int, loss: float) -> None:
    """Remember the checkpoint of `step` as the best if its validation `loss` is the lowest so far."""
    path = folder / f"step-{step:08d}"
    if path.is_dir() and loss < best_checkpoint(folder).get("loss", float("inf")):
        partial = folder / ".best.partial"
        partial.write_text(json.dumps({"name": path.name, "step": step, "loss": loss}))
        partial.replace(folder / "best.json")


def best_checkpoint(folder: Path) -> dict[str, Any]:
    """`name`, `step` and validation `loss` of the best checkpoint; empty before the first evaluation."""
    path = folder / "best.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is damaged: delete it, and the run goes on without its best checkpoint") from None


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
