"""SentencePiece (Kudo & Richardson 2018): BPE or unigram over characters, with bytes for the rarest."""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from cli import UserError

from .base import Tokenizer, write_json
from .tokenizer_json import added_token

SPACE = "▁"  # U+2581 stands for a space inside pieces


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model behind the face of `Tokenizer`.

    model: the bytes of tokenizer.model. config: tokenizer_config.json. spec: the tokenizer.json of the same model, for
    other programs' use, or None; it is kept as it came.

    Models trained here are lossless: neither normalisation nor a space put before the text, and U+2581 itself, which
    sentencepiece would turn into a space, is written as bytes. Models of others keep their habits. Raises ValueError
    for bytes that are no model.
    """

    def __init__(self, model: bytes, config: dict, spec: dict | None = None):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("not a sentencepiece model") from None
        self._model = model
        self._spec = spec
        sp = self._processor
        ids = range(sp.vocab_size())
        special = {sp.id_to_piece(id): id for id in ids if sp.is_control(id) or sp.is_unknown(id)}
        pieces = {id: piece_bytes(sp, id) for id in ids}
        super().__init__(pieces, special, config, adds_space=sp.normalize("a").startswith(SPACE))
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_pattern = re.compile(f"({names})")

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        parts = self._special_pattern.split(text) if allow_special else [text]
        ids = []
        for number, part in enumerate(parts):  # each odd part is a special token, captured by the pattern
            ids += [self.special_tokens[part]] if number % 2 else self._encode_plain(part)
        return np.array(ids, np.uint32)

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        ids = []
        for number, part in enumerate([text] if self._adds_space else text.split(SPACE)):
            ids += (space if number else []) + self._processor.encode(part.encode())
        return ids

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self._spec is not None:
            write_json(folder / "tokenizer.json", self._spec)
        write_json(folder / "tokenizer_config.json", self.config)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()


def piece_bytes(processor: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    """The bytes that the piece `id` writes."""
    name = processor.id_to_piece(id)
    if processor.is_byte(id):
        return bytes([int(name[3:5], 16)])
    if processor.is_control(id) or processor.is_unknown(id):
        return name.encode()
    return name.replace(SPACE, " ").encode()


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, algorithm: str, special_tokens: list[str], processes: int
) -> bytes:
    """A sentencepiece model ("bpe" or "unigram") of `vocab_size` pieces trained on the lines of `documents`.

    Of the pieces one is <unk>, 256 are bytes, and `special_tokens` are control pieces, which no text produces. Raises
    UserError for a vocabulary too small for the characters of the text, or larger than the text gives.
    """
    model = io.BytesIO()
    lines = (line for text in documents for line in text.splitlines(keepends=True))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=algorithm,
            vocab_size=vocab_size,
            control_symbols=special_tokens,
            byte_fallback=True,
            character_coverage=0.9995,  # of the characters met; the rarest are left to bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=processes,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--vocab-size {vocab_size}: {str(error).split('] ')[-1]}") from None
    return model.getvalue()


def sentencepiece_spec(model: bytes, algorithm: str) -> dict:
    """The tokenizer.json of a model made by `train_sentencepiece`, so that Hugging Face encodes like it.

    Of all text only U+2581 is encoded otherwise there: as a space.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    scores = {sp.id_to_piece(id): sp.get_score(id) for id in range(sp.vocab_size())}
    model_spec = {"unk_id": 0, "vocab": list(scores.items())} if algorithm == "unigram" else bpe_model(scores)
    special = [id for id in range(sp.vocab_size()) if sp.is_control(id) or sp.is_unknown(id)]
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "added_tokens": [added_token(id, sp.id_to_piece(id)) for id in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]},
        "model": {"type": "Unigram" if algorithm == "unigram" else "BPE", "byte_fallback": True} | model_spec,
    }


def bpe_model(scores: dict[str, float]) -> dict:
    """Vocabulary and merges for Hugging Face's BPE: all ways to halve a piece into pieces, the best piece first."""
    vocab = {piece: id for id, piece in enumerate(scores)}
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], vocab[piece])):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [half for half in halves if half[0] in vocab and half[1] in vocab]
        merges += sorted(halves, key=lambda half: (vocab[half[0]], vocab[half[1]]))
    return {"unk_token": "<unk>", "vocab": vocab, "merges": merges}
