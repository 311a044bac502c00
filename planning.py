"""The plan of a run before it is run: parameters, FLOPs, memory a device by part, tokens, hours and cost."""

import torch
from torch import Tensor

from model import GPT, GPTConfig, flops_per_token
from objectives import next_token_loss


def saved_bytes(config: GPTConfig, batch: int, length: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that one micro-batch's forward pass and loss keep for the backward pass, counted on the meta device.

    Attention is the written-out one here, which keeps (T, T) products; see `activation_bytes`.
    """
    with torch.device("meta"):
        model = GPT(config)
        model.compute_dtype, model.attention, model.checkpointing = dtype, "reference", checkpointing
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        kept = {}  # storage -> bytes; holding the storage keeps its address from being used again

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = (storage, storage.nbytes())
            return tensor

        tokens = torch.zeros(batch, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            next_token_loss(model(tokens), tokens)
    return sum(size for _, size in kept.values())


def activation_bytes(
    config: GPTConfig, batch: int, length: int, dtype: torch.dtype, checkpointing: bool, fused: bool
) -> int:
    """`saved_bytes`, less the part that grows with T² where attention is fused: a fused kernel never stores it."""
    once = saved_bytes(config, batch, length, dtype, checkpointing)
    if not fused:
        return once
    twice = saved_bytes(config, batch, 2 * length, dtype, checkpointing)
    thrice = saved_bytes(config, batch, 3 * length, dtype, checkpointing)
    # Bytes of T tokens are c + a T + b T²: the second difference is 2 b T², and without attention's products c + a T.
    return once - (thrice - 2 * twice + once) // 2


def memory_parts(config: GPTConfig, optimizer: str, activations: int) -> dict[str, int]:
    """Bytes a device by part: fp32 weights, gradients and optimizer state (two moments; Muon keeps one of a matrix)."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(config).named_parameters()}
    count = sum(sizes.values())
    single = sum(size for name, size in sizes.items() if name.startswith("layers.") and name.endswith("proj.weight"))
    moments = 2 * count - (single if optimizer == "muon" else 0)
    return {"weights": 4 * count, "gradients": 4 * count, "optimizer": 4 * moments, "activations": activations}


def plan_lines(
    shape: GPTConfig,
    parts: dict[str, int],
    *,
    sequence_length: int,
    tokens_per_step: int,
    steps: int,
    devices: int,
    data_tokens: int | None,
    peak_tflops: float | None,
    expected_mfu: float,
    gpu_price: float | None,
) -> list[str]:
    """The plan as aligned lines of text."""
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(shape).parameters())
    flops, tokens = flops_per_token(shape, sequence_length), tokens_per_step * steps
    rows = [
        ("parameters", f"{count:,}"),
        ("FLOPs a token", f"{flops:.4g} at {sequence_length:,} tokens a sequence"),
        *((f"memory: {name}", f"{size / 2**20:,.1f} MiB") for name, size in parts.items()),
        ("memory: in all", f"{sum(parts.values()) / 2**20:,.1f} MiB on each of {devices} device(s)"),
        ("tokens", f"{tokens:,} ({tokens_per_step:,} a step, {steps:,} steps, {tokens / count:.1f} a parameter)"),
    ]
    if data_tokens:
        rows.append(("epochs", f"{tokens / data_tokens:.2f} of {data_tokens:,} training tokens"))
    rows.append(("training FLOPs", f"{flops * tokens:.4g}"))
    if peak_tflops:
        hours = flops * tokens / (peak_tflops * 1e12 * expected_mfu * devices) / 3600
        rows.append(("hours", f"{hours:,.2f} at {expected_mfu:.0%} of {peak_tflops:g} TFLOP/s a device"))
        if gpu_price:
            rows.append(("cost", f"{hours * devices * gpu_price:,.2f} at {gpu_price:g} a device-hour"))
    else:
        rows.append(("hours", "give --peak-tflops (and --gpu-price) for time and cost"))
    return [f"{name:<20} {value}" for name, value in rows]
