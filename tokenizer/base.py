"""What every tokenizer here can do, whatever finds its tokens."""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError

from .processes import over_processes


class Tokenizer(ABC):
    """Text to ids and back.

    special_tokens: the ids of tokens that steer a model and that no user's text may produce.
    vocab_size: the number of ids, the largest id plus one.
    """

    def __init__(
        self, pieces: dict[int, bytes], special_tokens: dict[str, int], config: dict, adds_space: bool = False
    ):
        """`pieces`: the bytes each id writes. `config`: tokenizer_config.json, whose eos_token may end documents.
        `adds_space`: encoding puts a space before each text, which decoding takes away.
        """
        self.special_tokens = special_tokens
        self.vocab_size = max(pieces) + 1
        self.config = config
        self._pieces = pieces
        self._adds_space = adds_space

    @abstractmethod
    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        """The uint32 ids of one text."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, as Hugging Face names them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 over everything that decides ids: equal fingerprints encode every text alike."""

    @property
    def end_of_text(self) -> int:
        """The id that ends a document: <|endoftext|>, or the family's own. UserError if there is none."""
        configured = self.config.get("eos_token")
        configured = configured.get("content") if isinstance(configured, dict) else configured
        for token in ("<|endoftext|>", "<|end_of_text|>", configured, "</s>"):
            if token in self.special_tokens:
                return self.special_tokens[token]
        raise UserError("the tokenizer has no end-of-text token: it needs a special token <|endoftext|>")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`. A special token's string inside it is ordinary text unless `allow_special`.

        Raises ValueError where `text` holds a lone surrogate (U+D800 to U+DFFF): it is no Unicode text, and no bytes
        could stand for it that decode back.
        """
        return self.encode_array(text, allow_special).tolist()

    def encode_array(self, text: str, allow_special: bool = False) -> np.ndarray:
        """As `encode`, in a uint32 array."""
        try:
            return self._encode(text, allow_special)
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ValueError(f"the text holds a lone surrogate, U+{code:04X}: no UTF-8 can stand for it") from None

    def encode_batch(self, texts: Sequence[str], processes: int = 1) -> list[np.ndarray]:
        """The ids of each text as a uint32 array, special tokens' strings being text; large batches repay processes."""
        processes = max(1, min(processes, len(texts)))
        shares = over_processes(partial(self._encode_share, texts, processes), processes)
        arrays = [None] * len(texts)
        for part, (ids, lengths) in enumerate(shares):
            arrays[part::processes] = np.split(ids, np.cumsum(lengths)[:-1]) if lengths else []
        return arrays

    def _encode_share(self, texts: Sequence[str], processes: int, part: int) -> tuple[np.ndarray, list[int]]:
        """The ids of texts part, part + processes, ... in one array, which travels cheaply, and each text's length."""
        arrays = [self.encode_array(text) for text in texts[part::processes]]
        return np.concatenate([np.empty(0, np.uint32), *arrays]), [len(array) for array in arrays]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes the ids write, special tokens as their names. ValueError for an id outside the vocabulary."""
        data = self._join(ids)
        return data.removeprefix(b" ") if self._adds_space else data

    def _join(self, ids: Iterable[int]) -> bytes:
        """The bytes of all pieces."""
        try:
            return b"".join(map(self._pieces.__getitem__, ids))
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is outside the vocabulary of {self.vocab_size} ids") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises ValueError as `decode_bytes` does."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def token_bytes(self) -> list[bytes]:
        """The bytes of text each id stands for; b"" for special tokens and for ids that no token has."""
        special = set(self.special_tokens.values())
        return [b"" if id in special else self._pieces.get(id, b"") for id in range(self.vocab_size)]


class StreamDecoder:
    """Decodes ids as they come: what `push` and `flush` return, joined, is `decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._begun = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes, perhaps none. Raises ValueError for an id outside the vocabulary."""
        decode = self._tokenizer._join if self._begun else self._tokenizer.decode_bytes
        self._begun = True
        return self._utf8.decode(decode([id]))

    def flush(self) -> str:
        """U+FFFD for a character that never came whole, or the empty string."""
        return self._utf8.decode(b"", final=True)


def write_json(path: Path, value: dict) -> None:
    """Write `value` as readable JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
