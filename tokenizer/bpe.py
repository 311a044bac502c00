"""Byte-level BPE: encode, decode, read and write Hugging Face's tokenizer.json.

A tokenizer is the content of its tokenizer.json and nothing else; whoever made the file, it is kept as it came.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import regex

from cli import UserError

from .base import Tokenizer, write_json
from .bpe_training import byte_alphabet
from .tokenizer_json import checked_model, merge_pairs, normalizer, split_steps, vocabulary_bytes

LONG_CHUNK = 128  # symbols: beyond, a queue of pairs beats looking at all of them after each merge
MAX_CACHED = 1_000_000  # chunks


class ByteLevelBPE(Tokenizer):
    """Byte-level BPE (Radford et al. 2019) from `spec`, a parsed tokenizer.json, and `config`, tokenizer_config.json.

    Raises UserError for a spec that is not byte-level BPE or that uses what this reader does not know.
    """

    def __init__(self, spec: dict, config: dict):
        model = checked_model(spec)
        vocab = model["vocab"]
        added = {token["id"]: token for token in spec.get("added_tokens") or []}
        pieces = {vocab[token]: data for token, data in vocabulary_bytes(vocab).items()}
        pieces |= {id: token["content"].encode() for id, token in added.items()}
        super().__init__(pieces, {token["content"]: id for id, token in added.items() if token["special"]}, config)
        self._spec = spec
        self._normalize = normalizer(spec.get("normalizer"))
        self._split_steps = split_steps(spec.get("pre_tokenizer"))
        self._added = {allow: AddedTokens(added, self._normalize, allow) for allow in (False, True)}
        self._chunks = ChunkEncoder(vocab, merge_pairs(model["merges"]), bool(model.get("ignore_merges")))

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        symbols = []
        for id, part in self._added[allow_special].split(text):
            symbols.append(chr(id) if part is None else self._encode_plain(part))
        return np.frombuffer("".join(symbols).encode("utf-32-le", "surrogatepass"), "<u4")

    def _encode_plain(self, text: str) -> str:
        """The symbols of a text without added tokens."""
        chunks = [text]
        for step in self._split_steps:
            chunks = step(chunks)
        return "".join(map(self._chunks.__getitem__, chunks))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", self._spec)
        write_json(folder / "tokenizer_config.json", self.config)

    def fingerprint(self) -> str:
        spec = {key: self._spec.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")}
        model = self._spec["model"]
        spec |= {"vocab": model["vocab"], "merges": merge_pairs(model["merges"])}
        spec |= {"ignore_merges": bool(model.get("ignore_merges"))}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


class ChunkEncoder(dict):
    """A cache from a chunk of text to its symbols; a chunk not met before is encoded.

    A symbol is the character chr(id), so that a chunk is a `str`, a merge is `str.replace`, and UTF-32 is the ids.
    """

    def __init__(self, vocab: dict[str, int], merges: list[list[str]], ignore_merges: bool):
        """`ignore_merges`: a chunk that is itself a token becomes that token, whatever the merges say (Llama 3)."""
        self._byte_symbols = {byte: symbol_of(vocab, token) for byte, token in byte_alphabet().items()}
        self._merges = [(left, right, left + right) for left, right in merges]
        try:
            self._merges = [tuple(chr(vocab[token]) for token in merge) for merge in self._merges]
        except KeyError as error:
            raise UserError(f"a merge makes or takes {error.args[0]!r}, which is not in the vocabulary") from None
        # ranks count from 1, so that 0 and None both mean that no merge is left
        self._ranks = {left + right: rank for rank, (left, right, _) in enumerate(self._merges, start=1)}
        self._whole = (
            {data: chr(vocab[token]) for token, data in vocabulary_bytes(vocab).items()} if ignore_merges else {}
        )

    def __missing__(self, chunk: str) -> str:
        data = chunk.encode()
        symbols = self._whole.get(data) or data.decode("latin-1").translate(self._byte_symbols)
        symbols = self._merge_long(symbols) if len(symbols) > LONG_CHUNK else self._merge(symbols)
        if len(chunk) <= LONG_CHUNK:
            if len(self) >= MAX_CACHED:
                self.clear()
            self[chunk] = symbols
        return symbols

    def _merge(self, symbols: str) -> str:
        """Merge the pair of lowest rank, the leftmost of equals, until no pair has a rank."""
        rank_of = self._ranks.get
        while rank := min(filter(None, map(rank_of, map(str.__add__, symbols, symbols[1:]))), default=0):
            left, right, merged = self._merges[rank - 1]
            symbols = symbols.replace(left + right, merged, 1)
        return symbols

    def _merge_long(self, symbols: str) -> str:
        """What `_merge` returns, in n log n time: a queue of (rank, position) over a linked list of symbols."""
        line = list(symbols)
        following = list(range(1, len(line) + 1))
        previous = list(range(-1, len(line) - 1))
        rank_of = self._ranks.get
        queue = [(rank, at) for at, pair in enumerate(map(str.__add__, line, line[1:])) if (rank := rank_of(pair))]
        heapq.heapify(queue)
        while queue:
            rank, at = heapq.heappop(queue)
            left, right, merged = self._merges[rank - 1]
            other = following[at]
            if line[at] != left or other == len(line) or line[other] != right:
                continue  # a merge since has taken one of the two
            line[at], line[other] = merged, ""
            beyond = following[at] = following[other]
            if beyond < len(line):
                previous[beyond] = at
                if rank := rank_of(merged + line[beyond]):
                    heapq.heappush(queue, (rank, at))
            if (before := previous[at]) >= 0 and (rank := rank_of(line[before] + merged)):
                heapq.heappush(queue, (rank, before))
        return "".join(line)


class AddedTokens:
    """Finds added tokens in text: those that are no special tokens always, special ones where allowed.

    As in Hugging Face's files: `lstrip` and `rstrip` tokens swallow the whitespace beside them; tokens that are
    `normalized` are sought, themselves normalised, in the normalised text, after the others.
    """

    def __init__(self, added: dict[int, dict], normalize: Callable[[str], str], allow_special: bool):
        wanted = [token for token in added.values() if allow_special or not token["special"]]
        self._normalize = normalize
        self._raw = TokenFinder({token["content"]: token for token in wanted if not token.get("normalized")})
        self._normalized = TokenFinder(
            {normalize(token["content"]): token for token in wanted if token.get("normalized")}
        )

    def split(self, text: str) -> Iterable[tuple[int, str | None]]:
        """(id, None) for each added token and (-1, text) for each normalised stretch between them."""
        for id, part in self._raw.split(text):
            if part is None:
                yield id, None
            else:
                yield from self._normalized.split(self._normalize(part))


class TokenFinder:
    """Splits text at the leftmost, longest occurrences of some added tokens."""

    def __init__(self, tokens: dict[str, dict]):
        """`tokens`: entries of tokenizer.json's added_tokens, by the string to look for."""
        self._tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = regex.compile("|".join(map(regex.escape, longest_first))) if tokens else None

    def split(self, text: str) -> Iterable[tuple[int, str | None]]:
        """(id, None) for each token found and (-1, text) for each stretch between them that is not empty."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() < end:
                continue  # inside whitespace that the token before has swallowed
            token = self._tokens[match.group()]
            between = text[end : match.start()]
            between = between.rstrip() if token.get("lstrip") else between
            if between:
                yield -1, between
            yield token["id"], None
            end = match.end()
            if token.get("rstrip"):
                end = len(text) - len(text[end:].lstrip())
        if end < len(text):
            yield -1, text[end:]


def symbol_of(vocab: dict[str, int], token: str) -> str | None:
    """The symbol of a single byte's token. Some vocabularies lack bytes; Hugging Face drops those, and so do we."""
    return chr(vocab[token]) if token in vocab else None
