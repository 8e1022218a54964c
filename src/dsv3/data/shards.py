"""Token shards: documents as flat arrays of ids on disk, written once and read through memory maps.

A shard set is a directory:

    manifest.json           what the set is and holds; written last, so a directory without it is no shard set
    tokens-00000.bin        the ids of whole documents, one after the other; uint16 up to a vocabulary of 65536, else uint32
    documents-00000.npy     int64 [2, documents + 1]: where each document starts, in tokens and in bytes of its text
    documents-00000.names   the id of each document, one JSON string a line
"""

import errno
import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsv3.data.files import SkipReport
from dsv3.errors import RunError, UserError

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_BYTES = 1 << 30
"""Size of `tokens-*.bin` from which the next document opens another shard."""


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


class ShardWriter:
    """Writes a shard set into a directory: `add` documents, then `finish`, inside a `with` block.

    Leaving the block without `finish` removes what was written. An existing set in the directory is given up at once.
    Raises `UserError` when the directory cannot be written to, `RunError` when the disk is full or fails.
    """

    def __init__(
        self, directory: str | Path, *, vocab_size: int, tokenizer_hash: str, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.directory = Path(directory)
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self.tokenizer_hash = tokenizer_hash
        self.documents = self.tokens = self.bytes = 0
        self._shard_bytes = shard_bytes
        self._shards: list[Shard] = []
        self._files: list[Path] = []
        self._stream: BinaryIO | None = None
        self._finished = False
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for pattern in (MANIFEST, "tokens-*.bin", "documents-*.npy", "documents-*.names"):
                for old in self.directory.glob(pattern):
                    old.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            if self._stream is not None:
                self._stream.close()
            for path in self._files:
                path.unlink(missing_ok=True)

    def add(self, name: str, ids: Sequence[int], byte_count: int) -> None:
        """Appends one document: its id, its tokens, and the bytes of UTF-8 of its original text."""
        with storage_errors(self.directory):
            if self._stream is None:
                self._stream = self._create("tokens", "bin")
                self._hash = hashlib.sha256()
                self._starts = (array("q", [0]), array("q", [0]))
                self._names: list[str] = []
            data = np.asarray(ids, dtype=self.dtype).tobytes()
            self._stream.write(data)
            self._hash.update(data)
            for starts, length in zip(self._starts, (len(ids), byte_count), strict=True):
                starts.append(starts[-1] + length)
            self._names.append(json.dumps(name))
            self.documents += 1
            self.tokens += len(ids)
            self.bytes += byte_count
            if self._starts[0][-1] * self.dtype.itemsize >= self._shard_bytes:
                self._close_shard(self._stream)

    def finish(self, origin: dict[str, Any], skipped: SkipReport) -> Manifest:
        """Writes the manifest; from here on the directory is a shard set."""
        with storage_errors(self.directory):
            if self._stream is not None:
                self._close_shard(self._stream)
            manifest = Manifest(
                format=FORMAT,
                tokenizer=self.tokenizer_hash,
                dtype=self.dtype.name,
                documents=self.documents,
                tokens=self.tokens,
                bytes=self.bytes,
                origin=origin,
                skipped=asdict(skipped),
                shards=self._shards,
            )
            temporary = self.directory / f"{MANIFEST}.partial"
            self._files.append(temporary)
            with open(temporary, "wb") as stream:
                stream.write(json.dumps(asdict(manifest), indent=2).encode() + b"\n")
                make_durable(stream)
            os.replace(temporary, self.directory / MANIFEST)
            self._finished = True
        return manifest

    def _create(self, kind: str, suffix: str) -> BinaryIO:
        path = self.directory / f"{kind}-{len(self._shards):05d}.{suffix}"
        self._files.append(path)
        return open(path, "wb")

    def _close_shard(self, stream: BinaryIO) -> None:
        make_durable(stream)
        stream.close()
        self._stream = None
        starts = BytesIO()
        np.save(starts, np.array(self._starts, dtype="<i8"))
        number = f"{len(self._shards):05d}"
        hashes = {f"tokens-{number}.bin": self._hash.hexdigest()}
        names = "".join(f"{name}\n" for name in self._names).encode()
        for kind, suffix, data in (("documents", "npy", starts.getvalue()), ("documents", "names", names)):
            with self._create(kind, suffix) as file:
                file.write(data)
                make_durable(file)
            hashes[f"{kind}-{number}.{suffix}"] = hashlib.sha256(data).hexdigest()
        self._shards.append(Shard(len(self._names), self._starts[0][-1], hashes))


class ShardSet:
    """A finished shard set, read through memory maps. `len` counts documents."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._tokens: list[npt.NDArray[np.integer]] = []
        self._starts: list[npt.NDArray[np.int64]] = []
        self._first = [0]
        for number, shard in enumerate(manifest.shards):
            tokens, starts = directory / f"tokens-{number:05d}.bin", directory / f"documents-{number:05d}.npy"
            try:
                self._tokens.append(np.memmap(tokens, dtype=manifest.dtype, mode="r"))
                self._starts.append(np.load(starts, mmap_mode="r"))
            except (OSError, ValueError) as error:
                raise UserError(f"{directory} is damaged: {error}; build the shards again") from None
            found = (self._tokens[-1].size, self._starts[-1].shape)
            if found != (shard.tokens, (2, shard.documents + 1)) or self._starts[-1][0, -1] != shard.tokens:
                raise UserError(
                    f"{tokens} is damaged: it holds {found[0]} tokens and offsets of shape {found[1]}, the manifest says "
                    f"{shard.tokens} tokens in {shard.documents} documents; build the shards again"
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

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """The token ids of one document: a read-only view of the file, uint16 or uint32 [length]."""
        shard, place = self._locate(index)
        start, end = self._starts[shard][0, place : place + 2]
        return self._tokens[shard][start:end]

    def name(self, index: int) -> str:
        """The id of one document within its source, as the source gave it."""
        shard, place = self._locate(index)
        with open(self.directory / f"documents-{shard:05d}.names", encoding="utf-8") as lines:
            return str(json.loads(next(line for number, line in enumerate(lines) if number == place)))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return np.concatenate([np.diff(starts[0]) for starts in self._starts])

    @cached_property
    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of UTF-8 of each document's original text, int64 [documents]."""
        return np.concatenate([np.diff(starts[1]) for starts in self._starts])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]


def make_durable(stream: BinaryIO) -> None:
    """Brings what was written to the disk, so that no manifest outlives its shards in a crash."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def storage_errors(directory: Path) -> Iterator[None]:
    """Turns failures of the file system into one paragraph."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"cannot write shards into {directory}: {error.strerror}; choose a directory that can be written to"
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UserError(
                f"cannot write shards into {directory}: {error.strerror}; choose a directory that can be written to"
            ) from error
        raise RunError(
            f"writing shards into {directory} failed: {error.strerror}. What was written has been removed; "
            f"free some space, or choose another disk, and run again"
        ) from error
