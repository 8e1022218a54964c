"""Where text comes from: `builtin:stdlib`, `builtin:tinypy`, `builtin:needle`, or the user's own files."""

import glob
import hashlib
import heapq
import os
import re
import sysconfig
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Literal

from dsv3.data import needle, tinypy
from dsv3.data.files import LONGEST_DOCUMENT, READERS, Document, SkipReport, read, suffix_of
from dsv3.errors import UserError, nearest

Split = Literal["train", "validation"]

STDLIB, TINYPY, NEEDLE = "builtin:stdlib", "builtin:tinypy", "builtin:needle"
GENERATORS = {TINYPY: tinypy, NEEDLE: needle}
"""Sources that are made from a seed, each with splits of its own."""
ENDLESS = ((TINYPY, "train"), (NEEDLE, "train"))
"""Sources and splits that never end: whoever reads one sets a limit."""

TEXT = (".txt", ".md", ".py")
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
GENERATED = re.compile(r"(auto-?|automatically )generated|generated (by|from|and used by) |do not edit", re.IGNORECASE)


def documents(
    uri: str, split: Split, *, seed: int, validation_fraction: float = 0.05, report: SkipReport | None = None
) -> Iterator[Document]:
    """The documents of one split of a source, always in the same order; `train` of a generated one never ends.

    `uri` is a builtin, a file, a directory or a glob of `.txt`, `.md`, `.py`, `.jsonl` (`.gz`, `.zst`) or `.parquet`
    (field `text`). A directory is walked in sorted order, hidden files and directories left out. Texts longer than
    256 KiB become several documents; text files of a corpus below 50 MB are cut finer, at a 200th of the corpus but
    not below 16 KiB, so that one file serves both splits. Empty documents are left out.
    A document belongs to `validation` when the sha256 of its id, as a fraction, is below `validation_fraction`; the
    splits of the generated sources, which alone use `seed`, are their own (held-out combinations).
    What cannot be read is skipped and added to `report`. Raises `UserError` at once for an unknown source or missing
    path, and at the end when nothing came.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction = {validation_fraction}: expected 0 or more and less than 1")
    report = SkipReport() if report is None else report
    if uri in GENERATORS:
        return (Document(name, text) for name, text in GENERATORS[uri].documents(split, seed))
    found = stdlib(report) if uri == STDLIB else files(uri, report)
    return choose(found, uri, split, validation_fraction, report)


def fingerprint(uri: str) -> str:
    """Changes when a source's content does (hex): of files their names, sizes and times; of a builtin its own source."""
    if uri in GENERATORS:
        # Needles are hidden among tasks.
        made_by = ("tinypy.py",) if uri == TINYPY else ("tinypy.py", "needle.py")
        return hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in made_by)).hexdigest()
    root, paths = (None, list(walk(stdlib_root(), NOT_LIBRARY))) if uri == STDLIB else find(uri)
    content = hashlib.sha256(f"{uri}:{root}".encode())
    for path in paths:
        known = path.stat()
        content.update(f"{path}:{known.st_size}:{known.st_mtime_ns}".encode(errors="surrogateescape"))
    return content.hexdigest()


def choose(
    found: Iterable[Document], uri: str, split: Split, validation_fraction: float, report: SkipReport
) -> Iterator[Document]:
    """One split of `found`, refusing to be empty."""
    seen = chosen = 0
    for document in found:
        if not document.text:
            continue
        seen += 1
        if (hash_fraction(document.id) < validation_fraction) == (split == "validation"):
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


def stdlib(report: SkipReport) -> Iterator[Document]:
    """The `.py` files of the running Python's standard library: about 9 MB of code and its prose, ids relative to it.

    Left out are the directories `test`, `tests`, `idlelib`, `lib2to3` and installed packages, and every file that a
    program wrote, by one rule: it says so within its first five lines (`_sysconfigdata*`, the tables of `encodings`,
    `pydoc_data/topics.py`, `token.py` and others).
    """
    root = stdlib_root()
    for path in walk(root, NOT_LIBRARY):
        if path.suffix == ".py":
            pieces = list(read(path, path.relative_to(root).as_posix(), report))
            if pieces and not GENERATED.search("\n".join(pieces[0].text[:2000].split("\n")[:5])):
                yield from pieces


def stdlib_root() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def files(uri: str, report: SkipReport) -> Iterator[Document]:
    """The documents of a file, a directory or a glob. Refuses before it reads."""
    if uri.startswith("builtin:"):
        raise UserError(f"unknown source {uri!r}: {nearest(uri, [STDLIB, TINYPY, NEEDLE])}")
    root, paths = find(uri)
    text_bytes = sum(path.stat().st_size for path in paths if suffix_of(path) in TEXT)
    finest = min(max(text_bytes // 200, 16 * 1024), LONGEST_DOCUMENT)

    def every() -> Iterator[Document]:
        for path in paths:
            longest = finest if suffix_of(path) in TEXT else LONGEST_DOCUMENT
            yield from read(path, printable(path.relative_to(root)), report, longest)

    return every()


def printable(path: Path) -> str:
    """A path as text with a UTF-8 form, whatever bytes its name is made of."""
    return path.as_posix().encode(errors="backslashreplace").decode()


def find(uri: str) -> tuple[Path, list[Path]]:
    """The directory that ids are relative to, and the files in order."""
    kinds = ", ".join(READERS)
    path = Path(uri).expanduser()
    if path.is_file():
        if not suffix_of(path):
            raise UserError(f"{uri} is no text that is read here; expected {kinds}")
        return path.parent, [path]
    if path.is_dir():
        root, candidates = path, list(walk(path))
    elif glob.has_magic(uri):
        plain = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
        root = Path(*plain)
        candidates = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
    else:
        raise UserError(
            f"the source {uri!r} does not exist; expected {STDLIB}, {TINYPY}, a file, a directory or a glob of {kinds}"
        )
    known = [candidate for candidate in candidates if suffix_of(candidate)]
    if not known:
        raise UserError(f"{uri} holds no file that is read here; expected {kinds}")
    return root, known


def walk(root: Path, without: Container[str] = ()) -> Iterator[Path]:
    """All files below a directory in sorted order, but for hidden ones and those in hidden directories or `without`."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith(".") and d not in without)
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path
