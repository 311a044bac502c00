"""Byte-level BPE against the `tokenizers` library: same ids for every text, in both directions of reading."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from cli import UserError
from tokenizer import ByteLevelBPE, load_tokenizer
from tokenizer.bpe_training import GPT2_PATTERN, GPT4_PATTERN, Splitter, count_chunks, train_merges
from tokenizer.tokenizer_json import trained_spec

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTER_OR_NUMBER = regex.compile(r"[\p{L}\p{N}]")
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def stdlib_texts():
    """Some real text that is always there."""
    folder = Path(json.__file__).parents[1]
    names = ("argparse.py", "typing.py", "heapq.py", "html/entities.py", "test/test_unicodedata.py", "this.py")
    return [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).exists()]


@pytest.fixture(scope="module")
def texts():
    return stdlib_texts()


@pytest.fixture(scope="module")
def ours(texts):
    counts = count_chunks(texts, GPT4_PATTERN, 256)
    return ByteLevelBPE(trained_spec(train_merges(counts, 1200), GPT4_PATTERN, SPECIAL), {})


@pytest.fixture(scope="module")
def theirs(ours):
    return as_theirs(ours)


def as_theirs(tokenizer):
    """The same tokenizer.json in the tokenizers library, with special tokens' strings as text."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._spec))
    theirs.encode_special_tokens = True
    return theirs


def random_strings(count, seed=0):
    """Strings of all planes, mixed with what tokenizers trip over."""
    rng = random.Random(seed)
    awkward = [*" \t\n\r\x0b\x0c\x00\x1c\x1f\x7f\x85\xa0\u1680\u2003\u2028\u3000\ufeff\u200b\u200d\u0301\u0345\ufffd'’"]
    awkward += [
        "'s",
        "'LL",
        "'ſ",
        "'Re",
        "  ",
        "\r\n",
        "\n\n",
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "한",
        "ก็",
        "١٢٣",
        "Ⅷ",
        "½",
        "ſ",
        "K",
        "İ",
    ]
    awkward += [*SPECIAL, "<|", "▁", "Ġ", "中文", "hello", " World", "12345", "==>", "a" * 50, "_x"]
    draws = (
        lambda: rng.choice(awkward),
        lambda: chr(rng.randrange(32, 127)),
        lambda: chr(rng.randrange(0x0, 0x3000)),
        lambda: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
    )
    strings = ["".join(rng.choice(draws)() for _ in range(rng.randrange(0, 40))) for _ in range(count)]
    return ["".join("?" if is_recent(character) else character for character in text) for text in strings]


def is_recent(character):
    """A letter or number to regex, yet unassigned to Python: libraries of different Unicode versions disagree on it."""
    return unicodedata.category(character) == "Cn" and LETTER_OR_NUMBER.match(character)


def assert_alike(ours, theirs, strings):
    expected = [encoding.ids for encoding in theirs.encode_batch(strings, add_special_tokens=False)]
    got = ours.encode_batch(strings)
    for text, ids, reference in zip(strings, got, expected, strict=True):
        assert ids.tolist() == reference, repr(text)
    return got


def test_our_file_encodes_alike_in_tokenizers_on_ten_thousand_strings(ours, theirs):
    strings = random_strings(10_000)
    for text, ids in zip(strings, assert_alike(ours, theirs, strings), strict=True):
        assert ours.decode(ids.tolist()) == text


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN, QWEN_PATTERN])
def test_splits_alike_with_and_without_the_ascii_shortcut(pattern):
    splitter, plain = Splitter(pattern), regex.compile(pattern)
    for text in [*stdlib_texts(), *random_strings(2000, seed=1)]:
        text = text.encode("ascii", "ignore").decode()
        assert list(splitter.split(text)) == plain.findall(text)


def test_real_text_encodes_alike(ours, theirs, texts):
    assert_alike(ours, theirs, texts)


@pytest.mark.parametrize("name", ["london", "shakespeare"])
def test_shared_text_encodes_alike(name, ours, theirs):
    if not (SHARED / name).exists():
        pytest.skip("../shared/data is absent")
    files = [path for path in sorted((SHARED / name).iterdir()) if path.suffix in (".txt", ".html")]
    assert_alike(ours, theirs, [path.read_bytes()[:300_000].decode("utf-8", "ignore") for path in files])


# --- files of others ---------------------------------------------------------------------------------------------


def isolated(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def bytes_only():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


FAMILIES = {
    "gpt2": dict(pre=lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": dict(pre=lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": dict(pre=lambda: sequence(isolated(GPT4_PATTERN), bytes_only()), ignore_merges=True),
    "qwen": dict(pre=lambda: sequence(isolated(QWEN_PATTERN), bytes_only()), normalizer=normalizers.NFC()),
    "smollm2": dict(
        pre=lambda: sequence(pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    ),
    "deepseek": dict(
        pre=lambda: sequence(
            isolated(r"\p{N}{1,3}"), isolated(r"[一-龥぀-ゟ゠-ヿ]+"), isolated(GPT2_PATTERN), bytes_only()
        )
    ),
    "kept matches": dict(
        pre=lambda: sequence(pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "removed", invert=True), bytes_only())
    ),
    "gaps": dict(pre=lambda: sequence(isolated(r"[aeiou]+|\d"), bytes_only())),
}


def trained_by_tokenizers(texts, family):
    """A tokenizer trained and configured in the tokenizers library, as a family of models has it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=family.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = family["pre"]()
    if "normalizer" in family:
        tokenizer.normalizer = family["normalizer"]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL[:1], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=True)])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<cut>", rstrip=True), "e\u0301"])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("merges", ["lists", "strings"])
def test_reads_files_of_tokenizers(name, merges, texts, tmp_path):
    theirs = trained_by_tokenizers(texts, FAMILIES[name])
    theirs.save(str(tmp_path / "tokenizer.json"))
    if merges == "strings":
        rewrite(tmp_path / "tokenizer.json", lambda spec: spec["model"].update(merges=spaced(spec["model"]["merges"])))
    ours = load_tokenizer(tmp_path)
    awkward = [
        "a  <mask>  b<cut> \n c <mask>",
        "<think>x</think>",
        "        x",
        "e\u0301<|endoftext|><think><mask> <mask>",
    ]
    strings = random_strings(500, seed=2) + texts + awkward
    assert_alike(ours, theirs, strings)
    theirs.encode_special_tokens = False
    for text in strings[:100] + awkward:
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_whitespace_swallowed_by_a_token_is_gone(texts):
    """Where the tokenizers library finds a token inside whitespace that rstrip took, and so encodes it twice."""
    ours = ByteLevelBPE(json.loads(trained_by_tokenizers(texts, FAMILIES["gpt2"]).to_str()), {})
    assert ours.decode(ours.encode("a<cut>        b    <mask>c")) == "a<cut>b    <mask>c"


def rewrite(path, change):
    """Apply `change` to the JSON in a file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def spaced(merges):
    return [" ".join(merge) for merge in merges]


def test_reads_gpt2_as_tokenizers_does():
    if not (SHARED / "gpt2").exists():
        pytest.skip("../shared/data is absent")
    ours = load_tokenizer(SHARED / "gpt2")
    files = [str(SHARED / "gpt2" / name) for name in ("vocab.json", "merges.txt")]
    theirs = tokenizers.Tokenizer(models.BPE.from_file(*files))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert_alike(ours, theirs, random_strings(2000, seed=3) + stdlib_texts())
    assert ours.encode("Hello world") == [15496, 995]
    assert (ours.vocab_size, ours.end_of_text) == (50257, 50256)


def test_ranks_out_of_order_merge_one_by_one_as_in_tokenizers():
    """A merge may outrank the one that makes its part, as in files converted from tiktoken: then turn matters."""
    letters = {"a": 0, "b": 1, "c": 2, "ab": 3, "aba": 4, "abab": 5}
    merges = [["ab", "a"], ["ab", "ab"], ["a", "b"]]
    theirs = tokenizers.Tokenizer(models.BPE(letters, [tuple(merge) for merge in merges]))
    theirs.pre_tokenizer = bytes_only()
    ours = ByteLevelBPE(json.loads(theirs.to_str()), {})
    for text in ["abab", "ababab", "abcab" * 60, "ab" * 100, "abac" * 80]:
        assert ours.encode(text) == theirs.encode(text).ids


def test_long_chunks_merge_like_short_ones(ours, theirs):
    rng = random.Random(4)
    strings = ["".join(rng.choices("etaoin shrdlu"[:size], k=3000)) for size in (1, 2, 5, 6)] + ["é" * 1000]
    assert_alike(ours, theirs, strings)
    for text in strings:
        symbols = text[:1000].encode().decode("latin-1").translate(ours._chunks._byte_symbols)
        assert ours._chunks._merge(symbols) == ours._chunks._merge_long(symbols)


def test_a_megabyte_without_a_space_encodes_in_seconds(ours):
    text = "abcdefghij" * 100_000
    assert ours.decode(ours.encode(text)) == text


# --- round trips, ids, special tokens --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(ours, text):
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, allow_special=True)) == text
    assert b"".join(ours.token_bytes()[id] for id in ours.encode(text)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1458)))
def test_stream_of_any_ids_joins_to_their_decoding(ours, ids):
    stream = ours.stream_decoder()
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) + stream.flush() == ours.decode(ids)


def test_stream_gives_only_whole_characters(ours):
    stream = ours.stream_decoder()
    face = ours.encode("😀")
    assert len(face) == 4
    assert [stream.push(id) for id in face] == ["", "", "", "😀"]
    assert (stream.push(face[0]), stream.flush()) == ("", "\ufffd")


def test_lone_surrogates_are_refused(ours):
    for bad in ("\ud800", "hello \udfff world"):
        with pytest.raises(ValueError, match="lone surrogate, U\\+D"):
            ours.encode(bad)
    assert ours.encode("hello") == ours.encode("hello")
    assert ours.decode(ours.encode("hello ")) == "hello "  # and nothing stays behind in the cache


@pytest.mark.parametrize("id", [-1, 1459, 10**9, np.uint32(70_000)])
def test_ids_outside_the_vocabulary_are_named(ours, id):
    assert ours.vocab_size == 1459
    with pytest.raises(ValueError, match=f"id {id} is outside the vocabulary of 1459 ids"):
        ours.decode([5, id])
    with pytest.raises(ValueError, match=f"id {id} "):
        ours.stream_decoder().push(id)


def test_special_tokens_come_from_text_only_when_allowed(ours):
    text = "a<|endoftext|>b <|im_end|>"
    assert ours.special_tokens == {"<|endoftext|>": 1456, "<|im_start|>": 1457, "<|im_end|>": 1458}
    assert not set(ours.encode(text)) & set(ours.special_tokens.values())
    assert [id for id in ours.encode(text, allow_special=True) if id >= 1456] == [1456, 1458]
    assert ours.decode(ours.encode(text, allow_special=True)) == text
    assert ours.token_bytes()[1456] == b""


def test_every_byte_has_a_token(ours):
    assert sorted(ours.token_bytes()[:256]) == [bytes([byte]) for byte in range(256)]
    assert ours.decode([ours.token_bytes().index(b"\xff")]) == "\ufffd"


def test_processes_do_not_change_ids(ours, texts):
    strings = random_strings(50, seed=5) + texts + [""]
    alone, together = ours.encode_batch(strings), ours.encode_batch(strings, processes=3)
    assert len(alone) == len(together) == len(strings)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype == np.uint32 for a, b in zip(alone, together, strict=True))
    assert ours.encode_batch([], processes=2) == []
    with pytest.raises(ValueError, match="lone surrogate"):
        ours.encode_batch(["a", "\ud800"], processes=2)


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_tokenizer(ours, tmp_path):
    ours.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    assert again.fingerprint() == ours.fingerprint()
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    rewrite(tmp_path / "b" / "tokenizer.json", lambda spec: spec["model"]["merges"].pop())
    assert load_tokenizer(tmp_path / "b").fingerprint() != ours.fingerprint()


def test_fingerprint_survives_the_tokenizers_library(ours, theirs, tmp_path):
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).fingerprint() == ours.fingerprint()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda spec: spec.pop("model"), "not BPE"),
        (lambda spec: spec["model"].update(type="WordPiece"), "not BPE"),
        (lambda spec: spec["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda spec: spec["model"]["merges"].append(["q", "zzz"]), "'zzz'"),
        (lambda spec: spec["model"]["merges"].append(["q"]), "damaged"),
        (lambda spec: spec["added_tokens"][0].update(single_word=True), "single_word"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda spec: spec.update(pre_tokenizer=None), "not byte-level"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="("), "damaged"),
    ],
)
def test_a_file_not_understood_is_refused_in_words(ours, tmp_path, change, complaint):
    ours.save(tmp_path)
    rewrite(tmp_path / "tokenizer.json", change)
    with pytest.raises(UserError, match=complaint) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": "{"}, "tokenizer.json is damaged"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: damaged"),
        ({"vocab.json": "{}"}, "merges.txt"),
        ({"vocab.json": "{}", "merges.txt": "#version: 0.2\na b\n"}, "vocab.json"),
        ({"tokenizer.model": "rubbish"}, "not a sentencepiece model"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "1"}, "not a JSON object"),
    ],
)
def test_a_folder_without_a_sound_tokenizer_is_refused(tmp_path, files, complaint):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(tmp_path)


def test_end_of_text_is_the_familys_own(ours):
    spec = json.loads(json.dumps(ours._spec))
    for token, name in zip(spec["added_tokens"], ["</s>", "<eos>", "<|im_end|>"], strict=True):
        token["content"] = name
    assert ByteLevelBPE(spec, {}).end_of_text == 1456
    assert ByteLevelBPE(spec, {"eos_token": "<eos>"}).end_of_text == 1457
    assert ByteLevelBPE(spec, {"eos_token": {"content": "<|im_end|>"}}).end_of_text == 1458
    spec["added_tokens"] = []
    with pytest.raises(UserError, match="end-of-text"):
        _ = ByteLevelBPE(spec, {}).end_of_text


def test_chat_template_in_a_file_of_its_own_is_kept(ours, tmp_path):
    ours.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path).config["chat_template"] == "{{ messages }}"
