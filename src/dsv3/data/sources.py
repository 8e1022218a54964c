"""Where text comes from: builtins, the user's own files, URLs, Hugging Face data sets; and which split a document is in."""

import glob
import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from dsv3.data import hub, needle, tinypy
from dsv3.data.files import LONGEST_DOCUMENT, READERS, Document, File, Reader, SkipReport, read, suffix_of, walk
from dsv3.data.library import PACKAGE, STDLIB, by_people, is_library, library_files
from dsv3.data.remote import is_url, remote_files
from dsv3.errors import UserError, nearest

Split = Literal["train", "validation"]

TINYPY, NEEDLE = "builtin:tinypy", "builtin:needle"
GENERATORS = {TINYPY: tinypy, NEEDLE: needle}
"""Sources that are made from a seed, each with splits of its own."""
ENDLESS = ((TINYPY, "train"), (NEEDLE, "train"))
"""Sources and splits that never end: readers need a limit."""

VALIDATION_FRACTION = 0.05
"""Default share of the documents that is held out."""
LEARNED_FROM = 4000
"""Documents of an endless source that a tokenizer is trained on; its words repeat long before."""
TEXT = (".txt", ".md", ".py")


@dataclass(frozen=True)
class Found:
    """One file of a source."""

    name: str
    """What its documents' ids start with: its path within the source."""
    file: File
    size: int
    """Bytes."""
    stamp: str
    """Changes when its content does: its time, or what its server gives instead."""


def documents(
    uri: str,
    split: Split,
    *,
    seed: int,
    validation_fraction: float = VALIDATION_FRACTION,
    report: SkipReport | None = None,
) -> Iterator[Document]:
    """The documents of one split of a source, always in the same order; `train` of a generated one never ends.

    `uri` is a builtin; `package:NAME` (`library.py`); a file, a directory or a glob, here or at a URL that fsspec opens, of `.txt`, `.md`, `.py`, `.jsonl`
    (`.gz`, `.zst`) or `.parquet` (field `text`); or `hf:NAME` (`hub.py`). A directory is walked in sorted order, hidden
    files and directories left out. Texts longer than 256 KiB become several documents; text files of a corpus below 50 MB
    are cut finer, at a 200th of the corpus but not below 16 KiB. Empty documents are left out and counted.
    A document belongs to `validation` when the sha256 of its id, as a fraction, is below `validation_fraction`. Where that
    leaves a split of a small source empty, its longest document is cut in two instead, at a line break if there is one:
    the end goes to `validation`. The splits of the generated sources, which alone use `seed`, are
    their own (held-out combinations).
    What cannot be read is skipped and added to `report`. Raises `UserError` at once for an unknown source or missing
    path, and at the end when nothing came; `RunError` when a file disappears.
    """
    report = SkipReport() if report is None else report
    if uri in GENERATORS:
        return (Document(name, text) for name, text in GENERATORS[uri].documents(split, seed))
    return choose(reader(uri), uri, split, validation_fraction, report)


def reader(uri: str) -> Reader:
    """The reader of a source. Refuses a bad source before anything is read."""
    if uri.startswith(hub.PREFIX):
        return hub.reader(uri)
    found, library = find(uri), is_library(uri)
    text_bytes = sum(each.size for each in found if suffix_of(each.file) in TEXT)
    finest = min(max(text_bytes // 200, 16 * 1024), LONGEST_DOCUMENT)

    def every(report: SkipReport) -> Iterator[Document]:
        for each in found:
            longest = finest if suffix_of(each.file) in TEXT and not library else LONGEST_DOCUMENT
            pieces = read(each.file, each.name, report, longest)
            yield from by_people(pieces) if library else pieces

    return every


def fingerprint(uri: str) -> str:
    """Changes when a source's content does (hex): of files their names, sizes and times; of a builtin its own source."""
    if uri in GENERATORS:
        # Needles are hidden among tasks.
        made_by = ("tinypy.py",) if uri == TINYPY else ("tinypy.py", "needle.py")
        return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in made_by)).hexdigest()
    if uri.startswith(hub.PREFIX):
        # Of a name the name alone, because asking the hub would need the network.
        directory = Path(uri.removeprefix(hub.PREFIX))
        found = local(directory, walk(directory))
    else:
        found = find(uri)
    content = hashlib.sha256(uri.encode(errors="surrogateescape"))
    for each in found:
        content.update(f"{each.file}:{each.size}:{each.stamp}".encode(errors="surrogateescape"))
    return content.hexdigest()


def choose(every: Reader, uri: str, split: Split, validation_fraction: float, report: SkipReport) -> Iterator[Document]:
    """One split of a source; `UserError` if it is empty."""
    divided = None if validation_fraction == 0 else document_to_divide(every, validation_fraction)
    seen = chosen = 0
    for document in every(report):
        if not document.text:
            report.empty += 1
            continue
        seen += 1
        if document.id == divided:
            if text := divide(document.text, validation_fraction)[split == "validation"]:
                chosen += 1
                yield Document(f"{document.id}#{split}", text)
        elif (hash_fraction(document.id) < validation_fraction) == (split == "validation"):
            chosen += 1
            yield document
    if not seen:
        skipped = f" ({report.count} skipped, the first: {report.named[0]})" if report.count else ""
        raise UserError(f"{uri} holds no text{skipped}; expected at least one document that is not empty")
    if not chosen:
        raise UserError(
            f"{uri}: none of its {seen} documents falls into the {split} split at validation_fraction = "
            f"{validation_fraction}; add documents or change the fraction"
        )


def document_to_divide(every: Reader, validation_fraction: float) -> str | None:
    """The id of a source's longest document if all of them fall into the same split; None otherwise.

    Reads until there is one of each, which is a few dozen documents.
    """
    longest, splits = Document("", ""), set()
    for document in every(SkipReport()):
        if document.text:
            splits.add(hash_fraction(document.id) < validation_fraction)
            if len(document.text) > len(longest.text):
                longest = document
        if len(splits) == 2:
            return None
    return longest.id


def divide(text: str, validation_fraction: float) -> tuple[str, str]:
    """The text in two, of which the second has about `validation_fraction`: cut at white space where there is some."""
    most = max(min(int(len(text) * (1 - validation_fraction)), len(text) - 1), len(text) // 2, 1)
    found = (text.rfind(mark, most // 2, most) for mark in "\n ")
    cut = next((at + 1 for at in found if at >= 0), most)
    return text[:cut], text[cut:]


def hash_fraction(name: str) -> float:
    """A fixed number in [0, 1) for a name: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def sample(documents: Iterable[Document], limit_bytes: int) -> list[str]:
    """Texts of at most `limit_bytes` of UTF-8 in all, spread evenly over the documents, in their order.

    Those with the smallest hashes are kept, so that a corpus of any size is sampled in one pass and bounded memory.
    """
    kept: list[tuple[float, int, str]] = []
    total = 0
    for number, document in enumerate(documents):
        heapq.heappush(kept, (-hash_fraction(f"sample:{document.id}"), number, document.text))
        total += len(document.text.encode())
        while total > limit_bytes:
            total -= len(heapq.heappop(kept)[2].encode())
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def to_learn_from(uri: str, seed: int, validation_fraction: float, limit_bytes: int) -> list[str]:
    """A sample of the training split for a tokenizer; of a source that never ends, of its first `LEARNED_FROM` documents."""
    found = documents(uri, "train", seed=seed, validation_fraction=validation_fraction)
    return sample(islice(found, LEARNED_FROM) if (uri, "train") in ENDLESS else found, limit_bytes)


def find(uri: str) -> list[Found]:
    """The files of a source in order."""
    if is_library(uri):
        return local(*library_files(uri))
    if uri.startswith("builtin:"):
        raise UserError(f"unknown source {uri!r}: {nearest(uri, [STDLIB, *GENERATORS])}")
    kinds = ", ".join(READERS)
    path = Path(uri).expanduser()
    if is_url(uri):
        found = [Found(*each) for each in remote_files(uri)]
    elif path.is_file():
        found = local(path.parent, [path])
    elif path.is_dir():
        found = local(path, walk(path))
    elif glob.has_magic(uri):
        plain = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
        named = map(Path, sorted(glob.glob(str(path), recursive=True)))
        found = local(Path(*plain), (each for each in named if each.is_file()))
    else:
        raise UserError(
            f"the source {uri!r} does not exist; expected {STDLIB}, {TINYPY}, {PACKAGE}NAME, hf:NAME, or a file, a directory or "
            f"a glob of {kinds}, here or at a URL"
        )
    known = [each for each in found if suffix_of(each.file)]
    if not known:
        raise UserError(f"{uri} holds no file that is read here; expected {kinds}")
    return known


def local(root: Path, paths: Iterable[Path]) -> list[Found]:
    """Files of this machine, named with a UTF-8 form whatever bytes their names are made of."""
    found = []
    for path in paths:
        name = path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()
        known = path.stat()
        found.append(Found(name, path, known.st_size, str(known.st_mtime_ns)))
    return found
