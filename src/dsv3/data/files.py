"""Text in files: one reader a format, in memory bounded whatever the size of file, line or row."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from dsv3.data.remote import RemoteFile
from dsv3.errors import RunError, UserError

LONGEST_DOCUMENT = 256 * 1024
"""Bytes of UTF-8. A longer text becomes several documents."""
LONGEST_ROW = 64 * 1024 * 1024
"""Bytes of one line of `.jsonl`. A longer one is skipped."""
FIELD = "text"
"""The field of a `.jsonl` or `.parquet` row that holds its text."""
NAMED = 100
File = Path | RemoteFile


@dataclass(frozen=True)
class Document:
    """One text. `id` names it within its source and decides its split."""

    id: str
    text: str


@dataclass
class SkipReport:
    """What was left out: files or rows that could not be read (the first hundred by name, with the reason), empty documents
    and duplicates."""

    count: int = 0
    named: list[str] = field(default_factory=list)
    empty: int = 0
    duplicates: int = 0

    def add(self, name: str, reason: str) -> None:
        """Counts one file or row."""
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"{name}: {reason}")


Reader = Callable[[SkipReport], Iterator[Document]]
"""Gives all documents of a source, as often as it is called."""


def read(path: File, name: str, report: SkipReport, longest: int = LONGEST_DOCUMENT) -> Iterator[Document]:
    """The documents of one file, with ids that start with `name`; at most `longest` bytes each.

    What cannot be read is added to `report`: a whole text file with an undecodable byte, a single row of the others.
    Raises `RunError` for a file that has disappeared since it was listed.
    """
    yield from READERS[suffix_of(path)](path, name, report, longest)


def suffix_of(path: File) -> str:
    """The known ending of a file name (`.jsonl.zst`), empty for any other file."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), "")


def read_text(path: File, name: str, report: SkipReport, longest: int) -> Iterator[Document]:
    """`.txt`, `.md`, `.py`: the file is the document."""
    try:
        with path.open("rb") as stream:
            # A first pass, so that a file is used as a whole or not at all.
            count = sum(1 for piece in pieces(stream, longest) if piece.decode() is not None)
        with path.open("rb") as stream:
            for number, piece in enumerate(pieces(stream, longest)):
                text = piece.decode().removeprefix("\ufeff")
                yield Document(name if count == 1 else f"{name}#{number}", text)
    except UnicodeDecodeError as error:
        report.add(name, f"not UTF-8 ({error.reason})")
    except OSError as error:
        refuse_gone(path, error)
        report.add(name, error.strerror or str(error))


def read_jsonl(path: File, name: str, report: SkipReport, longest: int) -> Iterator[Document]:
    """`.jsonl`, plain or compressed: one object a line, its text in the field `text`."""
    number = 0
    try:
        with open_bytes(path) as stream:
            while line := stream.readline(LONGEST_ROW):
                number += 1
                if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                    report.add(f"{name}:{number}", f"longer than {LONGEST_ROW >> 20} MiB")
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(LONGEST_ROW)
                elif not line.isspace():
                    yield from cut_row(parse_row(line), f"{name}:{number}", report, longest)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        refuse_gone(path, error)
        report.add(name, f"unreadable after row {number} ({error})")


def read_parquet(path: File, name: str, report: SkipReport, longest: int) -> Iterator[Document]:
    """`.parquet`: one document a row, its text in the column `text`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow: pip install 'dsv3[parquet]'") from None
    number = 0
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            if FIELD not in file.schema_arrow.names:
                report.add(name, f"no column {FIELD!r} among {', '.join(file.schema_arrow.names)}")
                return
            for batch in file.iter_batches(batch_size=64, columns=[FIELD]):
                for value in batch.column(0):
                    number += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        text = None
                    yield from cut_row(text, f"{name}:{number}", report, longest)
    except (OSError, pyarrow.ArrowException) as error:
        refuse_gone(path, error)
        report.add(name, f"unreadable after row {number} ({error})")


def refuse_gone(path: File, error: Exception) -> None:
    """Raises `RunError` when the file, its disk or its server is gone, as opposed to bad content."""
    denied = isinstance(error, PermissionError)
    gone = isinstance(error, FileNotFoundError | ConnectionError | TimeoutError)
    if gone or (isinstance(error, OSError) and error.errno is not None and not denied):
        raise RunError(
            f"{path} was there when its source was listed, and cannot be read now: {getattr(error, 'strerror', 0) or error}. "
            "Bring it back and run again: what is complete is kept"
        ) from error


def parse_row(line: bytes) -> Any:
    """The text of one line of `.jsonl`; None when there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row.get(FIELD) if isinstance(row, dict) else None


def cut_row(text: Any, name: str, report: SkipReport, longest: int) -> Iterator[Document]:
    """A row's text as one document, or as several where it is long."""
    if not isinstance(text, str):
        report.add(name, f"no text in the field {FIELD!r}")
        return
    try:
        data = text.encode()
    except UnicodeEncodeError:
        report.add(name, "no UTF-8 form (lone surrogates)")
        return
    if len(data) <= longest:
        yield Document(name, text)
    else:
        for number, piece in enumerate(pieces(io.BytesIO(data), longest)):
            yield Document(f"{name}#{number}", piece.decode())


def pieces(stream: BinaryIO, longest: int) -> Iterator[bytes]:
    """The stream in pieces of at most `longest` bytes, cut after a line break or a space where possible, and never inside a character."""
    held = stream.read(longest + 1)
    while len(held) > longest:
        cut = cut_point(held, longest)
        yield held[:cut]
        held = held[cut:]
        held += stream.read(longest + 1 - len(held))
    yield held


def cut_point(data: bytes, longest: int) -> int:
    """Where to cut `data`, which is longer than `longest`: in the second half of what is allowed."""
    for mark in (b"\n", b" "):
        if (found := data.rfind(mark, longest // 2, longest)) >= 0:
            return found + 1
    # A UTF-8 character has up to three continuation bytes, which start with the bits 10.
    return next((cut for cut in range(longest, longest - 4, -1) if data[cut] & 0xC0 != 0x80), longest)


def open_bytes(path: File) -> BinaryIO:
    """The decompressed bytes of a file."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path.open("rb"), "rb")  # type: ignore[return-value]  # a GzipFile reads like a BinaryIO
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(ChunkStream(decompress_zstd(path)))
    return path.open("rb")


def decompress_zstd(path: File) -> Iterator[bytes]:
    """The content of a `.zst` file. `EOFError` when it ends inside a frame, which zstandard's own reader does not report."""
    decoder = None
    with path.open("rb") as stream:
        # Small blocks: one byte may stand for 32 KiB, and what a block yields is held in memory.
        while block := stream.read(2048):
            while block:
                if decoder is None or decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                yield decoder.decompress(block)
                block = decoder.unused_data
    if decoder is not None and not decoder.eof:
        raise EOFError("the file ends inside a compressed frame")


class ChunkStream(io.RawIOBase):
    """Chunks of bytes as a readable stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` with what is there; 0 at the end."""
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = memoryview(chunk)
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count


READERS: dict[str, Callable[[File, str, SkipReport, int], Iterator[Document]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".parquet": read_parquet,
}


def walk(root: Path, without: Container[str] = ()) -> Iterator[Path]:
    """All files below a directory in sorted order, but for hidden ones and those in hidden directories or `without`."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith(".") and d not in without)
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file():
                yield path
