"""Tokenizers: byte-level BPE from scratch, and sentencepiece behind the same face."""

import json
from pathlib import Path

import regex

from cli import UserError

from .base import StreamDecoder, Tokenizer
from .bpe import ByteLevelBPE
from .chat import CHATML_TEMPLATE, Segment, encode_chat, render_chat
from .sentencepiece_tokenizer import SentencePieceTokenizer
from .tokenizer_json import gpt2_spec

__all__ = [
    "CHATML_TEMPLATE",
    "ByteLevelBPE",
    "Segment",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "load_tokenizer",
    "render_chat",
]


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer in `folder`: tokenizer.model (sentencepiece), tokenizer.json, or vocab.json with merges.txt.

    Raises UserError where there is none, or its files are damaged or of a kind not read here.
    """
    folder = Path(folder)
    config = read_config(folder)
    spec = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
    if (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        build = lambda: SentencePieceTokenizer(path.read_bytes(), config, spec)
    elif spec is not None:
        path = folder / "tokenizer.json"
        build = lambda: ByteLevelBPE(spec, config)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        path = folder / "vocab.json"
        build = lambda: ByteLevelBPE(gpt2_spec(read_json(path), folder / "merges.txt"), config)
    else:
        raise UserError(
            f"{folder} holds no tokenizer: no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model"
        )
    try:
        return build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, regex.error) as error:
        raise UserError(f"{path}: damaged, or no tokenizer ({type(error).__name__}: {error})") from None


def read_config(folder: Path) -> dict:
    """tokenizer_config.json, with the chat template that newer folders keep in a file of its own; {} if neither."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config | ({"chat_template": template.read_text(encoding="utf-8")} if template.exists() else {})


def read_json(path: Path) -> dict:
    """The JSON in `path`. Raises UserError for anything else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
