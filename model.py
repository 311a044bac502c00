"""One GPT, by configuration: GPT-2, Llama 3 and Qwen3 are settings of the same few modules.

Shapes: B sequences of T tokens, C = n_embd channels, H query heads, K key/value heads, D = head_dim channels a head,
S keys, V = vocab_size.
Parameters carry the names of Hugging Face's Llama, so that folders and adapters of that family map name for name.

Precision: parameters stay in fp32 while training. The embeddings' output is cast to `compute_dtype`, every layer casts
its weight to the dtype of the activations that reach it, and the gradient comes back in the parameter's own dtype.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Attention = Literal["auto", "sdpa", "reference"]
CPU_REFERENCE_KEYS = 512  # on a CPU the written-out attention beats the fused one up to about this many keys


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches RoPE to longer contexts (Llama Team 2024, "The Llama 3 Herd of Models", section 3.4.3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Widths left at 0 follow the usual rule: n_kv_head = H, head_dim = C / H, n_hidden = 4 C."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_embd: int
    n_kv_head: int = 0
    head_dim: int = 0
    n_hidden: int = 0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"
    qk_norm: bool = False
    bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "head_dim", self.head_dim or self.n_embd // self.n_head)
        object.__setattr__(self, "n_hidden", self.n_hidden or 4 * self.n_embd)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of channels: head_dim {self.head_dim} must be even")


_LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "rope_theta": 5e5}
_QWEN3 = _LLAMA | {"vocab_size": 151936, "context_length": 40960, "rope_theta": 1e6, "norm_eps": 1e-6, "qk_norm": True}
_TINY = {"vocab_size": 8192, "context_length": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}

PRESETS = {
    "tiny": GPTConfig(**_LLAMA | _TINY, n_hidden=704, qk_norm=True),
    "tiny-llama": GPTConfig(**_LLAMA | _TINY, n_kv_head=2, n_hidden=704, tie_embeddings=False),
    "tiny-gpt2": GPTConfig(**_TINY),
    "gpt2": GPTConfig(50257, 1024, 12, 12, 768),
    "gpt2-medium": GPTConfig(50257, 1024, 24, 16, 1024),
    "gpt2-large": GPTConfig(50257, 1024, 36, 20, 1280),
    "gpt2-xl": GPTConfig(50257, 1024, 48, 25, 1600),
    "london-slm": GPTConfig(30000, 1024, 12, 12, 768, bias=False),
    "london": GPTConfig(30000, 1024, 24, 16, 1024, bias=False),
    "smollm2-135m": GPTConfig(49152, 8192, 30, 9, 576, 3, n_hidden=1536, **_LLAMA | {"rope_theta": 1e5}),
    "llama3.2-1b": GPTConfig(
        **_LLAMA3 | {"context_length": 131072, "n_layer": 16, "n_head": 32, "n_embd": 2048, "n_kv_head": 8},
        n_hidden=8192,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama3-8b": GPTConfig(
        **_LLAMA3 | {"context_length": 8192, "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_kv_head": 8},
        n_hidden=14336,
        tie_embeddings=False,
    ),
    "qwen3-0.6b": GPTConfig(
        **_QWEN3 | {"n_layer": 28, "n_head": 16, "n_embd": 1024, "n_kv_head": 8}, head_dim=128, n_hidden=3072
    ),
    "qwen3-8b": GPTConfig(
        **_QWEN3 | {"n_layer": 36, "n_head": 32, "n_embd": 4096, "n_kv_head": 8},
        head_dim=128,
        n_hidden=12288,
        tie_embeddings=False,
    ),
}


class Linear(nn.Linear):
    """y = x Wᵀ + b, computed in the dtype of x whatever the dtype of W."""

    def reset_parameters(self) -> None:
        """Leave the weight unset: GPT.initialize sets every parameter once the whole model stands."""

    def forward(self, x: Tensor) -> Tensor:  # (..., n_in) -> (..., n_out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last `width` channels."""

    def __init__(self, config: GPTConfig, width: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.rms = config.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        weight = self.weight.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def rope_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Radians a position for each pair of channels, fp32 (D/2,): θ^(-2i/D) (Su et al. 2021), as `rope_scaling` says."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if (scaling := config.rope_scaling) is None:
        return frequencies
    # Turns a channel makes over the original context: many turns keep their frequency, few are slowed by `factor`,
    # and between the two thresholds the two are blended.
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_tables(config: GPTConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes, (cos, cos) and (-sin, sin) of each pair's angle, each (B or 1, 1, T, D), for integer
    `positions` (B or 1, T)."""
    angles = positions[:, None, :, None].float() * rope_frequencies(config, positions.device)  # (B, 1, T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i together with channel i + D/2 by its angle: x (B, H, T, D) -> (B, H, T, D).

    (x_i cos - x_j sin, x_j cos + x_i sin) for j = i + D/2: rolled by D/2, each channel stands in its partner's place.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D + bias) v, written out (Vaswani et al. 2017, equation 1).

    q (B, H, T, D); k, v (B, H, S, D); bias, 0 where a query sees a key and -inf where not, broadcast to (B, H, T, S).
    Up to a few hundred keys these batched products are also the fastest form on a CPU.
    """
    heads, scale = q.shape[:2], 1 / math.sqrt(q.size(-1))
    q, k, v, bias = (x.flatten(0, 1) for x in (q, k, v, bias.expand(*heads, -1, -1)))  # B and H as one
    scores = torch.baddbmm(bias, q, k.mT, alpha=scale)  # (B H, T, S); product, scale and bias in one pass
    return (F.dropout(scores.softmax(dim=-1), dropout) @ v).unflatten(0, heads)  # (B, H, T, D)


def visible_keys(config: GPTConfig, positions: Tensor, documents: Tensor | None, keys: int) -> Tensor:
    """Which key each query may see: bool, broadcast to (B, 1, T, S).

    A query at position p sees keys at positions <= p, within the sliding window, and of its own document. `positions`
    (B or 1, T) are places in the row: rows of a KV cache may be at different places.
    """
    query, key = positions[:, None, :, None], torch.arange(keys, device=positions.device)
    visible = key <= query
    if config.sliding_window is not None:
        visible = visible & (key > query - config.sliding_window)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return visible


def positions_in_document(documents: Tensor) -> Tensor:
    """Each token's distance from the start of its document, for documents in contiguous runs: (B, T) -> (B, T)."""
    place = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(starts, place, 0).cummax(dim=1).values


class KVCache:
    """Keys and values of up to S tokens a row, in place, so that a new token costs one row of attention.

    Two tensors (n_layer, B, K, S, D). A row's next tokens are written where their positions say, which lets rows of
    different lengths share a batch: what padding left behind is never visible and gets overwritten.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, D) at `positions` (B, T); return the first `used` keys and values (B, K, used, D)."""
        row = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        self.keys[layer][row, :, positions] = k.transpose(1, 2)
        self.values[layer][row, :, positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, :used], self.values[layer, :, :, :used]


class SelfAttention(nn.Module):
    """Causal attention, H query heads sharing K key/value heads (Ainslie et al. 2023), RoPE and QK-norm by config."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, width, config.bias)
        self.k_proj = Linear(config.n_embd, kv_width, config.bias)
        self.v_proj = Linear(config.n_embd, kv_width, config.bias)
        self.o_proj = Linear(width, config.n_embd, config.bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: "Context") -> Tensor:  # (B, T, C) -> (B, T, C)
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (B, T, K, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        if context.rope is None:
            q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, K, T, D)
        else:  # both at once: half the operations
            turned = apply_rope(torch.cat([q, k], dim=2).transpose(1, 2), *context.rope)  # (B, H + K, T, D)
            q, k = turned.split([q.size(2), k.size(2)], dim=1)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v, context.positions, context.used)  # (B, K, S, D)
        y = self.attend(q, k, v, context)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: "Context") -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        if context.bias is not None:
            group = self.config.n_head // self.config.n_kv_head
            if group > 1:
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return attention_reference(q, k, v, context.bias, dropout)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=context.visible,
            dropout_p=dropout,
            is_causal=context.visible is None,
            enable_gqa=self.config.n_head != self.config.n_kv_head,
        )


class MLP(nn.Module):
    """Two-layer perceptron with GELU (Hendrycks and Gimpel 2016), or three-layer SwiGLU (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate_proj = Linear(config.n_embd, config.n_hidden, config.bias)
        self.up_proj = Linear(config.n_embd, config.n_hidden, config.bias)
        self.down_proj = Linear(config.n_hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        approximate = "tanh" if self.kind == "gelu_tanh" else "none"
        return self.down_proj(F.gelu(self.up_proj(x), approximate=approximate))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config, config.n_embd)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = Norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: "Context") -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


@dataclass(frozen=True)
class Context:
    """What every block needs of the batch beside the activations, computed once a forward pass."""

    positions: Tensor  # (B or 1, T), places in the row
    rope: tuple[Tensor, Tensor] | None  # of rope_tables, each (B or 1, 1, T, D)
    visible: Tensor | None  # bool (B or 1, 1, T, S); None is plain causal attention
    bias: Tensor | None  # the same as 0 and -inf, (1, 1, T, S) or (B, H, T, S), for attention_reference; None: SDPA
    cache: KVCache | None
    used: int  # keys in the row so far, S


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019; Touvron et al. 2023; Yang et al. 2025).

    `attention`: "sdpa" is PyTorch's fused attention, "reference" the written-out products; "auto" takes the faster one.
    `checkpointing` recomputes each block in the backward pass instead of keeping its activations (Chen et al. 2016).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.attention: Attention = "auto"
        self.checkpointing = False
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the parameters
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config, config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Matrices N(0, 0.02), those that write to the residual stream smaller by √(2 n_layer); gains 1, biases 0."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if residual else 0.02)

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), in the compute dtype, of the token after each of `tokens` (B, T, integer)."""
        return self.lm_head(self.hidden(tokens, documents, positions, cache))

    def hidden(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The last hidden states (B, T, C), normalised: what the head multiplies.

        `documents` (B, T): tokens of different documents do not see each other, and positions restart in each.
        `positions` (B, T): places of the tokens in their rows, needed with a `cache` alone.
        """
        place = torch.arange(tokens.size(1), device=tokens.device)[None] if positions is None else positions
        within = place if documents is None else positions_in_document(documents)
        x = self.embed_tokens(tokens)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.embed_positions(within)
        x = self.dropout(x.to(self.compute_dtype or x.dtype))
        context = self.context(place, within, documents, cache, x.dtype)
        for block in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.norm(x)

    def context(
        self, place: Tensor, within: Tensor, documents: Tensor | None, cache: KVCache | None, dtype: torch.dtype
    ) -> Context:
        rope = rope_tables(self.config, within, dtype) if self.config.position == "rope" else None
        used = place.size(1) if cache is None else int(place.max()) + 1
        plain = cache is None and documents is None and self.config.sliding_window is None
        visible = None if plain else visible_keys(self.config, place, documents, used)
        bias = None
        if self.attention == "reference" or (
            self.attention == "auto" and place.device.type == "cpu" and used <= CPU_REFERENCE_KEYS
        ):
            seen = visible_keys(self.config, place, documents, used) if visible is None else visible
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
            if bias.size(0) > 1:  # for every head once, not in every layer
                bias = bias.expand(-1, self.config.n_head, -1, -1).contiguous()
        return Context(place, rope, visible, bias, cache, used)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device


def parameter_count(config: GPTConfig) -> int:
    """Trained parameters, tied ones once, counted without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config).parameters())


def flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """Floating-point operations of a training step a token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 for each parameter of a matrix product, and 12 n_layer H D S for attention over S keys, the causal half not
    discounted. Embedding look-ups multiply nothing and do not count.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    if config.position == "learned":
        looked_up += config.context_length * config.n_embd
    keys = min(sequence_length, config.sliding_window or sequence_length)
    return 6 * (parameter_count(config) - looked_up) + 12 * config.n_layer * config.n_head * config.head_dim * keys
