"""One process or many: what torchrun started, and the few sums over ranks that training needs."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cli import UserError

Parallel = Literal["auto", "none", "ddp"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class World:
    """This process among `size` processes, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in fp64. Every rank must call it."""
        if self.size == 1:
            return list(values)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=kind, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def seed(self, seed: int) -> None:
        """Seed this device's generator; torch.manual_seed looks at every kind of device, a percent of a small step."""
        generators = {"cuda": torch.cuda, "mps": torch.mps, "cpu": torch.default_generator}
        generators[self.device.type].manual_seed(seed)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_world(device: Device, parallel: Parallel) -> World:
    """Join the processes that torchrun started, if it did: NCCL on CUDA, gloo on a CPU."""
    size, rank = world_size(), int(os.environ.get("RANK", 0))
    if size > 1 and parallel == "none":
        raise UserError(f"torchrun started {size} processes but --parallel is none: add --parallel ddp")
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(rank, size, chosen)


def choose_device(device: Device) -> torch.device:
    """The device asked for, or the best one here. UserError if it is not on this machine."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, present in have.items() if present))
    if not have[device]:
        raise UserError(f"--device {device}: PyTorch finds no such device here: use --device cpu")
    return torch.device(device)


def end_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def parallelize(model: nn.Module, world: World) -> nn.Module:
    """`model` with its gradients averaged over ranks in the backward pass (Li et al. 2020, "PyTorch Distributed")."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def no_sync(engine: nn.Module, last: bool) -> AbstractContextManager:
    """Hold back the exchange of gradients on all but the last micro-batch of a step."""
    if isinstance(engine, DistributedDataParallel) and not last:
        return engine.no_sync()
    return nullcontext()
