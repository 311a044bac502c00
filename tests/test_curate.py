"""data.curate: every document kept or accounted for, the same bytes for any order, and each mistake in one line."""

import gzip
import hashlib
import heapq
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli import UserError
from data.curate import CurateConfig, choose_split, cut_tail, main, write_lines

ROOT = Path(__file__).parents[1]
LONDON = ROOT.parent / "shared" / "data" / "london"


def curate(tmp_path: Path, *inputs: Path | str, out: str = "corpus", **settings) -> tuple[list[dict], dict]:
    """Run data.curate in this process. Returns the documents and the report."""
    folder = tmp_path / out
    main(CurateConfig(tuple(map(str, inputs)), folder, **settings))
    lines = b"".join(path.read_bytes() for path in sorted(folder.glob("documents-*.jsonl")))
    report = json.loads((folder / "report.json").read_text())
    assert report["corpus_sha256"] == hashlib.sha256(lines).hexdigest()
    return [json.loads(line) for line in lines.decode().split("\n")[:-1]], report


def write_jsonl(path: Path, *documents: dict) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def some_texts(first: int, last: int) -> list[dict]:
    return [{"text": f"Document number {number}.\nIt has two lines.\n"} for number in range(first, last)]


def test_every_field_of_a_small_corpus(tmp_path: Path):
    """Worked by hand: ids are hashes, own fields are honoured, other fields stay as tags, order is source then id."""
    books = tmp_path / "books"
    (books / "deep").mkdir(parents=True)
    (books / "deep" / "one.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    own = {"id": 7, "text": "own", "source": "mine", "language": "fr", "split": "validation", "year": 1850}
    lines = write_jsonl(tmp_path / "lines.jsonl", own, {"text": "plain"})
    documents, _ = curate(tmp_path, lines, books)
    one = {"text": "one\ntwo\nthree\n", "source": "books", "language": "und", "split": "train", "path": "deep/one.txt"}
    plain = {"text": "plain", "source": "lines.jsonl", "language": "und", "split": "train"}
    own |= {"original_id": own.pop("id")}
    expected = [{"id": hashlib.sha256(d["text"].encode()).hexdigest()[:32]} | d for d in (one, plain, own)]
    assert documents == expected
    assert [*documents[0]] == ["id", "text", "source", "language", "split", "path"]


def test_report_accounts_for_every_document(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good\n")
    (folder / "twin.md").write_bytes(b"good\r\n")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\x89PNG\0\0")
    (folder / "picture.png").write_bytes(b"12345678")
    (folder / "half.jsonl").write_text('{"text": "half \\ud800 a pair", "split": "train"}\n\n')
    (folder / "list.json").write_text('[{"text": "listed", "split": "validation"}]')
    with gzip.open(folder / "zipped.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    documents, report = curate(tmp_path, folder)
    assert sorted(document["text"] for document in documents) == ["déjà vu", "good\n", "listed", "zipped"]
    read, unique, split = report["steps"]
    assert read == {
        "name": "read",
        "documents_in": 9,
        "documents_out": 5,
        "bytes_in": 5 + 6 + 7 + 2 + 6 + 8 + 15 + 6 + 6,
        "bytes_out": 5 + 5 + 9 + 6 + 6,
        "reasons": {
            "empty": 1,
            "binary (NUL characters)": 1,
            "undecodable (lone surrogates)": 1,
            "not .txt, .md, .jsonl, .jsonl.gz, .json": 1,
        },
        "encodings": {"utf-8": 2, "latin-1": 1},
    }
    assert (unique["documents_in"], unique["documents_out"]) == (5, 4)
    assert (unique["bytes_in"], unique["bytes_out"]) == (31, 26)
    assert unique["reasons"] == {"same text as another document": 1}
    assert (split["documents_out"], report["documents"], report["bytes"]) == (4, 4, 26)
    assert report["splits"] == {"train": {"documents": 3, "bytes": 20}, "validation": {"documents": 1, "bytes": 6}}
    assert report["sources"] == {"in": {"documents": 4, "bytes": 26}}


def test_same_bytes_for_any_order_of_inputs(tmp_path: Path):
    """Twins across and within sources too: the same one of them stays."""
    one = write_jsonl(
        tmp_path / "one.jsonl", *some_texts(0, 60), {"text": "twin", "tag": 1}, {"text": "twin", "tag": 2}
    )
    two = write_jsonl(tmp_path / "two.jsonl", {"text": "twin", "tag": 2}, *some_texts(30, 90)[::-1])
    three = write_jsonl(tmp_path / "three.jsonl", {"text": "twin", "tag": 2, "source": "one.jsonl"})
    outputs = []
    for number, order in enumerate([(one, two, three), (three, two, one), (two, one, three, two)]):
        documents, _ = curate(tmp_path, *order, out=f"out{number}")
        outputs.append((tmp_path / f"out{number}" / "documents-00000.jsonl").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(documents) == 91
    keys = [(document["source"], document["id"]) for document in documents]
    assert keys == sorted(keys)


def test_adding_documents_moves_none_between_splits(tmp_path: Path):
    few = write_jsonl(tmp_path / "few.jsonl", *some_texts(0, 300))
    many = write_jsonl(tmp_path / "many.jsonl", *some_texts(0, 900))
    before, _ = curate(tmp_path, few, out="before", validation_fraction=0.2)
    after, _ = curate(tmp_path, many, out="after", validation_fraction=0.2)
    splits = {document["id"]: document["split"] for document in after}
    assert all(splits[document["id"]] == document["split"] for document in before)
    held_out = sum(split == "validation" for split in splits.values())
    assert abs(held_out - 180) < 4 * (900 * 0.2 * 0.8) ** 0.5


def test_choose_split_reads_the_hash():
    """By hand: the last eight bytes, as a fraction of 2^64."""
    assert choose_split(bytes(24) + b"\x40" + bytes(7), 0.2500001) == "validation"
    assert choose_split(bytes(24) + b"\x40" + bytes(7), 0.25) == "train"
    assert choose_split(b"\xff" * 24 + bytes(8), 1e-9) == "validation"


def test_one_book_is_cut_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    text = "".join(f"Line {number} of a book.\n" for number in range(1000))
    (tmp_path / "book.txt").write_text(text)
    documents, report = curate(tmp_path, tmp_path / "book.txt")
    head, tail = sorted(documents, key=lambda document: document["split"])
    assert head["text"] + tail["text"] == text and head["text"].endswith("\n")
    assert 0.1 <= len(tail["text"]) / len(text) < 0.11
    whole = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert head["cut_from"] == tail["cut_from"] == whole == report["validation_cut"]["id"]
    assert report["validation_cut"]["validation_bytes"] == len(tail["text"])
    assert f"too few documents, so the last {len(tail['text']):,} bytes" in capsys.readouterr().out


def test_training_text_is_never_cut_from_tagged_validation(tmp_path: Path):
    """The longest untagged document is cut, though a longer one is tagged for validation."""
    tagged = {"text": "held out " * 50, "split": "validation"}
    path = write_jsonl(tmp_path / "in.jsonl", tagged, {"text": "0123456789"})
    documents, _ = curate(tmp_path, path, validation_fraction=0.9999999)
    assert {d["text"]: d["split"] for d in documents} == {
        tagged["text"]: "validation",
        "012345678": "train",
        "9": "validation",
    }


def test_cut_tail():
    assert cut_tail("0123456789") == ("012345678", "9")  # no line end: in mid-line
    assert cut_tail("title\n" + 94 * "x") == ("title\n" + 84 * "x", 10 * "x")  # the only line end is too far from it
    assert cut_tail("x" * 85 + "\n" + "y" * 14) == ("x" * 85 + "\n", "y" * 14)


def test_files_are_cut_by_size(tmp_path: Path):
    lines = [f"{number:09d}\n".encode() for number in range(7)]
    assert write_lines(lines, tmp_path, file_bytes=25) == hashlib.sha256(b"".join(lines)).hexdigest()
    files = [path.read_bytes() for path in sorted(tmp_path.glob("documents-*.jsonl"))]
    assert files == [b"".join(lines[:3]), b"".join(lines[3:6]), lines[6]]


def test_a_file_name_in_another_encoding(tmp_path: Path):
    """A file name that is no UTF-8 neither drops its document nor breaks the corpus."""
    folder = tmp_path / "in"
    folder.mkdir()
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    (folder / name).write_text("ten words of text in a file of Latin-1 name\n")
    documents, _ = curate(tmp_path, folder)
    assert {document["path"] for document in documents} == {name}


def test_python_stdlib(tmp_path: Path):
    documents, report = curate(tmp_path, "python-stdlib")
    by_path = {document["path"]: document for document in documents}
    assert by_path["heapq.py"]["text"] == Path(heapq.__file__).read_text(encoding="utf-8")
    assert {document["source"] for document in documents} == {"python-stdlib"}
    assert {document["language"] for document in documents} == {"en"}
    assert not any("site-packages" in path or not path.endswith(".py") for path in by_path)
    assert 5e6 < report["bytes"] < 6e7 and report["splits"]["validation"]["documents"] > 1
    assert report["validation_cut"] is None


@pytest.mark.skipif(not LONDON.exists(), reason="../shared/data is absent")
def test_london_in_three_encodings(tmp_path: Path):
    """Real books with CRLF line ends: nothing of the text is lost, and the HTML twins are left out, and counted."""
    documents, report = curate(tmp_path, LONDON)
    texts: dict[str, str] = {}
    for document in sorted(documents, key=lambda document: document["split"]):
        texts[document["path"]] = texts.get(document["path"], "") + document["text"]
    encodings = {
        "beggars": "latin-1",
        "complete": "latin-1",
        "jack": "latin-1",
        "merry": "utf-8-sig",
        "oliver": "utf-8",
    }
    assert sorted(name.split("_")[0] for name in texts) == sorted(encodings)
    for name, text in texts.items():
        raw = (LONDON / name).read_bytes().decode(encodings[name.split("_")[0]])
        assert "\r\n" in raw and text == raw.replace("\r\n", "\n").replace("\r", "\n")
    assert report["steps"][0]["reasons"] == {"not .txt, .md, .jsonl, .jsonl.gz, .json": 2}
    assert report["validation_cut"]["source"] == "london"


MISTAKES = {
    "missing path": ([], ["nowhere.txt"], "nowhere.txt does not exist"),
    "unknown kind": ([("a.exe", b"x")], ["a.exe"], "a.exe is of a kind that is not read here"),
    "no input": ([], [], "no INPUT"),
    "bad fraction": ([("a.txt", b"x")], ["a.txt", "--validation-fraction", "1.5"], "--validation-fraction 1.5"),
    "malformed line": ([("a.jsonl", b'{"text": "a"}\n{"text": \n')], ["a.jsonl"], "a.jsonl:2: not JSON"),
    "malformed list": ([("a.json", b'[{"text": "a"},\n{"text" "b"}]')], ["a.json"], "a.json:2: not JSON"),
    "not UTF-8": ([("a.jsonl", b'{"text": "\xe9"}\n')], ["a.jsonl"], "a.jsonl:1: not UTF-8"),
    "no text": ([("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n')], ["a.jsonl"], 'a.jsonl:2: no "text"'),
    "text a number": ([("a.json", b'{"text": 5}')], ["a.json"], 'a.json: document 1: no "text"'),
    "source a number": ([("a.jsonl", b'{"text": "a", "source": 5}')], ["a.jsonl"], 'a.jsonl:1: "source" is 5'),
    "split unknown": ([("a.jsonl", b'{"text": "a", "split": "test"}')], ["a.jsonl"], 'a.jsonl:1: "split" is "test"'),
    "broken gzip": ([("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9])], ["a.jsonl.gz"], "broken gzip"),
    "no gzip": ([("a.jsonl.gz", b'{"text": "a"}\n')], ["a.jsonl.gz"], "a.jsonl.gz:1: broken gzip"),
    "nothing left": ([("a.txt", b" \n")], ["a.txt"], "no document left: 1 empty"),
    "one letter": ([("a.txt", b"x")], ["a.txt"], "too little text"),
    "validation alone": (
        [("a.jsonl", b'{"text": "abc", "split": "validation"}')],
        ["a.jsonl"],
        "tagged for validation",
    ),
    "out inside": ([("a/b.txt", b"x")], ["a", "--out", "a/corpus"], "lies inside INPUT a"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, mistake: str):
    files, arguments, complaint = MISTAKES[mistake]
    for name, content in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    arguments = arguments if "--out" in arguments else [*arguments, "--out", "corpus"]
    command = [sys.executable, "-m", "data.curate", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and complaint in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_another_folder_is_never_replaced(tmp_path: Path):
    (tmp_path / "in.txt").write_text("a line\nanother line\n")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "precious.txt").write_text("mine")
    (tmp_path / "corpus" / "report.json").write_text("{}")  # a name that others use as well
    with pytest.raises(UserError, match="holds other files"):
        curate(tmp_path, tmp_path / "in.txt")
    assert (tmp_path / "corpus" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_while_a_corpus_is_replaced(killed, number, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the first or second renaming: nothing is lost, even if the command that comes next fails."""
    (tmp_path / "in.txt").write_text("a line\nanother line\n")
    curate(tmp_path, tmp_path / "in.txt")
    old = (tmp_path / "corpus" / "report.json").read_bytes()
    calls, rename = [], Path.rename

    def stop(path, target):
        calls.append(path)
        if len(calls) == number or (killed and len(calls) > number):  # a killed process puts nothing back
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stop)
        curate(tmp_path, tmp_path / "in.txt")
    (tmp_path / "blank.txt").write_text(" ")
    with pytest.raises(UserError, match="no document left"):
        curate(tmp_path, tmp_path / "blank.txt")
    assert (tmp_path / "corpus" / "report.json").read_bytes() == old
    curate(tmp_path, tmp_path / "in.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "blank.txt", "corpus"}
