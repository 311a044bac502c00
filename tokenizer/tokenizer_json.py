"""Hugging Face's tokenizer.json, as far as byte-level BPE uses it: read into functions, and written."""

import json
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path

from cli import UserError

from .bpe_training import GPT2_PATTERN, Splitter, byte_alphabet

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def checked_model(spec: dict) -> dict:
    """The "model" of a tokenizer.json. Raises UserError unless it is BPE of a kind that this file encodes."""
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise UserError("its model is not BPE with a vocabulary and merges")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise UserError(f"its model sets {option}, which byte-level BPE does not use")
    for token in spec.get("added_tokens") or []:
        if token.get("single_word"):
            raise UserError(f"its added token {token['content']!r} asks for single_word, which is not read here")
    return model


def merge_pairs(merges: list) -> list[list[str]]:
    """Merges as pairs: old files write them "a b", newer ones ["a", "b"]."""
    return [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]


def vocabulary_bytes(vocab: Iterable[str]) -> dict[str, bytes]:
    """The bytes of each token; one that is not written in the byte alphabet stands for its own text."""
    byte_of = {symbol: byte for byte, symbol in byte_alphabet().items()}
    return {t: bytes(map(byte_of.get, t)) if byte_of.keys() >= set(t) else t.encode() for t in vocab}


def flat_steps(spec: dict | None, inner: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, a Sequence of them laid flat. `inner` names the Sequence's list."""
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [step for part in spec[inner] for step in flat_steps(part, inner)]
    return [spec]


def normalizer(spec: dict | None) -> Callable[[str], str]:
    """The normalizer of a tokenizer.json as a function of text. Raises UserError for a type other than NFC, NFD, ..."""
    forms = [step["type"] for step in flat_steps(spec, "normalizers")]
    for form in forms:
        if form not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise UserError(f"its normalizer {form} is not read here: NFC, NFD, NFKC, NFKD are")
    return partial(normalize, forms)


def normalize(forms: list[str], text: str) -> str:
    """`text` in each Unicode normalization form in turn."""
    for form in forms:
        text = unicodedata.normalize(form, text)
    return text


def split_steps(spec: dict | None) -> list[Callable[[Iterable[str]], Iterable[str]]]:
    """The pre-tokenizer of a tokenizer.json as functions from chunks to smaller chunks. UserError if not byte-level."""
    steps, byte_level = [], False
    for step in flat_steps(spec, "pretokenizers"):
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                steps.append(partial(split_chunks, covering(pattern)))
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
                steps.append(partial(split_chunks, Splitter(pattern)))
            case {"type": "Digits", "individual_digits": individual}:
                steps.append(partial(split_chunks, covering(r"\p{N}" if individual else r"\p{N}+")))
            case {"type": "ByteLevel"}:
                byte_level = True
                if step.get("add_prefix_space", True):
                    steps.append(partial(map, prefix_space))
                if step.get("use_regex", True):
                    steps.append(partial(split_chunks, covering(GPT2_PATTERN)))
            case _:
                raise UserError(f"its pre-tokenizer step {json.dumps(step)} is not read here")
    if not byte_level:
        raise UserError("its pre-tokenizer is not byte-level")
    return steps


def covering(pattern: str) -> Splitter:
    """`pattern` made to cover any text: where it does not match, all up to its next match is one chunk."""
    return Splitter(rf"{pattern}|(?s:(?:(?!{pattern}).)+)")


def split_chunks(splitter: Splitter, chunks: Iterable[str]) -> Iterable[str]:
    """Every chunk cut by `splitter`."""
    return chain.from_iterable(map(splitter.split, chunks))


def prefix_space(chunk: str) -> str:
    """A chunk that begins with a space."""
    return chunk if chunk.startswith(" ") else " " + chunk


def trained_spec(merges: list[tuple[bytes, bytes]], pattern: str, special_tokens: list[str]) -> dict:
    """The tokenizer.json of trained `merges` (see `train_merges`): bytes first, then merges, then special tokens."""
    alphabet = byte_alphabet()
    named = [["".join(alphabet[byte] for byte in token) for token in merge] for merge in merges]
    tokens = [*alphabet.values(), *("".join(merge) for merge in named)]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}
    special = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
    return bpe_spec({token: id for id, token in enumerate(tokens)}, named, steps, special)


def gpt2_spec(vocab: dict[str, int], merges: Path) -> dict:
    """The tokenizer.json of GPT-2's pair of files: a parsed vocab.json, and the path of merges.txt."""
    lines = merges.read_text(encoding="utf-8").split("\n")
    named = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = {token: id for token, id in vocab.items() if token == "<|endoftext|>"}
    return bpe_spec(vocab, named, BYTE_LEVEL, special)


def bpe_spec(vocab: dict[str, int], merges: list[list[str]], pre_tokenizer: dict, special: dict[str, int]) -> dict:
    """A whole tokenizer.json of byte-level BPE."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(id, token) for token, id in special.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model | {"vocab": vocab, "merges": merges},
    }


def added_token(id: int, content: str) -> dict:
    """A special token as tokenizer.json lists it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags}
