"""Documents to token shards: fill-in-the-middle, tokens, bos and eos, files."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

from dsv3.data.files import Document, SkipReport
from dsv3.data.fim import fim_document, fim_ids
from dsv3.data.joined import joined_newline_splits, split_joined
from dsv3.data.shard_writer import ShardWriter
from dsv3.data.shards import Manifest
from dsv3.data.sources import ENDLESS, Split, documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError

BATCH_BYTES = 1 << 20
"""Text that is tokenized at once. The shards do not depend on it."""


def build_shards(
    uri: str,
    split: Split,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    seed: int,
    fim_rate: float = 0.0,
    split_joined_rate: float = 0.0,
    validation_fraction: float = 0.05,
    limit_documents: int | None = None,
    limit_tokens: int | None = None,
    limit_bytes: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Manifest:
    """Writes one split of a source as a shard set; the same arguments give the same files.

    Each document becomes `bos, tokens, eos` (a bos per document is a choice: the report does not say), a share
    `fim_rate` of them rearranged (`fim.py`), and tokens that join punctuation with line breaks split at
    `split_joined_rate`. What is random depends on the seed and the document's id alone.
    A limit ends the set with the first document that reaches it; sources that never end need one.
    `progress(documents, tokens, bytes)` is called every megabyte of text with the totals so far.
    Raises `UserError` for bad input, `RunError` when the disk is full; either way no half of a set remains.
    """
    for name, rate in (("fim_rate", fim_rate), ("split_joined_rate", split_joined_rate)):
        if not 0 <= rate <= 1:
            raise UserError(f"{name} = {rate}: expected a share from 0 to 1")
    limits = (limit_documents, limit_tokens, limit_bytes)
    if (uri, split) in ENDLESS and all(limit is None for limit in limits):
        raise UserError(f"the {split} split of {uri} never ends; expected a limit in tokens, documents or bytes")
    report = SkipReport()
    splits = joined_newline_splits(tokenizer) if split_joined_rate else {}
    found = documents(uri, split, seed=seed, validation_fraction=validation_fraction, report=report)
    with ShardWriter(out_dir, vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash) as writer:

        def reached() -> bool:
            totals = zip(limits, (writer.documents, writer.tokens, writer.bytes), strict=True)
            return any(limit is not None and total >= limit for limit, total in totals)

        for batch in batches(found):
            for document, ids in zip(
                batch, encode(batch, tokenizer, seed, fim_rate, split_joined_rate, splits), strict=True
            ):
                if not reached():
                    writer.add(document.id, ids, len(document.text.encode()))
            if progress is not None:
                progress(writer.documents, writer.tokens, writer.bytes)
            if reached():
                break
        origin = {
            "source": uri,
            "split": split,
            "seed": seed,
            "fim_rate": fim_rate,
            "split_joined_rate": split_joined_rate,
            "validation_fraction": validation_fraction,
            "limit_documents": limit_documents,
            "limit_tokens": limit_tokens,
            "limit_bytes": limit_bytes,
        }
        return writer.finish(origin, report)


def encode(
    batch: list[Document],
    tokenizer: Tokenizer,
    seed: int,
    fim_rate: float,
    split_joined_rate: float,
    splits: dict[int, tuple[list[int], list[int]]],
) -> Iterator[list[int]]:
    """The finished ids of each document, bos and eos included."""
    generators = [Random(f"{seed}:{document.id}") for document in batch]
    cut = [fim_document(d.text, rng, fim_rate) for d, rng in zip(batch, generators, strict=True)]
    texts = [text for d, parts in zip(batch, cut, strict=True) for text in (parts or (d.text,))]
    encoded = iter(tokenizer.encode_batch(texts))
    for parts, rng in zip(cut, generators, strict=True):
        if parts is None:
            body = split_joined(next(encoded), splits, split_joined_rate, rng)
        else:
            prefix, middle, suffix = (split_joined(next(encoded), splits, split_joined_rate, rng) for _ in parts)
            body = fim_ids(prefix, middle, suffix, tokenizer)
        yield [tokenizer.bos_id, *body, tokenizer.eos_id]


def batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in groups of about `BATCH_BYTES` characters."""
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
