"""From prompts to completions, ids in and ids out: how a token is drawn, and the loop over a batch with its KV cache.

Shapes: B rows, one a completion; U distinct prompts; T tokens; V = vocab_size.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cli import UserError
from model import GPT, GPTConfig, KVCache

SMALLEST_TEMPERATURE = 1e-3  # below it logits / temperature leaves the range of fp32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen, and how many. The defaults draw from the model's own distribution."""

    max_new_tokens: int = 256
    """Most tokens a completion; the context of a model with learned positions may end it sooner."""
    temperature: float = 1.0
    """Divides the logits: below 1 surer, above 1 more varied, 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens alone; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach p; 1 draws from all."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest; 0 draws from all."""
    repetition_penalty: float = 1.0
    """Makes tokens that already stand in prompt or completion less likely; 1 does not."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be positive, not {self.max_new_tokens}")
        if not (self.temperature == 0 or SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(f"--temperature must be 0 or at least {SMALLEST_TEMPERATURE}, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"--top-k must not be negative, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty must be positive, not {self.repetition_penalty}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) of `seen` tokens (B, V, bool) over the penalty, or times it if negative (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest logits of each row (B, V) at -inf; what equals the k-th stays (Fan et al. 2018)."""
    least = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The nucleus: the fewest likeliest tokens of each row (B, V) that reach p, others -inf (Holtzman et al. 2020)."""
    ascending, order = logits.sort()
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False  # the likeliest token stays, whatever the rounding
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens less than p times as probable as their row's likeliest at -inf: (B, V) -> (B, V) (Nguyen et al. 2024)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k, top-p, min-p, in the order of transformers: (B, V) -> (B, V). The temperature is not 0."""
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def invert_cdf(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The token (B,) at which each row's cumulative probability (B, V) passes its number in [0, 1).

    Each row is its own lookup: what it draws does not depend on the rows beside it.
    """
    probabilities = probabilities.cpu() if probabilities.is_mps else probabilities  # MPS has no fp64
    cumulative = probabilities.double().cumsum(-1)
    # The largest fp64 below 1 times the total rounds to less than the total: no draw falls past the end.
    target = torch.tensor(uniforms, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
    # NaN in, any token out: `generate` sees it in the log-probability.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.size(-1) - 1)


def choose(logits: Tensor, sampling: Sampling, seen: Tensor | None, uniforms: Sequence[float]) -> Tensor:
    """The next token of each row (B,), from fp32 logits (B, V), tokens seen (B, V, bool) and numbers in [0, 1)."""
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return invert_cdf(filter_logits(logits, sampling).softmax(-1), uniforms).to(logits.device)


@dataclass
class Completion:
    """What a model wrote after one prompt.

    tokens: every id it chose, the one that ended it included. logprobs: the natural log-probability of each under the
    model's own distribution (temperature 1, nothing filtered). finish_reason: "stop" at an end token or where `watch`
    said so, "length" at the limit.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"


@dataclass
class Row:
    """A completion in the making, as one row of the batch."""

    number: int  # in the list of prompts
    prompt_length: int
    limit: int  # tokens it may write
    uniforms: random.Random  # its own draws, one a step
    completion: Completion = field(default_factory=Completion)


def room(config: GPTConfig, length: int) -> float:
    """Tokens that may follow `length` others: RoPE has no last position, learned positions end at the context."""
    return config.context_length - length if config.position == "learned" else math.inf


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    end_tokens: frozenset[int] = frozenset(),
    first_row: int = 0,
    watch: Callable[[int, int], bool] | None = None,
) -> list[Completion]:
    """Continue a batch of prompts (ids, none empty) and return their completions in the same order.

    Row i draws from a generator of (seed, first_row + i), so its tokens depend neither on the other rows nor on how
    many they are, up to the rounding of batched matrix products. `watch(i, token)` hears each token of row i that is no
    end token, and ends the row by returning True. Dropout is off meanwhile. Raises ValueError for a prompt that is
    empty or leaves no room for a token, UserError where the model's logits are NaN.
    """
    limits = [min(sampling.max_new_tokens, room(model.config, len(prompt))) for prompt in prompts]
    if not all(prompts) or not all(limit > 0 for limit in limits):
        raise ValueError("every prompt needs a token, and room for one more in the model's context")
    if not prompts:
        return []
    completions = [Completion() for _ in prompts]
    rows = [
        Row(i, len(prompt), limit, random.Random(f"{sampling.seed} {first_row + i}"), completions[i])
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    training = model.training
    model.eval()
    try:
        write(model, prompts, rows, sampling, end_tokens, watch)
    finally:
        model.train(training)
    return completions


def write(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    rows: list[Row],
    sampling: Sampling,
    end_tokens: frozenset[int],
    watch: Callable[[int, int], bool] | None,
) -> None:
    """Fill in the completions of `rows`, one token each a step; rows that have ended leave the batch."""
    cache, logits = prefill(model, prompts, rows)  # (B, V)
    seen = tokens_seen(prompts, logits) if sampling.repetition_penalty != 1 else None  # (B, V)
    while rows:
        chosen = choose(logits, sampling, seen, [row.uniforms.random() for row in rows])  # (B,)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]  # (B,)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        ended = []
        for place, (row, token, logprob) in enumerate(zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)):
            if add_token(row, token, logprob, end_tokens, watch):
                ended.append(place)
        for place in reversed(ended):
            seen = drop_row(place, rows, cache, seen)
        if rows:
            logits = decode(model, rows, cache)


def prefill(model: GPT, prompts: Sequence[Sequence[int]], rows: list[Row]) -> tuple[KVCache, Tensor]:
    """Read the prompts, equal ones once: the filled cache, and fp32 logits (B, V) of each row's first token."""
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=model.device)  # (U,)
    longest = int(lengths.max())
    # Right padding: what it leaves in the cache is overwritten before any query may see it.
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in distinct]
    tokens = torch.tensor(padded, device=model.device)  # (U, T)
    positions = torch.arange(longest, device=model.device).expand_as(tokens)
    length = max(row.prompt_length + row.limit - 1 for row in rows)  # the last token is never read back
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    cache = KVCache(model.config, len(distinct), length, dtype, model.device)
    hidden = model.hidden(tokens, positions=positions, cache=cache)  # (U, T, C)
    logits = model.lm_head(hidden[torch.arange(len(distinct)), lengths - 1]).float()  # (U, V)
    if len(distinct) < len(prompts):
        place = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)  # (B,)
        cache.keys, cache.values, logits = cache.keys[:, place], cache.values[:, place], logits[place]
    return cache, logits


def decode(model: GPT, rows: list[Row], cache: KVCache) -> Tensor:
    """Read each row's newest token: fp32 logits (B, V) of the one after it."""
    tokens = torch.tensor([row.completion.tokens[-1:] for row in rows], device=model.device)  # (B, 1)
    positions = [[row.prompt_length + len(row.completion.tokens) - 1] for row in rows]
    hidden = model.hidden(tokens, positions=torch.tensor(positions, device=model.device), cache=cache)  # (B, 1, C)
    return model.lm_head(hidden[:, -1]).float()


def add_token(
    row: Row, token: int, logprob: float, end_tokens: frozenset[int], watch: Callable[[int, int], bool] | None
) -> bool:
    """Append a token to the row's completion; whether the row ends with it."""
    if math.isnan(logprob):
        raise UserError("the model's logits are NaN: its weights are damaged, or --dtype fp16 is too narrow for it")
    completion = row.completion
    completion.tokens.append(token)
    completion.logprobs.append(logprob)
    if token in end_tokens or (watch is not None and watch(row.number, token)):
        completion.finish_reason = "stop"
        return True
    return len(completion.tokens) == row.limit


def drop_row(place: int, rows: list[Row], cache: KVCache, seen: Tensor | None) -> Tensor | None:
    """Take a row out of the batch by moving the last one into its place; returns `seen` (B - 1, V) if there is one."""
    last = len(rows) - 1
    rows[place] = rows[last]
    rows.pop()
    for kept in (cache.keys.transpose(0, 1), cache.values.transpose(0, 1), seen):
        if kept is not None and place != last:
            kept[place] = kept[last]
    cache.keys, cache.values = cache.keys[:, :last], cache.values[:, :last]
    return None if seen is None else seen[:last]


def tokens_seen(prompts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """Which tokens stand in each prompt: bool, of the shape and device of `logits` (B, V)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=logits.device)] = True
    return seen
