"""Raw files in, a corpus out: read, remove exact duplicates, split, write, and account for every document.

    python -m data.curate INPUT... --out runs/corpus

INPUT is a file or folder of .txt, .md, .jsonl, .jsonl.gz or .json, or the word `python-stdlib`. The corpus is lines of
JSON, `documents-00000.jsonl` and so on, beside `report.json`: what went into each step, what came out, and why.
It is the same byte for byte whatever the order of the INPUTs: sorted by source, then by id, a hash of the text.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from cli import UserError, run, whole_folder

from .sources import InputFile, Reading, list_files, read_documents

FILE_BYTES = 64 * 10**6


@dataclass(frozen=True)
class CurateConfig:
    """Make a corpus of raw text."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files and folders of .txt, .md, .jsonl, .jsonl.gz or .json, or the word python-stdlib."""
    out: Path
    """Folder to write the corpus to."""
    validation_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by a hash of their text."""


@dataclass
class Step:
    """What one step did. `reasons`: why a document was dropped, to how many were."""

    name: str
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def count(self, bytes_in: int, bytes_out: int, reason: str = "") -> None:
        """One document: kept, or dropped for `reason`."""
        self.documents_in += 1
        self.bytes_in += bytes_in
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        else:
            self.documents_out += 1
            self.bytes_out += bytes_out


class Entry(NamedTuple):
    """A document's place in the spool, with what sorting and counting need. Its first three fields order duplicates."""

    digest: bytes  # sha256 of the text
    source: str
    line_digest: bytes  # sha256 of the line, so that of two twins always the same one stays
    offset: int
    length: int
    text_bytes: int
    split: str
    tagged: bool  # the document itself named its split


def main(config: CurateConfig) -> None:
    """Curate `config.inputs` into `config.out`. Raises UserError; nothing is left half-written."""
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction}: give a number between 0 and 1")
    if not config.inputs:
        raise UserError("no INPUT: give files, folders or the word python-stdlib")
    for word in config.inputs:
        if config.out.resolve().is_relative_to(Path(word).resolve()):
            raise UserError(f"--out {config.out} lies inside INPUT {word}, which would then hold its own corpus")
    files = list_files(config.inputs)
    with whole_folder(config.out, "report.json", "documents-*.jsonl") as folder:
        spool_path = folder / "spool"
        with open(spool_path, "w+b") as spool:
            report = curate(files, spool, folder, config.validation_fraction)
        spool_path.unlink()
        text = json.dumps(report, indent=2)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    print_summary(report, config.out)


def curate(files: list[InputFile], spool: Any, folder: Path, fraction: float) -> dict[str, Any]:
    """Every step. `spool` holds the documents as read; `folder` gets those that stay, in order. Returns the report."""
    read, unique, split = Step("read"), Step("exact duplicates"), Step("split")
    encodings: dict[str, int] = {}
    readings = (reading for file in files for reading in read_documents(file))
    progress = tqdm(readings, desc="curate", unit=" documents", disable=None, leave=False)
    entries = list(spool_documents(progress, spool, fraction, read, encodings))
    entries = drop_duplicates(entries, unique)
    if not entries:
        raise UserError(f"no document left: {describe(read.reasons)}: give INPUTs with text")
    entries, cut = fill_splits(entries, spool)
    for entry in entries:
        split.count(entry.text_bytes, entry.text_bytes)
    split.documents_in = unique.documents_out  # a cut makes two of one
    entries.sort(key=lambda entry: (entry.source, entry.digest))
    digest = write_lines((read_line(spool, entry) for entry in entries), folder)
    return {
        "documents": len(entries),
        "bytes": split.bytes_out,
        "corpus_sha256": digest,
        "validation_fraction": fraction,
        "steps": [asdict(read) | {"encodings": encodings}, asdict(unique), asdict(split)],
        "sources": tally(entries, "source"),
        "splits": tally(entries, "split"),
        "validation_cut": cut,
    }


def spool_documents(
    readings: Iterable[Reading], spool: Any, fraction: float, read: Step, encodings: dict[str, int]
) -> Iterator[Entry]:
    """Write each document to `spool` as it will stand in the corpus, and count it in `read`."""
    for reading in readings:
        text_bytes = 0
        if reading.document:
            entry = spool_document(reading.document, spool, fraction)
            text_bytes = entry.text_bytes
            yield entry
        read.count(reading.bytes, text_bytes, reading.reason)
        if reading.encoding and not reading.reason:
            encodings[reading.encoding] = encodings.get(reading.encoding, 0) + 1


def spool_document(document: dict[str, Any], spool: Any, fraction: float) -> Entry:
    """Give a document its id and split, and append its line to `spool`."""
    text = document["text"].encode()
    digest = hashlib.sha256(text).digest()
    split = document.get("split") or choose_split(digest, fraction)
    first = {"id": digest[:16].hex(), "text": document["text"]}
    first |= {"source": document["source"], "language": document["language"], "split": split}
    line = json_line(first | document)
    line_digest = hashlib.sha256(line).digest()
    offset = spool.seek(0, 2)
    spool.write(line)
    return Entry(digest, document["source"], line_digest, offset, len(line), len(text), split, "split" in document)


def json_line(document: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8; a tag that UTF-8 cannot hold, as a file name in another encoding, is escaped."""
    try:
        return json.dumps(document, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(document).encode() + b"\n"


def choose_split(digest: bytes, fraction: float) -> str:
    """The split of a text by its sha256 alone, so that adding documents never moves old ones."""
    return "validation" if int.from_bytes(digest[-8:], "big") < fraction * 2**64 else "train"


def drop_duplicates(entries: list[Entry], step: Step) -> list[Entry]:
    """One entry a text: the first by source, then by line. Returns them sorted by digest."""
    kept: list[Entry] = []
    for entry in sorted(entries):
        twin = bool(kept) and kept[-1].digest == entry.digest
        step.count(entry.text_bytes, entry.text_bytes, "same text as another document" if twin else "")
        if not twin:
            kept.append(entry)
    return kept


def fill_splits(entries: list[Entry], spool: Any) -> tuple[list[Entry], dict[str, Any] | None]:
    """Where few documents leave a split empty, cut the longest: its last tenth becomes a validation document.

    Returns the entries and what was cut, None if nothing was. Documents tagged for validation are never trained on.
    """
    if {entry.split for entry in entries} == {"train", "validation"}:
        return entries, None
    trainable = [entry for entry in entries if not (entry.tagged and entry.split == "validation")]
    if not trainable:
        raise UserError("every document is tagged for validation: give training text as well")
    longest = max(trainable, key=lambda entry: (entry.text_bytes, entry.digest))
    document = json.loads(read_line(spool, longest))
    head, tail = cut_tail(document["text"])
    if not head.strip() or not tail.strip():
        raise UserError("too little text to hold some out for validation: give more")
    document |= {"cut_from": document.pop("id")}
    parts = [document | {"text": head, "split": "train"}, document | {"text": tail, "split": "validation"}]
    new = [spool_document(part, spool, 0) for part in parts]
    cut = {"id": document["cut_from"], "source": longest.source, "validation_bytes": new[1].text_bytes}
    return [entry for entry in entries if entry is not longest] + new, cut


def cut_tail(text: str) -> tuple[str, str]:
    """Cut off the last tenth: at the last line end of the tenth before it, or in mid-line where there is none."""
    goal = len(text) * 9 // 10
    cut = text.rfind("\n", len(text) * 8 // 10, goal) + 1 or goal
    return text[:cut], text[cut:]


def read_line(spool: Any, entry: Entry) -> bytes:
    """A document's line."""
    spool.seek(entry.offset)
    return spool.read(entry.length)


def write_lines(lines: Iterable[bytes], folder: Path, file_bytes: int = FILE_BYTES) -> str:
    """Write documents-00000.jsonl and so on, a new file after `file_bytes`. Returns the sha256 of all their bytes."""
    digest, rest = hashlib.sha256(), iter(lines)
    line, number = next(rest, None), 0
    while line is not None:
        with open(folder / f"documents-{number:05d}.jsonl", "wb") as file:
            while line is not None and file.tell() < file_bytes:
                file.write(line)
                digest.update(line)
                line = next(rest, None)
        number += 1
    return digest.hexdigest()


def tally(entries: list[Entry], attribute: str) -> dict[str, dict[str, int]]:
    """Documents and bytes for each value of an attribute, sorted by its name."""
    counts: dict[str, dict[str, int]] = {}
    for entry in entries:
        count = counts.setdefault(getattr(entry, attribute), {"documents": 0, "bytes": 0})
        count["documents"] += 1
        count["bytes"] += entry.text_bytes
    return dict(sorted(counts.items()))


def describe(counts: dict[str, int]) -> str:
    """Reasons and their counts, in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def print_summary(report: dict[str, Any], out: Path) -> None:
    """What went in, what was dropped and why, what came out."""
    for step in report["steps"][:2]:
        dropped = f"; dropped: {describe(step['reasons'])}" if step["reasons"] else ""
        print(f"{step['name']}: {step['documents_in']:,} in, {step['documents_out']:,} kept{dropped}")
    latin = report["steps"][0]["encodings"].get("latin-1", 0)
    if latin:
        print(f"encoding: {latin:,} text files are not UTF-8 and were read as Latin-1")
    if report["validation_cut"]:
        cut = report["validation_cut"]
        print(f"split: too few documents, so the last {cut['validation_bytes']:,} bytes of the longest are held out")
    for split, count in report["splits"].items():
        print(f"{split}: {count['documents']:,} documents, {count['bytes']:,} bytes")
    print(f"{out}: corpus {report['corpus_sha256'][:12]} of {len(report['sources'])} source(s)")


if __name__ == "__main__":
    run(main, CurateConfig)
