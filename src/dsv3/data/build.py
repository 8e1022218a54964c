"""Documents to token shards: read and compared here, encoded by workers, written in order."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv3.data.encoding import Encoding
from dsv3.data.files import Document, SkipReport
from dsv3.data.sources import ENDLESS, VALIDATION_FRACTION, Split, documents, fingerprint
from dsv3.data.token_shard_writer import ShardWriter
from dsv3.data.token_shards import MANIFEST, Manifest, ShardSet, file_hash
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.workers import encode_all
from dsv3.errors import RunError, UserError

BATCH_BYTES = 1 << 20
"""Text that is tokenized at once. The shards do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan(Encoding):
    """Which documents become a shard set (`sources.py`), and how they are encoded."""

    uri: str
    split: Split
    validation_fraction: float = VALIDATION_FRACTION
    limit_tokens: int | None = None
    """The set ends with the first document that reaches this many; endless sources need a limit."""

    def reached(self, tokens: int) -> bool:
        """Whether the set has enough tokens."""
        return self.limit_tokens is not None and tokens >= self.limit_tokens


@dataclass(frozen=True)
class Candidate(Document):
    """A document that is not a duplicate."""

    read: int
    """Documents of the source read so far, this one included."""
    text_hash: bytes | None
    left_out: tuple[int, int, int]
    """How many had been skipped, were empty, and were duplicates before it."""


Progress = Callable[[int, int, int], None]
"""Called about once a megabyte of text with the documents, tokens and bytes in the set so far."""


def build_shards(
    plan: ShardPlan,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    earlier: Sequence[Path] | None = None,
    workers: int = 1,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Writes a shard set; the same plan gives the same files, whatever the `workers`.

    Shards that an interrupted build of the same set completed are kept, and a complete set is left as it is. With `earlier`
    (shard sets built the same way; may be empty), a document whose text is already in those sets or in this one is left out
    and counted; each document takes 100 bytes of memory.
    Raises `UserError` for bad input; `RunError` when the disk is full, a source disappears or a worker dies.
    """
    if (plan.uri, plan.split) in ENDLESS and plan.limit_tokens is None:
        raise UserError(f"the {plan.split} split of {plan.uri} never ends; expected a limit in tokens")
    before = None if earlier is None else [file_hash(each / MANIFEST) for each in earlier]
    origin = {**asdict(plan), "fingerprint": fingerprint(plan.uri), "without_duplicates_of": before}
    if (whole := whole_set(directory, tokenizer, origin)) is not None:
        return whole
    seen = None if earlier is None else {text for each in earlier for text in ShardSet.open(each).text_hashes()}
    report = SkipReport()
    fraction = plan.validation_fraction
    found = documents(plan.uri, plan.split, seed=plan.seed, validation_fraction=fraction, report=report)
    candidates = without_duplicates(found, seen, report)
    writer = ShardWriter(directory, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash, origin=origin)
    last = None
    if writer.read:
        last = next((each for each in candidates if each.read == writer.read), None)
        if last is None:
            raise RunError(
                f"{plan.uri} has changed since the build in {directory} was interrupted; delete that directory and run again"
            )
    if not plan.reached(writer.tokens):
        with closing(encode_all(batches(candidates), tokenizer, plan, workers)) as encoded:
            last = fill(writer, plan, encoded, progress) or last
    if last is None:
        raise UserError(
            f"all {report.duplicates} documents of the {plan.split} split of {plan.uri} came before, in it or in the "
            "sources named before it; leave the source out, or set data.deduplicate = false"
        )
    if plan.reached(writer.tokens):
        # How far the reader was ahead of the limit must not show.
        count, empty, duplicates = last.left_out
        report = SkipReport(count, report.named[:count], empty, duplicates)
    return writer.finish(report)


def whole_set(directory: Path, tokenizer: Tokenizer, origin: dict[str, Any]) -> Manifest | None:
    """The manifest of the set in `directory` if it is complete, undamaged and what would be built."""
    try:
        found = ShardSet.open(directory, tokenizer.hash)
        found.verify()
    except UserError:
        return None
    return found.manifest if found.manifest.origin == origin else None


def without_duplicates(found: Iterable[Document], seen: set[bytes] | None, report: SkipReport) -> Iterator[Candidate]:
    """All documents, or with `seen` those whose text is not in it yet (by hash)."""
    for read, document in enumerate(found, 1):
        text_hash = None
        if seen is not None:
            text_hash = hashlib.sha256(document.text.encode()).digest()[:16]
            if text_hash in seen:
                report.duplicates += 1
                continue
            seen.add(text_hash)
        yield Candidate(document.id, document.text, read, text_hash, (report.count, report.empty, report.duplicates))


def fill(
    writer: ShardWriter,
    plan: ShardPlan,
    encoded: Iterable[tuple[Sequence[Candidate], list[npt.NDArray[np.uint32]]]],
    progress: Progress,
) -> Candidate | None:
    """Writes documents up to the limit, or all of them; returns the last one written."""
    last = None
    for batch, ids_of_each in encoded:
        for last, ids in zip(batch, ids_of_each, strict=True):
            writer.add(last.id, ids, len(last.text.encode()), read=last.read, text_hash=last.text_hash)
            if plan.reached(writer.tokens):
                break
        progress(writer.documents, writer.tokens, writer.bytes)
        if plan.reached(writer.tokens):
            break
    return last


def batches(found: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """The documents in groups of about `BATCH_BYTES` characters."""
    batch: list[Candidate] = []
    size = 0
    for candidate in found:
        batch.append(candidate)
        size += len(candidate.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
