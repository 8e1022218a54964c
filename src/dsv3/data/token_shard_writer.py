"""Writes shard sets (see `token_shards.py`) so that an interruption never leaves one that looks complete and is not."""

import errno
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.files import SkipReport
from dsv3.data.token_shards import FORMAT, MANIFEST, Manifest, Shard, file_hash
from dsv3.disk import replace_file
from dsv3.errors import RunError, UserError

SHARD_BYTES = 128 << 20
"""Size of `tokens-*.bin` at which a shard is written: what is held in memory, and the most that a killed build loses."""


class ShardWriter:
    """Writes a shard set into a directory: `add` documents, then `finish`. A shard is held in memory until it is complete.

    Complete shards that an earlier writer with the same `origin` (JSON-able) left, and whose hashes are right, are kept: the
    totals count them, and `read` says how many documents of the source to skip. Everything else in the directory that
    belongs to a shard set is removed at once.
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
        self._open_shard()
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._keep_complete()
            kept = {name for shard in self._shards for name in shard.sha256}
            kept |= {f"shard-{number:05d}.json" for number in range(len(self._shards))}
            for pattern in (f"{MANIFEST}*", "tokens-*.bin*", "documents-*.*", "shard-*.json*"):
                for old in directory.glob(pattern):
                    if old.name not in kept:
                        old.unlink()

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
        self._tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        for starts, length in zip(self._starts, (len(ids), byte_count), strict=True):
            starts.append(starts[-1] + length)
        self._names.append(json.dumps(name))
        self._text_hashes.append(text_hash or b"")
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += byte_count
        self.read = read
        if self._tokens.tell() >= self._shard_bytes:
            self._close_shard()

    def finish(self, skipped: SkipReport) -> Manifest:
        """Writes the manifest; from here on the directory is a shard set."""
        with storage_errors(self.directory):
            if self._names:
                self._close_shard()
            manifest = Manifest(
                FORMAT, self.tokenizer_hash, self.dtype.name, self.documents, self.tokens, self.bytes, self.origin,
                asdict(skipped), self._shards,
            )  # fmt: skip
            replace_file(self.directory / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
            for record in self.directory.glob("shard-*.json"):
                record.unlink()
        return manifest

    def _open_shard(self) -> None:
        self._tokens = BytesIO()
        self._starts = (array("q", [0]), array("q", [0]))
        self._names: list[str] = []
        self._text_hashes: list[bytes] = []

    def _close_shard(self) -> None:
        """Writes the shard's files, then the record that it is complete: all of them or none."""
        number, starts = f"{len(self._shards):05d}", BytesIO()
        np.save(starts, np.array(self._starts, dtype="<i8"))
        files = {
            f"tokens-{number}.bin": self._tokens.getvalue(),
            f"documents-{number}.npy": starts.getvalue(),
            f"documents-{number}.names": "".join(f"{name}\n" for name in self._names).encode(),
        }
        if hashes := b"".join(self._text_hashes):
            files[f"documents-{number}.hashes"] = hashes
        sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        shard = Shard(len(self._names), self._starts[0][-1], sha256)
        totals = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "read": self.read}
        record = {"identity": self._identity, "shard": asdict(shard), "totals": totals}
        files[f"shard-{number}.json"] = json.dumps(record, indent=2).encode()
        with storage_errors(self.directory):
            try:
                for name, data in files.items():
                    replace_file(self.directory / name, data)
            except BaseException:
                for name in files:
                    (self.directory / name).unlink(missing_ok=True)
                raise
        self._shards.append(shard)
        self._open_shard()

    def _keep_complete(self) -> None:
        """Keeps the complete shards of an interrupted build, up to the first that is missing or damaged."""
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
    """Turns errors of the file system into a `UserError` or a `RunError`."""
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
