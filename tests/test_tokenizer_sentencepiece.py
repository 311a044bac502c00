"""SentencePiece behind the same face: lossless, with bytes for what it does not know."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import SentencePieceTokenizer, load_tokenizer
from tokenizer.train import TrainConfig, main

TEXT = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    out = folder / "out"
    main(TrainConfig(folder / "text.txt", out, 600, kind="sentencepiece", algorithm=request.param))
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes()[id] for id in ids) == text.encode()


@pytest.mark.parametrize("text", ["", " ", "  a  ", "\n\n\t\r\n", "▁", " ▁▁ a▁", "中文 😀", "a\0b", "\u2028\x85", TEXT])
def test_awkward_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, tokenizer.encode(text))) + stream.flush() == text


def test_special_tokens_come_from_text_only_when_allowed(tokenizer):
    special = tokenizer.special_tokens
    assert set(special) == {"<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    text = "a<|im_end|> <|endoftext|><unk>b"
    assert not set(tokenizer.encode(text)) & set(special.values())
    allowed = tokenizer.encode(text, allow_special=True)
    assert [id for id in allowed if id in special.values()] == [
        special[t] for t in ("<|im_end|>", "<|endoftext|>", "<unk>")
    ]
    assert tokenizer.decode(allowed) == tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_of_text == special["<|endoftext|>"]


def test_mistakes_are_named(tokenizer):
    assert tokenizer.vocab_size == 600
    with pytest.raises(ValueError, match="id 600 is outside the vocabulary"):
        tokenizer.decode([600])
    with pytest.raises(ValueError, match="lone surrogate, U\\+D800"):
        tokenizer.encode("a\ud800")


def test_processes_do_not_change_ids(tokenizer):
    texts = TEXT.split("\n")
    one, two = tokenizer.encode_batch(texts), tokenizer.encode_batch(texts, processes=2)
    assert all(np.array_equal(a, b) and b.dtype == np.uint32 for a, b in zip(one, two, strict=True))


def test_tokenizer_json_beside_it_encodes_alike(folder, tokenizer):
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*TEXT.splitlines(keepends=True), TEXT[:5000], "  中文 😀\n", "a\0b", "   "]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids, repr(text)
        assert theirs.decode(ids) == text


def test_saved_and_loaded_is_the_same_tokenizer(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.fingerprint() == tokenizer.fingerprint()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_models_of_others_keep_their_habits(tmp_path):
    """A model with Llama 2's settings: a space is put before the text, and taken away again."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ["def parse(self):", " two  spaces", "été\n", ""]:
        ids = tokenizer.encode(text)
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == processor.decode(ids) == text
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert tokenizer.end_of_text == tokenizer.special_tokens["</s>"] == 2
    assert isinstance(tokenizer, SentencePieceTokenizer)
