"""Small shard sets, whole and interrupted, for several test files."""

import hashlib
from pathlib import Path

from dsv3.data.build import ShardPlan, build_shards
from dsv3.data.files import SkipReport
from dsv3.data.token_shard_writer import ShardWriter

DOCUMENTS = [("a.py", [0, 300, 65535, 1], 9), ("dir/ü\n.txt", [0, 1], 0), ("c", [0, *range(1000), 1], 4000)]


def build_set(source, split, tokenizer, directory, *, earlier=None, workers=1, progress=lambda *_: None, **how):
    """`build_shards` of a plan."""
    plan = ShardPlan(uri=source, split=split, **how)
    return build_shards(plan, tokenizer, Path(directory), earlier=earlier, workers=workers, progress=progress)


def write(directory, documents=DOCUMENTS, *, vocab_size=65536, shard_bytes=None):
    origin = {"source": "here", "seed": 3}
    options = dict(vocab_size=vocab_size, tokenizer_hash="hash", shard_bytes=shard_bytes, origin=origin)
    writer = ShardWriter(directory, **options)
    for name, ids, byte_count in documents:
        writer.add(name, ids, byte_count)
    return writer.finish(SkipReport(1, ["bad: why"]))


def many(count=12):
    return [(f"{n}.txt", list(range(n, n + 30)), 50 + n) for n in range(count)]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def begin(directory, documents, origin, stop=None, *, hashes=False):
    """Writes until `stop` documents are there, then is interrupted; without `stop`, to the end. How many were kept."""
    options = dict(vocab_size=65536, tokenizer_hash="hash", shard_bytes=200, origin=origin)
    writer = ShardWriter(directory, **options)
    kept = writer.documents
    assert writer.read == 2 * kept
    for number, (name, ids, byte_count) in enumerate(documents):
        if number == stop:
            raise KeyboardInterrupt
        if number >= kept:
            text_hash = hashlib.sha256(name.encode()).digest()[:16] if hashes else None
            writer.add(name, ids, byte_count, read=2 * (number + 1), text_hash=text_hash)
    writer.finish(SkipReport())
    return kept
