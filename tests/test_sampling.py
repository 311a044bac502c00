"""Sampling: against transformers, against recomputation without a cache, and against numbers worked by hand."""

import math
import random
from dataclasses import replace

import pytest
import torch

from cli import UserError
from model import GPT, GPTConfig
from model_folder import write_model_folder
from sampling import (
    Completion,
    Sampling,
    choose,
    filter_logits,
    generate,
    invert_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    tokens_seen,
)

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "n_hidden": 48}
SMALL = {"vocab_size": 97, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": GPTConfig(**SMALL),
    "llama, grouped queries": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, tie_embeddings=False),
    "qwen3": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, head_dim=16, qk_norm=True),
    "qwen3, sliding window": GPTConfig(**SMALL, **LLAMA, head_dim=16, qk_norm=True, sliding_window=5),
}
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [1, 2, 3], [7, 8, 9, 10, 11, 12, 13], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
ALL_AT_ONCE = Sampling(
    max_new_tokens=16, temperature=1.4, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3
)


def random_model(config: GPTConfig) -> GPT:
    """A model with dropout, in training mode, whose logits spread."""
    torch.manual_seed(0)
    model = GPT(replace(config, dropout=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@torch.no_grad()
def recompute(model: GPT, prompt: list[int], sampling: Sampling, row: int) -> Completion:
    """What `generate` says of one row, every token from a forward pass over all before it."""
    model.eval()
    uniforms, written = random.Random(f"{sampling.seed} {row}"), Completion()
    for _ in range(sampling.max_new_tokens):
        tokens = [prompt + written.tokens]
        logits = model(torch.tensor(tokens))[:, -1]
        token = int(choose(logits, sampling, tokens_seen(tokens, logits), [uniforms.random()]))
        written.tokens.append(token)
        written.logprobs.append(float(logits.log_softmax(-1)[0, token]))
    return written


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=16, temperature=0), ALL_AT_ONCE], ids=["greedy", "drawn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_ragged_batch_equals_recomputation(shape, sampling):
    model = random_model(SHAPES[shape])
    completions = generate(model, PROMPTS, sampling)
    assert model.training  # as it was
    assert len({tuple(completion.tokens) for completion in completions}) >= 4
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        expected = recompute(model, prompt, sampling, row)
        assert completion.tokens == expected.tokens
        assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_transformers(shape, penalty, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES[shape])
    write_model_folder(tmp_path, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = generate(model, PROMPTS, Sampling(max_new_tokens=20, temperature=0, repetition_penalty=penalty))
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert completion.tokens == expected.tolist()


def test_filters_equal_those_of_transformers():
    from transformers.generation import logits_process as theirs

    logits = torch.randn(20, 97, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 10] = logits[:, 20]  # equal logits, as at the edge of a top-k
    seen_ids = torch.randint(0, 97, (20, 12), generator=torch.Generator().manual_seed(1))
    seen = tokens_seen(seen_ids.tolist(), logits)
    pairs = [(penalize_repetition(logits, seen, 1.7), theirs.RepetitionPenaltyLogitsProcessor(1.7))]
    pairs += [(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)) for k in (1, 5, 96, 500)]
    pairs += [(keep_top_p(logits, p), theirs.TopPLogitsWarper(p)) for p in (1e-9, 0.3, 0.9, 0.999)]
    pairs += [(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)) for p in (0.01, 0.5, 1.0)]
    for number, (ours, processor) in enumerate(pairs):
        assert torch.equal(ours, processor(seen_ids, logits.clone())), number
    in_order = [theirs.TemperatureLogitsWarper(1.4), theirs.TopKLogitsWarper(40), theirs.TopPLogitsWarper(0.95)]
    expected = logits.clone()
    for processor in [*in_order, theirs.MinPLogitsWarper(0.01)]:
        expected = processor(seen_ids, expected)
    assert torch.equal(filter_logits(logits, ALL_AT_ONCE), expected)


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda filtered: filtered.isfinite()[0].tolist()
    assert kept(keep_top_k(logits, 2)) == [True, True, False, False]
    assert kept(keep_top_p(logits, 0.7)) == [True, True, False, False]  # 0.5 alone does not reach 0.7, 0.5 + 0.3 does
    assert kept(keep_top_p(logits, 0.4)) == [True, False, False, False]
    assert kept(keep_min_p(logits, 0.25)) == [True, True, True, False]  # at least 0.25 x 0.5 = 0.125
    halved = filter_logits(logits, Sampling(temperature=0.5)).softmax(-1)  # squares, of sum 0.365
    assert halved[0].tolist() == pytest.approx([0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])
    penalized = penalize_repetition(torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), 2.0)
    assert penalized.tolist() == [[1.0, -4.0, 3.0]]


def test_inverse_cdf_by_hand():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.9, 3), (math.nextafter(1, 0), 3)]:
        for total in (1.0, 1 + 2**-20, 0.7):  # the sum of rounded probabilities is not quite 1
            assert invert_cdf(probabilities.double() * total, [uniform]).tolist() == [token], (uniform, total)


def test_draws_follow_the_distribution():
    model, draws = random_model(SHAPES["gpt2"]), 4000
    sampling = Sampling(max_new_tokens=1, temperature=1.2, top_k=30, min_p=0.02)
    tokens = [completion.tokens[0] for completion in generate(model, [[3, 4, 5]] * draws, sampling)]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[3, 4, 5]]))[:, -1]
    expected = filter_logits(logits, sampling).softmax(-1)[0] * draws
    counts = torch.bincount(torch.tensor(tokens), minlength=97)
    kept = expected > 0
    assert counts[~kept].sum() == 0 and kept.sum() > 10
    chi_square, freedom = float(((counts - expected) ** 2 / expected)[kept].sum()), int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_neighbours():
    model = random_model(SHAPES["qwen3"])
    ends = frozenset(range(0, 97, 6))  # so that rows leave the batch at different times
    together = generate(model, PROMPTS, ALL_AT_ONCE, ends)
    assert len({len(completion.tokens) for completion in together}) >= 3
    for row, completion in enumerate(together):
        alone = generate(model, [PROMPTS[row]], ALL_AT_ONCE, ends, first_row=row)[0]
        assert (completion.tokens, completion.finish_reason) == (alone.tokens, alone.finish_reason)
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_seeds():
    model = random_model(SHAPES["llama, grouped queries"])
    tokens = lambda seed, first_row=0: generate(
        model, [[1]], Sampling(seed=seed, max_new_tokens=16), first_row=first_row
    )
    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1) and tokens(0) != tokens(0, first_row=1)
    first, second = generate(model, [[1], [1]], Sampling(max_new_tokens=16))
    assert first != second  # the same prompt twice is two draws


def test_end_tokens_and_watch_stop_a_row():
    model = random_model(SHAPES["gpt2"])
    free = generate(model, PROMPTS[:3], Sampling(max_new_tokens=16))
    end = next(token for token in free[0].tokens[3:] if token not in free[1].tokens)
    watched = free[1].tokens[6]
    heard = []

    def watch(row: int, token: int) -> bool:
        heard.append((row, token))
        return (row, token) == (1, watched)

    stopped = generate(model, PROMPTS[:3], Sampling(max_new_tokens=16), frozenset([end]), watch=watch)
    for before, after in zip(free, stopped, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
    assert stopped[0].tokens[-1] == end and stopped[0].finish_reason == "stop"  # the end token is among the tokens
    assert stopped[1].tokens[-1] == watched and stopped[1].finish_reason == "stop"
    assert [token for row, token in heard if row == 0] == stopped[0].tokens[:-1]  # and not heard


def test_learned_positions_end_at_the_context():
    model, prompt = random_model(SHAPES["gpt2"]), list(range(60))
    long, short = generate(model, [prompt, [1]], Sampling(max_new_tokens=30))
    assert (len(long.tokens), len(short.tokens), long.finish_reason) == (4, 30, "length")
    for bad in (list(range(64)), []):
        with pytest.raises(ValueError, match="room for one more"):
            generate(model, [bad], Sampling())
    beyond = generate(random_model(SHAPES["qwen3"]), [prompt], Sampling(max_new_tokens=30))
    assert len(beyond[0].tokens) == 30  # RoPE has no last position
    assert generate(model, [], Sampling()) == []


def test_nan_is_an_error():
    model = random_model(SHAPES["gpt2"])
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    for temperature in (0, 1):
        with pytest.raises(UserError, match="NaN"):
            generate(model, [[1]], Sampling(temperature=temperature))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", (0, -1)),
        ("temperature", (-1.0, math.nan, math.inf, 1e-9)),
        ("top_k", (-1,)),
        ("top_p", (0.0, 1.5, math.nan)),
        ("min_p", (-0.1, 1.5, math.nan)),
        ("repetition_penalty", (0.0, -1.0, math.nan)),
    ],
)
def test_settings_out_of_range_are_refused(field, values):
    for value in values:
        with pytest.raises(UserError, match=f"--{field.replace('_', '-')} "):
            Sampling(**{field: value})
