"""Writes shard sets (`token_shards.py` says what they are), so that whatever stops it leaves nothing that looks whole and is not."""

import errno
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsv3.data.files import SkipReport
from dsv3.data.token_shards import FORMAT, MANIFEST, Manifest, Shard, file_hash
from dsv3.disk import replace_file, sync
from dsv3.errors import RunError, UserError

SHARD_BYTES = 128 << 20
"""Size of `tokens-*.bin` from which the next document opens another shard: what a killed build loses at most."""


class ShardWriter:
    """Writes a shard set into a directory: `add` documents, then `finish`, inside a `with` block.

    Leaving the block without `finish` removes the shard that was not complete. Complete shards that an earlier writer with
    the same `origin` (JSON-able) left, and whose hashes are right, are kept: the totals count them, and `read` says how many
    documents of the source to pass over. Everything else in the directory that belongs to a shard set is removed at once.
    Raises `UserError` when the directory cannot be written to, `RunError` when the disk is full or fails.
    """

    def __init__(
        self,
        directory: Path,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        origin: dict[str, Any],
        shard_bytes: int | None = None,
    ) -> None:
        self.directory, self.tokenizer_hash, self.origin = directory, tokenizer_hash, origin
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self.documents = self.tokens = self.bytes = self.read = 0
        self._shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        # Through JSON and back, as records are: tuples become lists.
        self._identity = json.loads(json.dumps([tokenizer_hash, self.dtype.name, origin]))
        self._shards: list[Shard] = []
        self._files: list[Path] = []
        """Those of the shard that is not complete."""
        self._stream: BinaryIO | None = None
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._keep_complete()
            kept = {name for shard in self._shards for name in shard.sha256}
            kept |= {f"shard-{number:05d}.json" for number in range(len(self._shards))}
            for pattern in (f"{MANIFEST}*", "tokens-*.bin", "documents-*.*", "shard-*.json*"):
                for old in self.directory.glob(pattern):
                    if old.name not in kept:
                        old.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        for path in self._files:
            path.unlink(missing_ok=True)

    def add(
        self,
        name: str,
        ids: Sequence[int] | npt.NDArray[np.integer],
        byte_count: int,
        *,
        read: int = 0,
        text_hash: bytes | None = None,
    ) -> None:
        """Appends one document: its id, its tokens, and the bytes of UTF-8 of its original text.

        `read` counts the source's documents up to and including this one. `text_hash` (16 bytes) is kept where it is
        given, for all documents of a set or for none.
        """
        with storage_errors(self.directory):
            if self._stream is None:
                self._stream = self._create("tokens", "bin")
                self._hash = hashlib.sha256()
                self._starts = (array("q", [0]), array("q", [0]))
                self._names: list[str] = []
                self._text_hashes: list[bytes] = []
            data = np.asarray(ids, dtype=self.dtype).tobytes()
            self._stream.write(data)
            self._hash.update(data)
            for starts, length in zip(self._starts, (len(ids), byte_count), strict=True):
                starts.append(starts[-1] + length)
            self._names.append(json.dumps(name))
            if text_hash is not None:
                self._text_hashes.append(text_hash)
            self.documents += 1
            self.tokens += len(ids)
            self.bytes += byte_count
            self.read = read
            if self._starts[0][-1] * self.dtype.itemsize >= self._shard_bytes:
                self._close_shard(self._stream)

    def finish(self, skipped: SkipReport) -> Manifest:
        """Writes the manifest; from here on the directory is a shard set."""
        with storage_errors(self.directory):
            if self._stream is not None:
                self._close_shard(self._stream)
            manifest = Manifest(
                FORMAT, self.tokenizer_hash, self.dtype.name, self.documents, self.tokens, self.bytes, self.origin,
                asdict(skipped), self._shards,
            )  # fmt: skip
            replace_file(self.directory / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
            for record in self.directory.glob("shard-*.json"):
                record.unlink()
        return manifest

    def _create(self, kind: str, suffix: str) -> BinaryIO:
        path = self.directory / f"{kind}-{len(self._shards):05d}.{suffix}"
        self._files.append(path)
        return open(path, "wb")

    def _close_shard(self, stream: BinaryIO) -> None:
        stream.close()
        self._stream = None
        starts = BytesIO()
        np.save(starts, np.array(self._starts, dtype="<i8"))
        number = f"{len(self._shards):05d}"
        hashes = {f"tokens-{number}.bin": self._hash.hexdigest()}
        beside = {"npy": starts.getvalue(), "names": "".join(f"{name}\n" for name in self._names).encode()}
        if self._text_hashes:
            beside["hashes"] = b"".join(self._text_hashes)
        for suffix, data in beside.items():
            with self._create("documents", suffix) as file:
                file.write(data)
            hashes[f"documents-{number}.{suffix}"] = hashlib.sha256(data).hexdigest()
        # So that no record or manifest outlives its shards in a crash.
        for path in self._files:
            sync(path)
        shard = Shard(len(self._names), self._starts[0][-1], hashes)
        totals = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "read": self.read}
        record = {"identity": self._identity, "shard": asdict(shard), "totals": totals}
        replace_file(self.directory / f"shard-{number}.json", json.dumps(record, indent=2))
        self._files.clear()
        self._shards.append(shard)

    def _keep_complete(self) -> None:
        """Takes over the complete shards of an interrupted build, up to the first that is missing or damaged."""
        while True:
            try:
                record = json.loads(
                    (self.directory / f"shard-{len(self._shards):05d}.json").read_text(encoding="utf-8")
                )
            except (FileNotFoundError, ValueError):
                return
            shard = Shard(**record["shard"])
            whole = all(file_hash(self.directory / name) == found for name, found in shard.sha256.items())
            if record["identity"] != self._identity or not whole:
                return
            self._shards.append(shard)
            for name, total in record["totals"].items():
                setattr(self, name, total)


@contextmanager
def storage_errors(directory: Path) -> Iterator[None]:
    """Turns failures of the file system into one paragraph."""
    try:
        yield
    except OSError as error:
        refused = isinstance(error, PermissionError | FileExistsError | NotADirectoryError)
        if refused or error.errno == errno.EROFS:
            raise UserError(
                f"cannot write shards into {directory}: {error.strerror}; choose a directory that can be written to"
            ) from error
        raise RunError(
            f"writing shards into {directory} failed: {error.strerror}. Complete shards are kept, the last one has been "
            f"removed; free some space and run again, or choose another disk"
        ) from error
