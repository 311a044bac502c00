"""Model folders: Hugging Face's own format, read and written for GPT-2, Llama and Qwen3.

`config.json` says the shape, `model.safetensors` (or shards with an index) holds the weights, the tokenizer's files lie
beside them. A shape that none of the three families has is written under this project's own architecture name, "GPT".
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cli import UserError, sync_folder
from model import GPT, GPTConfig, RopeScaling

SHARD_BYTES = 5 * 10**9
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt": "GPT"}

# Hugging Face's GPT-2 name for each of our modules. Its `Conv1D` matrices lie transposed, query, key and value in one.
GPT2_MODULES = {
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.qkv",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def family(config: GPTConfig) -> str:
    """The `model_type` that this shape is written as: gpt2, llama, qwen3, or gpt where none of them has it."""
    square = config.n_kv_head == config.n_head and config.head_dim * config.n_head == config.n_embd
    windowed = config.sliding_window is not None
    if config.norm == "layernorm" and config.position == "learned" and config.mlp != "swiglu":
        return "gpt2" if square and not config.qk_norm and not windowed else "gpt"
    if config.norm == "rmsnorm" and config.position == "rope" and config.mlp == "swiglu":
        if config.qk_norm:
            return "gpt" if config.bias else "qwen3"
        return "gpt" if windowed else "llama"
    return "gpt"


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The content of `config.json`. Two keys of ours, `bias` and `dropout`, are added; other readers ignore them."""
    kind = family(config)
    head = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    if kind == "gpt":
        return head | asdict(config)
    shared = head | {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bias": config.bias,
        "dropout": config.dropout,
    }
    if kind == "gpt2":
        return shared | {
            "n_positions": config.context_length,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_hidden,
            "activation_function": "gelu_new" if config.mlp == "gelu_tanh" else "gelu",
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }
    scaling = None if config.rope_scaling is None else _scaling_to_hf(config.rope_scaling)
    return shared | {
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0,
    }


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    values = asdict(scaling)
    values["original_max_position_embeddings"] = values.pop("original_context_length")
    return {"rope_type": "llama3"} | values


def config_from_hf(values: dict[str, Any], where: str = "config.json") -> GPTConfig:
    """The shape that a `config.json` describes. UserError for another architecture or a feature we do not compute."""
    kind = values.get("model_type")
    try:
        if kind == "gpt":
            return _own_config(values)
        if kind == "gpt2":
            return _gpt2_config(values, where)
        if kind in ("llama", "qwen3"):
            return _llama_config(values, where)
    except KeyError as missing:
        raise UserError(f"{where} has no {missing}: it does not describe a {kind} model") from None
    raise UserError(f"{where}: model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")


def _own_config(values: dict[str, Any]) -> GPTConfig:
    known = {field.name: values[field.name] for field in fields(GPTConfig)}
    if known["rope_scaling"] is not None:
        known["rope_scaling"] = RopeScaling(**known["rope_scaling"])
    return GPTConfig(**known)


def _gpt2_config(values: dict[str, Any], where: str) -> GPTConfig:
    activation = values.get("activation_function", "gelu_new")
    mlp = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}.get(activation)
    unlike = values.get("scale_attn_by_inverse_layer_idx") or not values.get("scale_attn_weights", True)
    if mlp is None or unlike:
        raise UserError(f"{where}: activation {activation!r} or its attention scaling is not GPT-2's own")
    return GPTConfig(
        vocab_size=values["vocab_size"],
        context_length=values["n_positions"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_hidden=values.get("n_inner") or 0,
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        mlp=mlp,
        bias=values.get("bias", True),
        tie_embeddings=values.get("tie_word_embeddings", True),
        dropout=values.get("dropout", values.get("resid_pdrop", 0.1)),
    )


def _llama_config(values: dict[str, Any], where: str) -> GPTConfig:
    qwen3 = values["model_type"] == "qwen3"
    bias = values.get("attention_bias", False)
    if values.get("hidden_act", "silu") != "silu" or bias != values.get("mlp_bias", False) or (bias and qwen3):
        raise UserError(f"{where}: only SwiGLU, with biases everywhere or nowhere, is computed")
    # transformers 5 writes one `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`.
    rope = values.get("rope_parameters") or (values.get("rope_scaling") or {})
    return GPTConfig(
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_embd=values["hidden_size"],
        n_kv_head=values.get("num_key_value_heads") or 0,
        head_dim=values.get("head_dim") or 0,
        n_hidden=values["intermediate_size"],
        norm="rmsnorm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 1e4))),
        rope_scaling=_scaling_from_hf(rope, where),
        mlp="swiglu",
        qk_norm=qwen3,
        bias=bias,
        tie_embeddings=values.get("tie_word_embeddings", False),
        dropout=values.get("dropout", values.get("attention_dropout", 0.0)),
        sliding_window=_sliding_window(values, where),
    )


def _scaling_from_hf(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{where}: RoPE scaling {kind!r} is not computed, only Llama 3's")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(*(rope[name] for name in names))


def _sliding_window(values: dict[str, Any], where: str) -> int | None:
    if not values.get("use_sliding_window") or values.get("sliding_window") is None:
        return None
    if values.get("max_window_layers", 0) > 0 or "full_attention" in (values.get("layer_types") or []):
        raise UserError(f"{where}: a sliding window on some layers only is not computed")
    return values["sliding_window"]


def tensors_to_hf(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under the names and layouts of its family, tied ones once."""
    kind, state = family(model.config), dict(model.named_parameters())
    for name, tensor in state.items():
        tensor = tensor.detach()
        if kind == "gpt":
            yield name, tensor
        elif kind != "gpt2":
            yield name if name.startswith("lm_head") else f"model.{name}", tensor
        elif "q_proj" in name:
            parts = [state[name.replace("q_proj", part)].detach() for part in ("q_proj", "k_proj", "v_proj")]
            yield _gpt2_name(name.replace("q_proj", "qkv")), torch.cat(parts).t().contiguous()
        elif "k_proj" not in name and "v_proj" not in name:
            transposed = "proj.weight" in name
            yield _gpt2_name(name), tensor.t().contiguous() if transposed else tensor
    if kind == "gpt2" and not model.config.bias:
        yield from _zero_biases(model.config)


def _gpt2_name(name: str) -> str:
    if name.startswith("lm_head"):
        return name
    for theirs, ours in GPT2_MODULES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.(weight|bias)$", rf"\1{theirs}.\2", name)
    return "transformer." + name.replace("layers.", "h.")


def _zero_biases(config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """The biases that Hugging Face's GPT-2 always has; zero, they leave a model without biases what it is."""
    widths = {"ln_1": 1, "attn.c_attn": 3, "attn.c_proj": 1, "ln_2": 1, "mlp.c_proj": 1}
    for layer in range(config.n_layer):
        for module, width in widths.items():
            yield f"transformer.h.{layer}.{module}.bias", torch.zeros(width * config.n_embd)
        yield f"transformer.h.{layer}.mlp.c_fc.bias", torch.zeros(config.n_hidden)
    yield "transformer.ln_f.bias", torch.zeros(config.n_embd)


def tensors_from_hf(config: GPTConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a folder as ours: mostly one, three for GPT-2's joint projection, none for what is derived."""
    kind = family(config)
    if config.tie_embeddings and name == "lm_head.weight":
        return
    if kind != "gpt2":
        yield name.removeprefix("model.") if kind != "gpt" else name, tensor
        return
    name = name.removeprefix("transformer.")
    if name.endswith((".attn.bias", ".attn.masked_bias")) or (name.endswith("bias") and not config.bias):
        return  # the causal mask that old files store, or the zeros written in place of no bias
    layer, module, leaf = re.fullmatch(r"(h\.\d+\.)?(.*?)\.?(weight|bias)", name).groups()
    ours = layer.replace("h.", "layers.") if layer else ""
    ours += f"{GPT2_MODULES.get(module, module)}.{leaf}"
    if module.startswith(("attn.c_", "mlp.c_")):
        tensor = tensor.t()
    if module == "attn.c_attn":
        for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
            yield ours.replace("qkv", part), piece.contiguous()
    else:
        yield ours, tensor.contiguous()


def write_model_folder(folder: Path, model: GPT, tokenizer: Any = None) -> None:
    """Write `model`, and its tokenizer if given, into `folder`, which may hold other files of a run.

    Files are written aside and renamed one by one, `config.json` last: with it the folder is whole. The weights keep
    the dtype of the parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_weights(partial, dict(tensors_to_hf(model)))
    end = {} if tokenizer is None else {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    if tokenizer is not None:
        tokenizer.save(partial)
    dtype = {"torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    _write_json(partial / "generation_config.json", end)
    _write_json(partial / "config.json", config_to_hf(model.config) | end | dtype)
    sync_folder(partial)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)
    partial.rmdir()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.cpu().contiguous()
        filled += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_config(folder: Path) -> GPTConfig:
    """The shape of the model in `folder`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return config_from_hf(values, str(path))


def read_model_folder(folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> GPT:
    """The model in `folder`, its parameters of `dtype` on `device`. UserError if a tensor is missing or misshapen."""
    config = read_config(folder)
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for theirs in tensors.keys():  # noqa: SIM118 - a safetensors file is no dict
                    for name, tensor in tensors_from_hf(config, theirs, tensors.get_tensor(theirs)):
                        if expected.get(name) != tensor.shape:
                            wanted = f"{tuple(expected[name])}" if name in expected else "no such tensor"
                            raise UserError(f"{file}: {theirs} has shape {tuple(tensor.shape)}, the model {wanted}")
                        state[name] = tensor.to(device, dtype)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: {error}") from None
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(f"{folder} lacks {len(missing)} tensors of the model, the first {missing[0]}")
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing (weights are read from safetensors alone)")
    return files
