"""Documents to token shards: read and compared here, encoded by workers, written in order."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.data.encoding import Encoding
from dsv3.data.files import Document, SkipReport
from dsv3.data.fim import FimUnit
from dsv3.data.shard_writer import ShardWriter
from dsv3.data.shards import MANIFEST, Manifest, ShardSet, file_hash
from dsv3.data.sources import ENDLESS, Split, documents, fingerprint
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.workers import encode_all
from dsv3.errors import RunError, UserError

BATCH_BYTES = 1 << 20
"""Text that is tokenized at once. The shards do not depend on it."""


class Candidate(NamedTuple):
    """A document that is no duplicate."""

    document: Document
    read: int
    """How many documents of the source had come, this one included."""
    text_hash: bytes | None
    left_out: tuple[int, int, int]
    """What had been skipped, empty and duplicate before it."""


def build_shards(
    uri: str,
    split: Split,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    seed: int,
    fim_rate: float = 0.0,
    split_joined_rate: float = 0.0,
    fim_unit: FimUnit = "character",
    validation_fraction: float = 0.05,
    limit_documents: int | None = None,
    limit_tokens: int | None = None,
    limit_bytes: int | None = None,
    earlier: Sequence[Path] | None = None,
    workers: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> Manifest:
    """Writes one split of a source as a shard set; the same arguments give the same files, whatever the `workers`.

    What an interrupted build of the same set left complete is kept, and a set that is whole is left as it is.
    `encoding.py` says what becomes of a document. With `earlier` (shard sets built the same way, or none), a document
    whose text came before, in those sets or in this one, is left out and counted; each takes 100 bytes of memory.
    A limit ends the set with the first document that reaches it; sources that never end need one.
    `progress(documents, tokens, bytes)` is called every megabyte of text with the totals so far.
    Raises `UserError` for bad input; `RunError` when the disk is full, a source disappears or a worker dies.
    """
    encoding = Encoding(seed, fim_rate, split_joined_rate, fim_unit)
    limits = (limit_documents, limit_tokens, limit_bytes)
    if (uri, split) in ENDLESS and all(limit is None for limit in limits):
        raise UserError(f"the {split} split of {uri} never ends; expected a limit in tokens, documents or bytes")
    origin = {
        "source": uri,
        "fingerprint": fingerprint(uri),
        "split": split,
        "seed": seed,
        "fim_rate": fim_rate,
        "split_joined_rate": split_joined_rate,
        "fim_unit": fim_unit,
        "validation_fraction": validation_fraction,
        "limit_documents": limit_documents,
        "limit_tokens": limit_tokens,
        "limit_bytes": limit_bytes,
        "without_duplicates_of": None if earlier is None else [file_hash(each / MANIFEST) for each in earlier],
    }
    if (whole := whole_set(Path(out_dir), tokenizer, origin)) is not None:
        return whole
    seen = None if earlier is None else {text for each in earlier for text in ShardSet.open(each).text_hashes()}
    report = SkipReport()
    found = documents(uri, split, seed=seed, validation_fraction=validation_fraction, report=report)
    candidates = without_duplicates(found, seen, report)
    last = None
    with ShardWriter(
        out_dir, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash, identity=origin
    ) as writer:

        def reached() -> bool:
            totals = zip(limits, (writer.documents, writer.tokens, writer.bytes), strict=True)
            return any(limit is not None and total >= limit for limit, total in totals)

        if kept := writer.read:
            last = next((candidate for candidate in candidates if candidate.read == kept), None)
            if last is None:
                raise RunError(
                    f"{uri} has changed since the build in {out_dir} was interrupted; delete that directory and run again"
                )
        if not reached():
            encoded = encode_all(batches(candidates), documents_of, tokenizer, encoding, workers)
            with closing(encoded):
                for batch, ids_of_each in encoded:
                    for candidate, ids in zip(batch, ids_of_each, strict=True):
                        if not reached():
                            last, document = candidate, candidate.document
                            size = len(document.text.encode())
                            writer.add(document.id, ids, size, read=candidate.read, text_hash=candidate.text_hash)
                    if progress is not None:
                        progress(writer.documents, writer.tokens, writer.bytes)
                    if reached():
                        break
        if last is None:
            raise UserError(
                f"all {report.duplicates} documents of the {split} split of {uri} came before, in it or in the sources "
                "named before it; leave the source out, or set data.deduplicate = false"
            )
        return writer.finish(origin, up_to(last, report) if reached() else report)


def whole_set(directory: Path, tokenizer: Tokenizer, origin: dict[str, Any]) -> Manifest | None:
    """The manifest of the set in `directory` if that is whole and just what would be built."""
    try:
        found = ShardSet.open(directory, tokenizer.hash)
        found.verify()
    except UserError:
        return None
    return found.manifest if found.manifest.origin == origin else None


def without_duplicates(found: Iterable[Document], seen: set[bytes] | None, report: SkipReport) -> Iterator[Candidate]:
    """All documents, or with `seen` those whose text's hash is not in it yet."""
    for read, document in enumerate(found, 1):
        text_hash = None
        if seen is not None:
            text_hash = hashlib.sha256(document.text.encode()).digest()[:16]
            if text_hash in seen:
                report.duplicates += 1
                continue
            seen.add(text_hash)
        yield Candidate(document, read, text_hash, (report.count, report.empty, report.duplicates))


def up_to(last: Candidate, report: SkipReport) -> SkipReport:
    """What had been left out when the last document was read: how far the reader was ahead must not show."""
    count, empty, duplicates = last.left_out
    return SkipReport(count, report.named[:count], empty, duplicates)


def documents_of(batch: Sequence[Candidate]) -> list[Document]:
    """The documents of a batch."""
    return [candidate.document for candidate in batch]


def batches(found: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """The documents in groups of about `BATCH_BYTES` characters."""
    batch: list[Candidate] = []
    size = 0
    for candidate in found:
        batch.append(candidate)
        size += len(candidate.document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
