"""--dry-run: what it promises against what a real forward pass keeps, and its sums by hand."""

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig, parameter_count
from objectives import next_token_loss
from planning import activation_bytes, memory_parts, plan_lines
from training import TrainingConfig, build_optimizers

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"vocab_size": 300, "context_length": 512, "n_layer": 3, "n_head": 4, "n_embd": 64}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "n_hidden": 176}
SHAPES = {
    "gpt2": GPTConfig(**SHAPE),
    "llama": GPTConfig(**SHAPE, **LLAMA, n_kv_head=2, tie_embeddings=False),
    "qwen3": GPTConfig(**SHAPE, **LLAMA, qk_norm=True),
}


def really_saved(config: GPTConfig, batch: int, length: int, dtype: torch.dtype, checkpointing: bool, attention: str):
    """Bytes that a real forward pass on this CPU keeps for the backward pass, each storage counted once."""
    model = GPT(config)
    model.compute_dtype, model.checkpointing, model.attention = dtype, checkpointing, attention
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    tokens = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model(tokens), tokens)
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()  # what was counted is what the backward pass really uses
    return size


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_activations_are_those_of_a_real_pass(shape, dtype, checkpointing, attention):
    for batch, length in ((3, 192), (8, 24)):
        real = really_saved(SHAPES[shape], batch, length, dtype, checkpointing, attention)
        planned = activation_bytes(SHAPES[shape], batch, length, dtype, checkpointing, fused=attention == "sdpa")
        assert planned == pytest.approx(real, rel=0.1)


def test_memory_parts_of_real_optimizers():
    """Weights, gradients and optimizer state in bytes, against the tensors that a real step leaves."""
    config = SHAPES["llama"]
    for name in ("adamw", "muon"):
        model = GPT(config)
        optimizers = build_optimizers(model, TrainingConfig(optimizer=name))
        next_token_loss(model(torch.zeros(1, 4, dtype=torch.long)), torch.ones(1, 4, dtype=torch.long)).backward()
        for optimizer in optimizers:
            optimizer.step()
        moments = [
            tensor
            for optimizer in optimizers
            for state in optimizer.state.values()
            for tensor in state.values()
            if tensor.dim() > 0  # the scalars that count steps are no part of the plan
        ]
        parts = memory_parts(config, name, 7)
        assert parts["weights"] == sum(p.nbytes for p in model.parameters()) == 4 * parameter_count(config)
        assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
        assert parts["optimizer"] == sum(tensor.nbytes for tensor in moments)
        assert parts["activations"] == 7


def test_hours_and_cost_by_hand():
    """1 layer, width 4, 1 head, MLP 16, vocabulary 10, no biases, tied: 40 + 32 + 64 + 128 + 12 parameters."""
    shape = GPTConfig(10, 8, 1, 1, 4, bias=False)
    assert parameter_count(shape) == 40 + 32 + 64 + 128 + 12
    flops = 6 * (276 - 32) + 12 * 1 * 1 * 4 * 8  # positions are looked up, not multiplied
    lines = plan_lines(
        shape,
        {"weights": 2**20, "activations": 2**21},
        sequence_length=8,
        tokens_per_step=1_000_000,
        steps=3600,
        devices=4,
        data_tokens=1_800_000_000,
        peak_tflops=flops / 1e6,  # so that one device at full peak trains a million tokens a second
        expected_mfu=0.5,
        gpu_price=3e6,
    )
    plan = {line[:20].strip(): line[20:].strip() for line in lines}
    assert plan["parameters"] == "276"
    assert plan["FLOPs a token"] == "1848 at 8 tokens a sequence"
    assert plan["memory: weights"] == "1.0 MiB" and plan["memory: in all"] == "3.0 MiB on each of 4 device(s)"
    assert plan["tokens"].startswith("3,600,000,000 (1,000,000 a step, 3,600 steps, ")
    assert plan["epochs"] == "2.00 of 1,800,000,000 training tokens"
    assert plan["training FLOPs"] == "6.653e+12"
    # 3.6e9 tokens at 4 x 0.5e6 a second: 1,800 s
    assert plan["hours"].startswith("0.50 at 50%"), plan["hours"]
    assert plan["cost"] == "6,000,000.00 at 3e+06 a device-hour"  # 0.5 h x 4 devices x 3,000,000
