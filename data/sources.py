"""Where documents come from: files and folders of text and JSON lines, and the Python library that is running."""

import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cli import UserError

PYTHON_STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES)
_NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}  # what others have installed into the library's folder


class InputFile(NamedTuple):
    """A file to read: `source` is the INPUT it came by, `name` its path below that INPUT."""

    path: Path
    source: str
    name: str
    language: str


class Reading(NamedTuple):
    """What one document's bytes came to: a document, or the reason why there is none.

    document: {"text", "source", "language", ...tags}; bytes: read, before anything changed them; encoding: of a text
    file, "" otherwise.
    """

    document: dict[str, Any] | None
    bytes: int
    reason: str = ""
    encoding: str = ""


def list_files(inputs: tuple[str, ...]) -> list[InputFile]:
    """Every file that INPUTs name: files, all files below folders, and the word `python-stdlib`.

    The documents of a file belong to the source named after its INPUT, `books` for `corpora/books/1839/x.txt` found by
    `corpora/books`. Language is "und" (undetermined, ISO 639) where nothing says more; the Python library counts as
    "en", the language of its comments, docstrings and names.
    Raises UserError for an INPUT that does not exist or whose kind is not read here.
    """
    files = []
    for word in inputs:
        path = Path(word)
        if word == PYTHON_STDLIB:
            files += list_stdlib()
        elif path.is_dir():
            below = sorted(found for found in path.rglob("*") if found.is_file())
            files += [InputFile(f, path.resolve().name, f.relative_to(path).as_posix(), "und") for f in below]
        elif not path.exists():
            raise UserError(f"{word} does not exist: give files, folders or the word {PYTHON_STDLIB}")
        elif not path.name.lower().endswith(SUFFIXES):
            raise UserError(f"{word} is of a kind that is not read here: give {', '.join(SUFFIXES)}")
        else:
            files.append(InputFile(path, path.name, path.name, "und"))
    return files


def list_stdlib() -> list[InputFile]:
    """Every .py file of the running interpreter's standard library, its tests included where they are installed."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not _NOT_OURS.intersection(path.parts)]
    if not files:
        raise UserError(f"{PYTHON_STDLIB}: {root} holds no .py files: this Python came without its sources")
    return [InputFile(path, PYTHON_STDLIB, path.relative_to(root).as_posix(), "en") for path in files]


def read_documents(file: InputFile) -> Iterator[Reading]:
    """The documents of one file, in its order: a text file is one document, a JSON file as many as it holds.

    Raises UserError, naming file and line, for JSON that is malformed or whose documents lack "text".
    """
    name = file.name.lower()
    if name.endswith(".json"):
        yield from (check_reading(reading) for reading in read_json(file))
    elif name.endswith(JSON_SUFFIXES):
        yield from (check_reading(reading) for reading in read_json_lines(file))
    elif name.endswith(TEXT_SUFFIXES) or (file.source == PYTHON_STDLIB and name.endswith(".py")):
        yield check_reading(read_text(file))
    else:
        yield Reading(None, file.path.stat().st_size, f"not {', '.join(SUFFIXES)}")


def read_text(file: InputFile) -> Reading:
    """One text file: UTF-8, with or without a byte-order mark, else Latin-1, which gives every byte a character."""
    content = file.path.read_bytes()
    try:
        text, encoding = content.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        text, encoding = content.decode("latin-1"), "latin-1"
    document = {"text": text, "source": file.source, "language": file.language, "path": file.name}
    return Reading(document, len(content), encoding=encoding)


def read_json_lines(file: InputFile) -> Iterator[Reading]:
    """A document a line; blank lines are none."""
    number, zipped = 0, file.name.lower().endswith(".gz")
    try:
        with gzip.open(file.path) if zipped else open(file.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield read_object(parse_json(line.rstrip(), file.path, number), file, f"{file.path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.path}:{number + 1}: broken gzip file ({error}): fetch it again") from None


def read_json(file: InputFile) -> Iterator[Reading]:
    """A list of documents, or one."""
    value = parse_json(file.path.read_bytes(), file.path, 1)
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield read_object(item, file, f"{file.path}: document {number}")


def parse_json(content: bytes, path: Path, line: int) -> Any:
    """JSON that begins on `line` of `path`."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg}): mend or remove it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: JSON nested too deeply: mend or remove it") from None


def read_object(item: Any, file: InputFile, where: str) -> Reading:
    """A JSON object as a document: its own source, language and split are honoured, its other fields kept as tags."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise UserError(f'{where}: no "text": every document is a JSON object {{"text": "...", ...}}')
    document = {"text": item["text"], "source": file.source, "language": file.language} | item
    for field in ("source", "language"):
        if not isinstance(document[field], str) or not document[field].strip():
            raise UserError(f'{where}: "{field}" is {json.dumps(document[field])}: it must be a word')
    if item.get("split", "train") not in ("train", "validation"):
        raise UserError(f'{where}: "split" is {json.dumps(item["split"])}: it must be "train" or "validation"')
    if "id" in item:
        document["original_id"] = document.pop("id")  # ids here are hashes of the text
    return Reading(document, len(item["text"].encode("utf-8", "surrogatepass")))


def check_reading(reading: Reading) -> Reading:
    """Line ends to \\n; a reason instead of the document where its text is none."""
    text = io.IncrementalNewlineDecoder(None, translate=True).decode(reading.document["text"], final=True)
    reason = ""
    if not text.strip():
        reason = "empty"
    elif "\0" in text:
        reason = "binary (NUL characters)"
    elif not text.isascii() and not is_unicode(text):
        reason = "undecodable (lone surrogates)"
    if reason:
        return reading._replace(document=None, reason=reason)
    return reading._replace(document=reading.document | {"text": text})


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`: a lone surrogate, which JSON can escape, has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
