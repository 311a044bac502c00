"""The model against transformers, in both directions, and against itself: packed, cached, windowed, recomputed."""

import dataclasses
import math

import pytest
import torch

from cli import UserError
from model import (
    GPT,
    PRESETS,
    GPTConfig,
    KVCache,
    RopeScaling,
    flops_per_token,
    parameter_count,
    positions_in_document,
    rope_frequencies,
)
from model_folder import SHARD_BYTES, config_from_hf, family, read_model_folder, write_model_folder

LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
SMALL = {"vocab_size": 97, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}

SHAPES = {
    "gpt2": GPTConfig(**SMALL),
    "gpt2, exact GELU, untied, wide MLP": GPTConfig(**SMALL, mlp="gelu", tie_embeddings=False, n_hidden=72),
    "gpt2 without biases": GPTConfig(**SMALL, bias=False),
    "llama": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, n_hidden=48, tie_embeddings=False),
    "llama, scaled RoPE": GPTConfig(
        **SMALL, **LLAMA, n_hidden=48, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)
    ),
    "llama with biases": GPTConfig(**SMALL, **LLAMA | {"bias": True}, n_kv_head=1, n_hidden=48),
    "qwen3": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, head_dim=16, n_hidden=48, qk_norm=True, norm_eps=1e-6),
    "qwen3, sliding window": GPTConfig(
        **SMALL, **LLAMA, head_dim=16, n_hidden=48, qk_norm=True, sliding_window=5, tie_embeddings=False
    ),
}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter is random, biases and gains too, so that none can be forgotten unseen."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def some_tokens(config: GPTConfig, rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("london-slm", 108_780_288),
        ("london", 333_808_640),
        ("smollm2-135m", 134_515_008),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_their_published_size(name, count):
    assert parameter_count(PRESETS[name]) == count


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_ours(shape, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES[shape])
    write_model_folder(tmp_path, model)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == {"g": "GPT2LMHeadModel", "l": "LlamaForCausalLM", "q": "Qwen3ForCausalLM"}[shape[0]]
    tokens = some_tokens(model.config)
    with torch.no_grad():
        ours_logits, theirs_logits = model(tokens), theirs.eval()(tokens).logits
    assert (ours_logits - theirs_logits).abs().max() < 1e-4
    assert ours_logits.std() > 0.1  # logits that say something
    assert (
        greedy(model, tokens)
        == theirs.generate(
            tokens, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(tokens), pad_token_id=0
        )[:, tokens.size(1) :].tolist()
    )


def greedy(model: GPT, tokens: torch.Tensor, count: int = 12) -> list[list[int]]:
    """Greedy continuation by recomputing everything for every token."""
    start = tokens.size(1)
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, start:].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_ours_opens_theirs(kind, tmp_path):
    import transformers

    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        if kind == "llama":
            rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
            theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=rope))
        else:
            theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, head_dim=16))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.eval().save_pretrained(tmp_path)
    ours = read_model_folder(tmp_path).eval()
    assert family(ours.config) == kind
    tokens = some_tokens(ours.config)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_reads_back_bit_for_bit(shape, tmp_path):
    model = random_model(SHAPES[shape])
    write_model_folder(tmp_path, model)
    again = read_model_folder(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_shape_of_no_family_keeps_its_own_name(tmp_path):
    config = GPTConfig(**SMALL, position="rope", sliding_window=7)  # LayerNorm with RoPE
    model = random_model(config)
    write_model_folder(tmp_path, model)
    again = read_model_folder(tmp_path).eval()
    assert '"GPT"' in (tmp_path / "config.json").read_text()
    assert again.config == config
    assert torch.equal(again(some_tokens(config)), model(some_tokens(config)))


def test_large_folders_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("model_folder.SHARD_BYTES", 20_000)
    assert SHARD_BYTES == 5 * 10**9
    from transformers import AutoModelForCausalLM

    model = random_model(SHAPES["llama"])
    write_model_folder(tmp_path, model)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again, theirs = read_model_folder(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = some_tokens(model.config)
    assert torch.equal(model(tokens), again.eval()(tokens))
    assert (model(tokens) - theirs.eval()(tokens).logits).abs().max() < 1e-4
    monkeypatch.undo()
    write_model_folder(tmp_path, model)  # rewritten whole: no stale shard is left behind
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "relu"}, "SwiGLU"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "some layers"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message, tmp_path):
    from model_folder import config_to_hf

    values = config_to_hf(SHAPES["qwen3"]) | change
    with pytest.raises(UserError, match=message):
        config_from_hf(values)


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_model_folder(tmp_path)
    write_model_folder(tmp_path, random_model(SHAPES["llama"]))
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_model_folder(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        read_model_folder(tmp_path)
    wider = dataclasses.replace(SHAPES["llama"], n_hidden=52)
    write_model_folder(tmp_path / "wider", random_model(wider))
    weights.write_bytes((tmp_path / "wider" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="has shape"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_packed_documents_do_not_see_each_other(shape, attention):
    model = random_model(SHAPES[shape])
    model.attention = attention
    tokens = some_tokens(model.config, rows=1, length=20)
    documents = torch.tensor([[0] * 7 + [1] * 9 + [2] * 4])
    packed = model(tokens, documents)
    apart = torch.cat([model(part) for part in tokens.split([7, 9, 4], dim=1)], dim=1)
    assert (packed - apart).abs().max() < 1e-4
    assert (packed - model(tokens)).abs().max() > 1e-2


def test_positions_restart_in_each_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 5]])
    assert positions_in_document(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_equals_recomputation_for_rows_of_different_lengths(shape):
    model = random_model(SHAPES[shape])
    tokens = some_tokens(model.config, rows=2, length=20)
    whole = model(tokens)
    lengths = torch.tensor([5, 11])
    cache = KVCache(model.config, 2, 20, torch.float32, torch.device("cpu"))
    prompt = tokens[:, :11].clone()
    prompt[0, 5:] = 0  # padding
    first = model(prompt, positions=torch.arange(11).expand(2, -1), cache=cache)
    assert (first[0, :5] - whole[0, :5]).abs().max() < 1e-4
    for step in range(9):
        places = lengths + step
        step_tokens = tokens.gather(1, places[:, None])
        logits = model(step_tokens, positions=places[:, None], cache=cache)
        for row in range(2):
            assert (logits[row, 0] - whole[row, places[row]]).abs().max() < 1e-4


def test_sdpa_equals_reference_and_window_hides_old_keys():
    config = dataclasses.replace(SHAPES["qwen3, sliding window"], n_layer=1)
    model, tokens = random_model(config), some_tokens(config, rows=1)
    model.attention = "reference"
    reference = model(tokens)
    model.attention = "sdpa"
    assert (model(tokens) - reference).abs().max() < 1e-5
    changed = tokens.clone()
    changed[0, 3] += 1
    moved = (model(changed) - reference).abs().amax(-1)[0] > 1e-3
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]  # one layer of window 5 reaches no further


def test_checkpointing_gives_the_same_gradients():
    config = dataclasses.replace(SHAPES["llama"], dropout=0.1)
    tokens, gradients = some_tokens(config), []
    for checkpointing in (False, True):
        model = random_model(config).train()
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        model(tokens).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_low_precision_computes_low_and_keeps_fp32_gradients():
    model = random_model(SHAPES["qwen3"])
    tokens = some_tokens(model.config)
    exact = model(tokens)
    model.compute_dtype = torch.bfloat16
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert 1e-4 < (logits - exact).abs().max() / exact.abs().max() < 0.05
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_initial_scale_and_loss():
    config = GPTConfig(vocab_size=1000, context_length=32, n_layer=8, n_head=4, n_embd=128)
    torch.manual_seed(0)
    model = GPT(config)
    assert model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    tokens = some_tokens(config, rows=4, length=32)
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flip(0).flatten())
    assert loss.item() == pytest.approx(math.log(1000), rel=0.02)


def test_flops_by_hand():
    config = GPTConfig(vocab_size=10, context_length=8, n_layer=1, n_head=2, n_embd=4, bias=False)
    matrices = 4 * 4 * 4 + 2 * 4 * 16 + 10 * 4  # attention, MLP, head
    gains = 3 * 4
    assert flops_per_token(config, 8) == 6 * (matrices + gains) + 12 * 1 * 4 * 8


def test_rope_scaling_by_hand():
    plain = GPTConfig(**SMALL, **LLAMA, rope_theta=1e4)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32))
    before, after = (rope_frequencies(config, torch.device("cpu")) for config in (plain, scaled))
    assert before.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    # 32 positions are 5.09, 0.509, ... turns: the first keeps its frequency, the others fall below one turn
    assert after.tolist() == pytest.approx([1.0, 0.1 / 8, 0.01 / 8, 0.001 / 8])


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        GPTConfig(**SMALL, n_kv_head=3)
