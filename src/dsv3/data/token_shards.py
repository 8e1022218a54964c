"""Token shards: documents as flat arrays of ids on disk, written once, shard by shard, and read piece by piece.

A shard set is a directory:

    manifest.json           what the set is and holds; written last, so a directory without it is no shard set
    tokens-00000.bin        the ids of whole documents, one after the other; uint16 up to a vocabulary of 65536, else uint32
    documents-00000.npy     int64 [2, documents + 1]: where each document starts, in tokens and in bytes of its text
    documents-00000.names   the id of each document, one JSON string a line
    documents-00000.hashes  16 bytes a document, of its text: in sets that were built without duplicates
    shard-00000.json        only during the build: this shard is complete, and an interrupted build continues after it
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.disk import sha256
from dsv3.errors import RunError, UserError

MANIFEST = "manifest.json"
FORMAT = 1
OPEN_FILES = 128
"""Shards that stay open: large sets have more files than a process may open."""
ANEW = "delete {} and run again, which builds it anew"


@dataclass(frozen=True)
class Shard:
    """One numbered group of files and their sha256, by file name."""

    documents: int
    tokens: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a shard set is. `bytes` counts the UTF-8 of the original texts; `origin` says how they became documents."""

    format: int
    tokenizer: str
    dtype: str
    documents: int
    tokens: int
    bytes: int
    origin: dict[str, Any]
    skipped: dict[str, Any]
    shards: list[Shard]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads `directory/manifest.json`; `UserError` when the directory is no shard set."""
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in content.pop("shards")]
            manifest = cls(**content, shards=shards)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory} is no shard set: it has no {MANIFEST}, which is written last. Build it with `dsv3 data build`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no manifest with the keys {', '.join(f.name for f in fields(cls))}: {error}"
            ) from None
        if manifest.format != FORMAT:
            raise UserError(f"{path} has format {manifest.format}, expected {FORMAT}; build the shards again")
        return manifest


class ShardSet:
    """A finished shard set; `len` is its number of documents."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._dtype = np.dtype(manifest.dtype)
        self._starts: list[npt.NDArray[np.int64]] = []
        self._first = [0]
        self._stream = lru_cache(maxsize=OPEN_FILES)(FileIO)
        for number, shard in enumerate(manifest.shards):
            tokens, starts = directory / f"tokens-{number:05d}.bin", directory / f"documents-{number:05d}.npy"
            try:
                size = tokens.stat().st_size / self._dtype.itemsize
                self._starts.append(np.load(starts))
            except (OSError, ValueError) as error:
                raise UserError(f"{directory} is damaged: {error}; {ANEW.format(directory)}") from None
            shape = self._starts[-1].shape
            if (size, shape) != (shard.tokens, (2, shard.documents + 1)) or self._starts[-1][0, -1] != shard.tokens:
                raise UserError(
                    f"{tokens} is damaged: it holds {size:g} tokens and offsets of shape {shape}, the manifest says "
                    f"{shard.tokens} tokens in {shard.documents} documents; {ANEW.format(directory)}"
                )
            self._first.append(self._first[-1] + shard.documents)

    @classmethod
    def open(cls, directory: str | Path, tokenizer_hash: str | None = None) -> "ShardSet":
        """Opens a directory. `UserError` when it is no shard set, is damaged, or was made with another tokenizer."""
        manifest = Manifest.read(Path(directory))
        if tokenizer_hash is not None and manifest.tokenizer != tokenizer_hash:
            raise UserError(
                f"{directory} was built with the tokenizer {manifest.tokenizer[:12]}, the one in use is "
                f"{tokenizer_hash[:12]}; build the shards again or choose the tokenizer they were built with"
            )
        return cls(Path(directory), manifest)

    def __len__(self) -> int:
        return self.manifest.documents

    def verify(self) -> None:
        """Compares all files with their sha256 in the manifest; `UserError` names the first that differs."""
        expected = [pair for shard in self.manifest.shards for pair in shard.sha256.items()]
        with ThreadPoolExecutor(max_workers=4) as threads:
            found = threads.map(file_hash, (self.directory / name for name, _ in expected))
            for (name, hashed), actual in zip(expected, found, strict=True):
                if actual != hashed:
                    raise UserError(
                        f"{self.directory / name} is damaged: its sha256 is {actual[:12] if actual else 'none (it is gone)'}, the "
                        f"manifest says {hashed[:12]}; {ANEW.format(self.directory)}"
                    )

    def document(self, index: int, start: int = 0, length: int | None = None) -> npt.NDArray[np.integer]:
        """The token ids of one document, or `length` of them from `start` on: read-only uint16 or uint32 [length].

        Raises `RunError` when the shard has been truncated or removed since it was opened.
        """
        shard, place = self._locate(index)
        first, end = (int(at) for at in self._starts[shard][0, place : place + 2])
        count = end - first - start if length is None else length
        path = self.directory / f"tokens-{shard:05d}.bin"
        size = self._dtype.itemsize
        try:
            stream = self._stream(path)  # held, as another thread may have it leave the cache, which would close it
            data = os.pread(stream.fileno(), count * size, (first + start) * size)
        except OSError as error:
            raise RunError(f"{path} cannot be read any more: {error.strerror}. Bring it back, and continue") from error
        if len(data) < count * size:
            raise RunError(
                f"{path} ended early: expected {count} tokens of document {index} from token {first + start} on. The "
                "file was cut or replaced while it was in use; bring it back, or build the shards again, and continue"
            )
        return np.frombuffer(data, dtype=self._dtype)

    def name(self, index: int) -> str:
        """The id of one document within its source."""
        shard, place = self._locate(index)
        with open(self.directory / f"documents-{shard:05d}.names", encoding="utf-8") as lines:
            return str(json.loads(next(line for number, line in enumerate(lines) if number == place)))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return np.concatenate([np.diff(starts[0]) for starts in self._starts])

    def text_hashes(self) -> Iterator[bytes]:
        """16 bytes of hash of each document's text; nothing where the set was built without them."""
        for path in sorted(self.directory.glob("documents-*.hashes")):
            data = path.read_bytes()
            yield from (data[start : start + 16] for start in range(0, len(data), 16))

    def _locate(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]


def file_hash(path: Path) -> str | None:
    """sha256 of a file in hexadecimal; None when it is not there."""
    return sha256(path) if path.is_file() else None
