"""Training: against a hand-worked example, a slow reference, the tokenizers library, and a user's mistakes."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

import cli
from tokenizer import load_tokenizer
from tokenizer.bpe_training import GPT4_PATTERN, PATTERNS, byte_alphabet, count_chunks, train_merges
from tokenizer.train import TrainConfig, main

TEXT = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")


def test_hand_worked_example():
    """Sennrich et al. (2016), figure 1, without its end-of-word mark; equal counts go to the smaller ids."""
    counts = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    merges = [f"{left.decode()} {right.decode()}" for left, right in train_merges(counts, 100)]
    assert merges == [
        *["e s", "es t"],  # 9: before s t, which e s makes moot
        *["l o", "lo w"],  # 7
        *["e w", "n ew", "new est"],  # 6
        *["d est", "i dest", "w idest"],  # 3
        *["e r", "low er"],  # 2
    ]


def slow_merges(counts, size, min_count=2):
    """Byte-pair encoding as it is defined: count everything anew before each merge."""
    order = {bytes([byte]): id for id, byte in enumerate(byte_alphabet())}
    words = {chunk: [bytes([byte]) for byte in chunk.encode()] for chunk in counts}
    merges = []
    while len(merges) < size:
        pairs = Counter()
        for chunk, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += counts[chunk]
        if not pairs or max(pairs.values()) < min_count:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]]))
        merges.append(best)
        assert best[0] + best[1] not in order  # no token is ever made in two ways
        order[best[0] + best[1]] = len(order)
        words = {chunk: merged(word, best) for chunk, word in words.items()}
    return merges


def merged(word, pair):
    result, at = [], 0
    while at < len(word):
        two = tuple(word[at : at + 2]) == pair
        result.append(word[at] + word[at + 1] if two else word[at])
        at += 2 if two else 1
    return result


def test_equals_the_slow_definition_on_real_text():
    counts = count_chunks([TEXT], GPT4_PATTERN, 256)
    assert train_merges(counts, 250) == slow_merges(counts, 250)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=14), st.integers(1, 4), min_size=1, max_size=12))
def test_equals_the_slow_definition_where_pairs_overlap_and_repeat(counts):
    assert train_merges(counts, 60) == slow_merges(counts, 60)


def test_merges_equal_those_of_tokenizers():
    theirs = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=byte_level.alphabet())
    theirs.train_from_iterator([TEXT], trainer)
    alphabet = byte_alphabet()
    ours = [
        ["".join(alphabet[byte] for byte in token) for token in merge]
        for merge in train_merges(count_chunks([TEXT], GPT4_PATTERN, 256), 2000)
    ]
    assert ours == [list(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]
    assert len(ours) > 500


def test_counts_beyond_32_bits():
    assert train_merges({"ab": 2**40, "bc": 2**40 + 1}, 1) == [(b"b", b"c")]


@pytest.mark.parametrize("pattern", PATTERNS.values())
def test_chunks_do_not_depend_on_order_or_processes(pattern):
    documents = [TEXT[start : start + 700] for start in range(0, len(TEXT), 700)] + ["ünïcödé 中文"]
    counts = count_chunks(documents, pattern, 256)
    random.Random(0).shuffle(documents)
    assert count_chunks(documents, pattern, 256, processes=3) == counts
    assert sum(len(chunk) * count for chunk, count in counts.items()) == sum(map(len, documents))


def test_long_chunks_are_cut():
    assert count_chunks(["a" * 10 + " b"], GPT4_PATTERN, max_chunk=4) == {"aaaa": 2, "aa": 1, " b": 1}


def test_a_long_text_is_split_alike():
    text = TEXT * (2**20 // len(TEXT) + 1)
    counts = count_chunks([text], GPT4_PATTERN, 256)
    assert sum(len(chunk) * count for chunk, count in counts.items()) == len(text) > 2**20
    assert counts[" def"] >= 2**20 // len(TEXT)


# --- the command -----------------------------------------------------------------------------------------------------


def write_corpus(folder, texts, split="train"):
    folder.mkdir(exist_ok=True)
    half = len(texts) // 2
    for number, part in enumerate([texts[:half], texts[half:]]):
        rows = [{"id": str(i), "text": text, "source": "t", "language": "en"} for i, text in enumerate(part)]
        rows = [row | ({"split": split} if split else {}) for row in rows]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"documents-{number:05}.jsonl").write_text(content, encoding="utf-8")
    return folder


def run_command(monkeypatch, capsys, *arguments):
    """Exit status and stderr of `python -m tokenizer.train`."""
    monkeypatch.setattr(sys, "argv", ["tokenizer.train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, TrainConfig)
    return stop.value.code, capsys.readouterr().err


LINES = TEXT.splitlines(keepends=True)
DOCUMENTS = ["".join(LINES[start : start + 20]) for start in range(0, len(LINES), 20)]


def test_command_from_corpus_to_tokenizer(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    command = [sys.executable, "-m", "tokenizer.train", "--input", corpus, "--vocab-size", "500", "--out"]
    command += [tmp_path / "out", "--special-tokens", "<|tool|>", "<|x|>"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "500 ids" in done.stdout
    assert "239 merges" in done.stdout
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 500
    assert list(tokenizer.special_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<|x|>"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_order_and_processes_give_the_same_file(tmp_path):
    shuffled = random.Random(1).sample(DOCUMENTS, len(DOCUMENTS))
    for name, documents, processes in [("a", DOCUMENTS, 1), ("b", shuffled, 1), ("c", DOCUMENTS, 2)]:
        corpus = write_corpus(tmp_path / f"corpus_{name}", documents)
        main(TrainConfig(corpus, tmp_path / name, vocab_size=400, processes=processes))
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_only_the_training_split_is_read(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS, split=None)
    main(TrainConfig(corpus, tmp_path / "a", vocab_size=400))
    validation = {"text": "zqzqzqzq " * 9999, "split": "validation"}
    (corpus / "documents-00009.jsonl").write_text(json.dumps(validation) + "\n\n")
    main(TrainConfig(corpus, tmp_path / "b", vocab_size=400))
    assert load_tokenizer(tmp_path / "a").fingerprint() == load_tokenizer(tmp_path / "b").fingerprint()


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_bytes_alone_are_a_vocabulary(tmp_path, pattern):
    (tmp_path / "a.txt").write_text("héllo", encoding="utf-8")
    main(TrainConfig(tmp_path / "a.txt", tmp_path / "out", vocab_size=259, pattern=pattern))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert len(tokenizer.encode("héllo 😀")) == len("héllo 😀".encode())
    assert tokenizer.decode(tokenizer.encode("héllo 😀")) == "héllo 😀"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("héllo 😀").ids == tokenizer.encode("héllo 😀")


@pytest.mark.parametrize(
    "lines, flags, complaint",
    [
        (None, {}, "no such file or folder"),
        ([], {}, "holds no text in its training split"),
        ([], {"--kind": "sentencepiece"}, "holds no text in its training split"),
        (['{"text": "a"}', '{"text": '], {}, "documents-00000.jsonl:2: not JSON"),
        (['{"id": "1"}'], {}, "documents-00000.jsonl:1: no document"),
        (["[1]"], {}, "documents-00000.jsonl:1: no document"),
        (['{"text": 3}'], {}, "documents-00000.jsonl:1: no document"),
        (['{"text": "\\ud800"}'], {}, "documents-00000.jsonl:1: the text holds a lone surrogate"),
        (['{"text": "aa aa"}'], {"--vocab-size": 5000}, "gives at most 260"),
        (['{"text": "aa aa"}'], {"--vocab-size": 5000, "--kind": "sentencepiece"}, "too high"),
        (['{"text": "aa aa"}'], {"--vocab-size": 258}, "too small: 256 bytes and 3 special tokens take 259"),
        (['{"text": "aa aa"}'], {"--vocab-size": 2_000_000}, "too large"),
        (['{"text": "aa aa"}'], {"--special-tokens": "<|im_end|>"}, "a token twice"),
        (['{"text": "aa aa"}'], {"--processes": 0}, "start at 1"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, lines, flags, complaint):
    if lines is not None:
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "documents-00000.jsonl").write_text("\n".join(lines))
    flags = {"--input": tmp_path / "corpus", "--out": tmp_path / "out", "--vocab-size": 260, "--processes": 2} | flags
    status, stderr = run_command(monkeypatch, capsys, *[part for flag in flags.items() for part in flag])
    errors = [line for line in stderr.replace("\r", "\n").splitlines() if "error" in line]
    assert status == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and complaint in errors[0], stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == (["corpus"] if lines is not None else [])


def test_other_mistakes_with_files(tmp_path, monkeypatch, capsys):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("mine")
    (tmp_path / "taken" / "tokenizer_config.json").touch()  # as in the folder of a trained model
    for source, out, complaint in [
        ("latin1.txt", "out", "latin1.txt: not UTF-8 (byte 3)"),
        ("empty", "out", "holds no documents-*.jsonl"),
        ("latin1.txt", "taken", "holds other files"),
    ]:
        arguments = ["--input", tmp_path / source, "--out", tmp_path / out, "--vocab-size", 300]
        status, stderr = run_command(monkeypatch, capsys, *arguments)
        assert (status, complaint in stderr) == (2, True), stderr
    assert (tmp_path / "taken" / "precious").exists()


def test_no_worker_outlives_its_parent(tmp_path):
    """A worker with more to send than a pipe holds, whose parent is killed before it reads."""
    script = (
        "import time\n"
        "from tokenizer.processes import over_processes\n"
        "def work(part):\n"
        "    if part:\n"
        "        return bytes(10**7)\n"
        "    print(flush=True)\n"
        "    time.sleep(60)\n"
        "over_processes(work, 3)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE)
    parent.stdout.readline()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) == 2
    parent.kill()
    parent.communicate(timeout=20)  # ends when nobody holds its standard output any more, else raises
