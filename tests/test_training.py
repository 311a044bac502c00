"""What every loop is made of: schedules, optimizers, gradient scale, clipping, metrics, signals; numbers by hand."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import training
from cli import UserError
from distributed import World
from model import GPT, GPTConfig
from objectives import IGNORE, next_token_loss
from training import (
    Run,
    StopSignal,
    TrainingConfig,
    build_optimizers,
    compute_dtype,
    flatten,
    learning_rate,
    plot_loss,
    read_metrics,
    reopen_metrics,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SHAPE = GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=2, n_embd=8)


def new_run(world: World | None = None, **flags) -> Run:
    return Run(TrainingConfig(**flags), world or World(0, 1, CPU), {})


# Schedules


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # Warmup of 2 steps, then 8: progress 0, 1/8, ... over steps 2 ... 9, and 1 at step 10, which is never trained.
        ("constant", {0: 2.0, 1: 4.0, 2: 4.0, 6: 4.0, 9: 4.0}),
        ("linear", {0: 2.0, 1: 4.0, 2: 4.0, 4: 3.25, 6: 2.5, 10: 1.0, 11: 1.0}),  # 4 - 3 x progress
        ("cosine", {0: 2.0, 1: 4.0, 2: 4.0, 4: 1 + 1.5 * (1 + math.sqrt(0.5)), 6: 2.5, 10: 1.0, 11: 1.0}),
        ("wsd", {0: 2.0, 1: 4.0, 7: 4.0, 8: 4.0, 9: 2.5, 10: 1.0}),  # falls over the last fifth, from step 8
    ],
)
def test_schedules_by_hand(schedule, rates):
    config = TrainingConfig(
        steps=10, warmup_steps=2, learning_rate=4.0, final_learning_rate=0.25, schedule=schedule, clip=0
    )
    assert {step: learning_rate(config, step) for step in rates} == pytest.approx(rates)


def test_schedules_at_their_edges():
    config = TrainingConfig(steps=10, warmup_steps=0, learning_rate=4.0)
    assert learning_rate(config, 0) == 4.0
    assert learning_rate(replace(config, warmup_steps=20), 9) == 2.0  # a warmup longer than the run
    late = replace(config, warmup_steps=9, schedule="wsd")  # a warmup that reaches into wsd's last fifth
    assert [learning_rate(late, step) for step in (8, 9)] == [4.0, 4.0]


# Optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_on_matrices_alone(optimizer):
    """With no gradient, a step leaves only the decay: matrices shrink by 1 - 0.5 x 0.1, gains and biases stand."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one in build_optimizers(model, TrainingConfig(optimizer=optimizer, learning_rate=0.5, weight_decay=0.1)):
        one.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_muon_has_the_blocks_matrices_alone():
    model = GPT(SHAPE)
    adamw, muon = build_optimizers(model, TrainingConfig(optimizer="muon"))
    owners = {id(p): one for one in (adamw, muon) for group in one.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        inside = name.startswith("layers.") and parameter.dim() == 2
        assert owners[id(parameter)] is (muon if inside else adamw), name
    assert len(owners) == len(list(model.parameters()))
    assert len(build_optimizers(model, TrainingConfig())) == 1


def test_frozen_parameters_are_not_trained():
    model = GPT(SHAPE)
    model.embed_tokens.weight.requires_grad_(False)
    trained = [p for one in build_optimizers(model, TrainingConfig()) for g in one.param_groups for p in g["params"]]
    assert len(trained) == len(list(model.parameters())) - 1


def newton_schulz(gradient: Tensor) -> Tensor:
    """Jordan et al. 2024's five iterations x <- a x + (b x xᵀ + c (x xᵀ)²) x, written out in fp64."""
    x = gradient.double()
    wide = x if x.size(0) <= x.size(1) else x.T
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.size(0) <= x.size(1) else wide.T


def test_two_muon_steps_are_newton_schulz():
    """Nesterov momentum 0.95, orthogonalised, scaled by 0.2 √(longer side) to AdamW's size (Liu et al. 2025)."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    _, muon = build_optimizers(model, TrainingConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.01))
    weight = model.layers[0].mlp.up_proj.weight  # (32, 8)
    gradients = [torch.randn(32, 8) for _ in range(2)]
    expected, momentum = weight.detach().double(), torch.zeros(32, 8, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        update = newton_schulz(0.05 * gradient + 0.95 * momentum)
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * 0.2 * math.sqrt(32) * update
        weight.grad = gradient
        muon.step()
    moved = (expected - weight.detach()).norm() / (0.1 * 0.2 * math.sqrt(32) * math.sqrt(8))
    assert moved < 0.03  # torch iterates in bf16: 0.021; without Nesterov 0.32


def test_two_adamw_steps_by_hand():
    """Kingma and Ba 2015 with decoupled decay, beta1 0.9 and the beta2 of the flag."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(2.0)
    (adamw,) = build_optimizers(linear, TrainingConfig(learning_rate=0.1, weight_decay=0.5, beta2=0.75))
    weight, m, v = 2.0, 0.0, 0.0
    for step, gradient in ((1, 4.0), (2, -1.0)):
        linear.weight.grad = torch.tensor([[gradient]])
        adamw.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.75 * v + 0.25 * gradient**2
        weight *= 1 - 0.1 * 0.5
        weight -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.75**step)) + 1e-8)
        assert linear.weight.item() == pytest.approx(weight, rel=1e-6)


# The loss of a step, and the update


def test_next_token_loss_by_hand():
    """Logits ln 1, ln 3: -ln(3/4) for the second id, -ln(1/4) for the first; an ignored target counts nothing."""
    logits = torch.tensor([[[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]]).log()
    loss = next_token_loss(logits, torch.tensor([[1, IGNORE, 0]]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log(4 / 3) + math.log(4))
    assert next_token_loss(logits.bfloat16(), torch.tensor([[1, 0, 1]])).dtype == torch.float32
    assert float(next_token_loss(logits, torch.full((1, 3), IGNORE))) == 0


def ragged_batch() -> tuple[Tensor, Tensor]:
    """8 sequences of 8 tokens with 1, 2, ... 8 trained targets each."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 20, (8, 8), generator=generator)
    targets = torch.randint(0, 20, (8, 8), generator=generator)
    for row in range(8):
        targets[row, row + 1 :] = IGNORE
    return inputs, targets


@pytest.mark.parametrize("cuts", [[8], [1] * 8, [3, 1, 4], [7, 1]])
def test_no_split_changes_a_gradient(cuts):
    """In fp64, the gradient of any micro-batches through `backward` is that of the mean loss of the whole batch."""
    torch.manual_seed(0)
    model, run = GPT(SHAPE).double(), new_run(dtype="fp32")
    inputs, targets = ragged_batch()
    logits = model(inputs)  # an oracle that shares nothing with the loop: log-probabilities, picked and averaged
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0][targets != IGNORE]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(-picked.mean(), parameters)
    trained = int((targets != IGNORE).sum())
    assert trained == 36
    for x, y in zip(inputs.split(cuts), targets.split(cuts), strict=True):
        loss_sum = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum", ignore_index=IGNORE)
        assert float(next_token_loss(model(x), y).detach()) == pytest.approx(loss_sum.item(), rel=1e-6)
        run.backward(loss_sum / trained)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_backward_is_a_sum_over_ranks():
    """DDP divides by the number of ranks: each rank's loss goes in multiplied by it."""
    run, p = new_run(World(1, 4, CPU)), nn.Parameter(torch.ones(()))
    run.backward(3 * p)
    assert float(p.grad) == 12


class Plain(nn.Module):
    """Parameters with gradients set by hand."""

    def __init__(self, *gradients: float) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(()) for _ in gradients)
        self.set(*gradients)

    def set(self, *gradients: float) -> None:
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = torch.tensor(gradient)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One SGD for each parameter, with a rate that `update` must replace."""
        return [torch.optim.SGD([part], lr=99.0) for part in self.parts]

    def values(self) -> list[float]:
        return [float(part) for part in self.parts]


@pytest.mark.parametrize(
    ("clip", "moved"), [(1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0]), (2.5, [-1.5, -2.0])]
)
def test_clipping_by_hand(clip, moved):
    """The norm of (3, 4) is 5: reported as it was before the clip, over the parameters of all optimizers together."""
    model = Plain(3.0, 4.0)
    assert new_run(clip=clip, dtype="fp32").update(model, model.optimizers(), rate=1.0) == 5.0
    assert model.values() == pytest.approx(moved, rel=1e-5)
    assert [part.grad for part in model.parts] == [None, None]


def test_update_uses_the_rate_of_the_step():
    model, run = Plain(1.0, 0.0), new_run(dtype="fp32")
    optimizers = model.optimizers()
    for rate, expected in ((0.5, -0.5), (0.25, -0.75)):
        model.set(1.0, 0.0)
        run.update(model, optimizers, rate)
        assert model.values()[0] == pytest.approx(expected, rel=1e-5)


def test_fp16_scale_halves_on_overflow_and_grows_again(monkeypatch, capsys):
    monkeypatch.setattr(training, "FP16_GROWTH_STEPS", 3)
    model, run = Plain(0.0, 0.0), new_run(dtype="fp16", clip=0)
    optimizers = model.optimizers()
    assert run.loss_scale == 65536
    run.backward(model.parts[0] * 2 + model.parts[1])
    assert float(model.parts[0].grad) == 131072  # scaled up on the way back
    assert run.update(model, optimizers, 1.0) == pytest.approx(math.sqrt(5))  # and down again for norm and step
    assert model.values() == [-2.0, -1.0] and run.loss_scale == 65536

    model.set(1.0, math.inf)  # one bad gradient anywhere stops every optimizer
    assert run.update(model, optimizers, 1.0) == math.inf
    assert model.values() == [-2.0, -1.0] and run.loss_scale == 32768
    assert [part.grad for part in model.parts] == [None, None]
    assert "loss scale now 32768" in capsys.readouterr().out

    scales = []
    for _ in range(6):
        model.set(32768.0, 0.0)
        run.update(model, optimizers, 0.0)
        scales.append(run.loss_scale)
    assert scales == [32768, 32768, 65536, 65536, 65536, 131072]
    model.set(math.nan, 0.0)
    run.update(model, optimizers, 1.0)
    assert run.loss_scale == 65536 and run.good_steps == 0
    run.loss_scale = 1.0
    model.set(math.nan, 0.0)
    run.update(model, optimizers, 1.0)
    assert run.loss_scale == 1.0  # never below


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_twenty_bad_steps_in_a_row_are_an_error(dtype):
    model, run = Plain(0.0), new_run(dtype=dtype)
    optimizers = model.optimizers()

    def steps(gradient: float, count: int) -> None:
        for _ in range(count):
            model.set(gradient)
            run.update(model, optimizers, 1.0)

    steps(math.nan, 19)
    steps(0.0, 1)
    steps(math.inf, 19)
    assert model.values() == [0.0]
    with pytest.raises(UserError, match="20 steps in a row"):
        steps(math.nan, 1)


def test_compute_dtype(monkeypatch):
    assert [compute_dtype(name, CPU) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert compute_dtype("auto", CPU) == dtype


# Steps, metrics, signals


def test_due():
    run = new_run(steps=10)
    assert [step for step in range(11) if run.due(step, 4)] == [4, 8, 10]
    assert [step for step in range(11) if run.due(step, 0)] == [10]


def first_draws(seed: int, rank: int, first: int) -> list[float]:
    """What dropout would draw first in each step."""
    run = new_run(World(rank, 1, CPU), seed=seed, steps=4)
    run.world = replace(run.world, rank=rank)
    return [torch.rand(()).item() for _ in run.steps(first)]


def test_dropout_is_a_function_of_seed_step_and_rank():
    draws = first_draws(0, 0, 0)
    assert first_draws(0, 0, 2) == draws[2:]  # a run that starts at step 2 has lost nothing
    others = [draws, first_draws(1, 0, 0), first_draws(0, 1, 0)]
    assert len({draw for row in others for draw in row}) == 12


def test_log_writes_json_that_all_readers_take(tmp_path):
    run = new_run(out=tmp_path, steps=2)
    run.metrics = reopen_metrics(tmp_path / "metrics.jsonl", 0)
    run.started = 0.0
    run.log_step(1, torch.tensor(6.0), 3, 0.5, math.inf)
    run.log(1, "validation", loss=math.nan, tokens=3)
    run.metrics.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    contract = ["step", "split", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "seconds"]
    assert list(first) == [*contract, "peak_memory_bytes"]
    assert (first["loss"], first["tokens"], first["grad_norm"], first["mfu"]) == (2.0, 3, None, None)
    assert 50e6 < first["peak_memory_bytes"] < 50e9
    assert second == {"step": 1, "split": "validation", "loss": None, "tokens": 3}
    assert read_metrics(tmp_path, "validation") == [second]
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")  # a run that diverged has a picture, too


def test_mfu_by_hand():
    """100 FLOPs a token, 4e9 tokens a second over 2 devices of 1 TFLOP/s: 4e11 of 2e12."""
    run = new_run(World(0, 2, CPU), peak_tflops=1.0)
    run.flops_per_token = 100.0
    assert run.mfu(4e9) == pytest.approx(0.2)


LINES = [(1, "train"), (2, "train"), (2, "validation"), (3, "train"), (4, "train"), (4, "validation"), (5, "train")]


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (5, 7), (9, 7)])
def test_metrics_are_cut_where_the_run_goes_on(step, kept, tmp_path):
    """What was logged before the checkpoint of `step` stays; its evaluation comes after it and is made again."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": at, "split": split}) + "\n" for at, split in LINES]
    path.write_text("".join(lines) + '{"step": 6, "sp')  # a killed run's torn last line
    with reopen_metrics(path, step) as file:
        file.write("next\n")
    assert path.read_text() == "".join(lines[:kept]) + "next\n"


def test_a_torn_line_that_is_json_goes_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}')
    reopen_metrics(path, 9).close()
    assert path.read_text() == '{"step": 1, "split": "train"}\n'


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    return StopSignal()  # one_thread puts the handlers back


def test_a_signal_ends_the_step_and_a_second_interrupt_everything(stop):
    assert stop.number == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it more than once
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_flatten():
    assert flatten({"shape": {"n_layer": 2}, "seed": 0, "mix": []}) == {"shape.n_layer": 2, "seed": 0, "mix": []}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"steps": 0}, "--steps must be positive, not 0"),
        ({"batch_size": -1}, "--batch-size must be positive, not -1"),
        ({"gradient_accumulation": 0}, "--gradient-accumulation must be positive"),
        ({"keep": 0}, "--keep must be positive"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive"),
        ({"warmup_steps": -1}, "--warmup-steps must not be negative"),
        ({"eval_every": -1}, "--eval-every must not be negative"),
        ({"save_every": -1}, "--save-every must not be negative"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative"),
        ({"clip": math.nan}, "--clip must not be negative"),
        ({"sequence_length": -1}, "--sequence-length must not be negative"),
        ({"final_learning_rate": 1.1}, "--final-learning-rate"),
        ({"beta2": 1.0}, "--beta2"),
        ({"peak_tflops": 0.0}, "--peak-tflops must be positive"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"seed": 2**32}, "--seed must be 0 or more"),
    ],
)
def test_flags_out_of_range(flags, says):
    with pytest.raises(UserError) as error:
        TrainingConfig(**flags)
    assert says in str(error.value)


def test_largest_seed_runs(tmp_path: Path):
    assert len(first_draws(2**32 - 1, 7, 0)) == 4
