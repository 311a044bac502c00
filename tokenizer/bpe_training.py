"""Byte-pair encoding, the training: from documents to a list of merges.

Text is cut into chunks by a splitting pattern, and no merge crosses a chunk's end. The chunks are counted; then, from
single bytes, the most frequent pair of neighbouring symbols becomes a new symbol, again and again (Gage 1994; Sennrich
et al. 2016, "Neural machine translation of rare words with subword units"; on bytes, Radford et al. 2019).

A symbol is written as one character, chr(id), so that a chunk is a `str` and `str.replace` merges at the speed of C.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import islice

import regex
from tqdm import tqdm

from .processes import over_processes

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (  # cl100k_base: case-blind contractions, at most three digits, line ends kept with what they end
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}

LONG_TEXT = 1 << 20  # characters: beyond, chunks are made one by one, for a list of them would fill the memory


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in vocabulary files, in the order of GPT-2's ids.

    Printable bytes of Latin-1 stand for themselves and come first; the others are U+0100 and on (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Splitter:
    """Cuts text into the matches of a pattern."""

    def __init__(self, pattern: str):
        self._pattern = regex.compile(pattern)
        self._ascii_pattern = ascii_pattern(pattern) or self._pattern

    def split(self, text: str) -> Iterable[str]:
        """The chunks of `text`, in order."""
        pattern = self._ascii_pattern if text.isascii() else self._pattern
        if len(text) < LONG_TEXT:
            return pattern.findall(text)
        return (match.group() for match in pattern.finditer(text))


def ascii_pattern(pattern: str) -> re.Pattern | None:
    """`pattern` as it acts on ASCII text, for the module re, which is twice as fast as regex but knows no \\p{L}.

    Each property becomes the list of its ASCII members. None where re does not take the pattern.
    """
    parts, in_class = [], False
    for part in re.findall(r"\\[pP]\{\^?\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith((r"\p{", r"\P{")):
            members = re.escape("".join(regex.findall(part, "".join(map(chr, range(128)))))) or r"\x80"
            part = members if in_class else f"[{members}]"
        in_class = part == "[" or (in_class and part != "]")
        parts.append(part)
    try:
        return re.compile("".join(parts), re.ASCII)
    except re.error:
        return None


def count_chunks(documents: Iterable[str], pattern: str, max_chunk: int, processes: int = 1) -> Counter[str]:
    """How often each chunk occurs in all documents. A chunk of more than `max_chunk` characters counts as its pieces.

    Process k of n takes documents k, k + n, ...: `documents` must be iterable more than once.
    """
    counts, *others = over_processes(partial(count_share, documents, pattern, processes), processes)
    for other in others:
        counts.update(other)
    for chunk in [chunk for chunk in counts if len(chunk) > max_chunk]:
        times = counts.pop(chunk)
        for start in range(0, len(chunk), max_chunk):
            counts[chunk[start : start + max_chunk]] += times
    return counts


def count_share(documents: Iterable[str], pattern: str, processes: int, part: int) -> Counter[str]:
    """The chunk counts of documents part, part + processes, ..."""
    splitter = Splitter(pattern)
    counts = Counter()
    share = islice(documents, part, None, processes)
    for text in tqdm(
        share, desc="count", unit=" documents", leave=False, mininterval=0.5, disable=True if part else None
    ):
        counts.update(splitter.split(text))
    return counts


def train_merges(chunk_counts: dict[str, int], size: int, min_count: int = 2) -> list[tuple[bytes, bytes]]:
    """The first `size` merges, each a pair of tokens and in their order; each makes one token that was not there.

    The next merge is the pair with the greatest count, and among equals the smallest pair of ids (bytes first, in
    GPT-2's order, then tokens by age): a pure function of the counts, whatever order they came in. The count of a pair
    is the number of places it stands in, overlapping ones too. Fewer merges return when no pair is left that occurs
    `min_count` times.
    """
    tokens = [bytes([byte]) for byte in byte_alphabet()]
    symbols = {byte: chr(id) for id, byte in enumerate(byte_alphabet())}
    words = [chunk.encode().decode("latin-1").translate(symbols) for chunk in chunk_counts]
    weights = list(chunk_counts.values())
    pair_counts, places = count_pairs(words, weights)
    queue = [(-count, pair) for pair, count in pair_counts.items()]  # a count here may have fallen since
    heapq.heapify(queue)
    merges = []
    progress = tqdm(total=size, desc="merges", unit="", leave=False, mininterval=0.5, disable=None)
    while queue and len(merges) < size:
        count, pair = heapq.heappop(queue)
        if -count != pair_counts[pair]:
            heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        if -count < min_count:
            break
        for born in merge_pair(pair, chr(len(tokens)), words, weights, pair_counts, places):
            heapq.heappush(queue, (-pair_counts[born], born))
        merges.append((tokens[ord(pair[0])], tokens[ord(pair[1])]))
        tokens.append(b"".join(merges[-1]))
        progress.update()
    progress.close()
    return merges


def count_pairs(words: list[str], weights: list[int]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The count of every pair of neighbours, and the words (by index) it stands in."""
    pair_counts, places = defaultdict(int), defaultdict(list)
    for index, (word, weight) in enumerate(zip(words, weights, strict=True)):
        for pair in map(str.__add__, word, word[1:]):
            pair_counts[pair] += weight
            places[pair].append(index)
    return pair_counts, places


def merge_pair(
    pair: str, symbol: str, words: list[str], weights: list[int], pair_counts: dict[str, int], places: dict[str, list]
) -> set[str]:
    """Put `symbol` for `pair` in every word, from left to right; bring counts and places up to date in place.

    Returns the pairs born, all of which hold `symbol`: of other pairs no count ever grows.
    """
    before, after = defaultdict(list), defaultdict(list)  # words by the neighbour to the left and to the right
    born = set()
    for index in places.pop(pair):
        word = words[index]
        words[index] = merged = word.replace(pair, symbol)
        if len(merged) == len(word) - 1:  # one occurrence, as nearly always: only its two neighbours matter
            at = word.find(pair)
            if at > 0:
                before[word[at - 1]].append(index)
            if at + 2 < len(word):
                after[word[at + 2]].append(index)
        elif len(merged) < len(word):  # equal lengths: a merge since has taken one of the two
            born |= recount_word(word, merged, symbol, index, weights[index], pair_counts, places)
    moves = [(x + pair[0], x + symbol, where) for x, where in before.items()]
    moves += [(pair[1] + x, symbol + x, where) for x, where in after.items()]
    for old, new, where in moves:
        count = sum(map(weights.__getitem__, where))
        pair_counts[old] -= count
        pair_counts[new] += count
        places[new] += where
        born.add(new)
    del pair_counts[pair]
    return born


def recount_word(
    old: str, new: str, symbol: str, index: int, weight: int, pair_counts: dict[str, int], places: dict[str, list]
) -> set[str]:
    """The slow, general way for a word that held the pair more than once. Returns the pairs that hold `symbol`."""
    for pair in map(str.__add__, old, old[1:]):
        pair_counts[pair] -= weight
    for pair in map(str.__add__, new, new[1:]):
        pair_counts[pair] += weight
    born = {pair for pair in map(str.__add__, new, new[1:]) if symbol in pair}
    for pair in born:
        places[pair].append(index)
    return born
