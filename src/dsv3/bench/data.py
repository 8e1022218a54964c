"""Megabytes of text a second that one core makes into shards, against `tokenizers` alone on the same documents."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path

import tokenizers

from dsv3.bench.measure import Progress, Result, Row, Spread, Work, ratio, take_turns
from dsv3.data.build import ShardPlan, build_shards
from dsv3.data.encoding import DocumentEncoder, Encoding
from dsv3.data.files import Document
from dsv3.data.library import STDLIB
from dsv3.data.sources import documents
from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.data.word_encoder import WordEncoder
from dsv3.errors import RunError

RATE = 0.1
"""Of fill-in-the-middle and of split tokens."""
ENCODING = Encoding(0, RATE, RATE)
TARGET = 5.0
"""Megabytes a second of one core, in the best turn: what else runs on a machine can only take from that."""


def bench_data(
    vocab_sizes: Sequence[int] = (2048, 32_768),
    rounds: int = 5,
    *,
    megabytes: float = 8.0,
    progress: Progress = lambda **_: None,
) -> Result:
    """Sides, on the first `megabytes` of the standard library: `tokenizers`' own encoding of the texts; ours of the same
    documents, fill-in-the-middle and split tokens included, by an encoder that has met their words and by a new one; and
    a whole build from files to shards, by a new one.

    One process and one thread, in seconds of its processor time. Raises `RunError` when our ids of any document differ
    from those of `tokenizers`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    every = list(documents(STDLIB, "train", seed=0))
    sizes = [size for size in accumulate(len(document.text.encode()) for document in every) if size < megabytes * 1e6]
    count, total = len(sizes), sizes[-1]
    chosen, texts = every[:count], [document.text for document in every[:count]]
    rows, ratios, checks = [], [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for vocab_size in vocab_sizes:
            tokenizer = train_tokenizer(texts, vocab_size)
            backend = tokenizers.Tokenizer.from_str(tokenizer.json)
            tokens = check(tokenizer, backend, texts)
            limit = sum(map(len, DocumentEncoder(tokenizer, ENCODING).encode(chosen)))
            group = f"vocabulary {vocab_size}"
            sides: dict[str, Work] = {
                "tokenizers": partial(backend.encode_batch_fast, texts, add_special_tokens=False),
                "dsv3 encoding, words known": partial(DocumentEncoder(tokenizer, ENCODING).encode, chosen),
                "dsv3 encoding": partial(encode, tokenizer, chosen),
                "dsv3 data build": partial(build, tokenizer, Path(scratch), limit),
            }
            seconds = take_turns(sides, rounds, progress, f"bench data, {group}", time.process_time)
            for name, each in seconds.items():
                speed = Spread.of([tokens / turn for turn in each])
                scale = total / tokens / 1e6
                rows.append(Row(name, group, speed, {"MB/s": speed.median * scale, "best turn": speed.high * scale}))
                if name == "dsv3 data build":
                    met = "met" if speed.high * scale >= TARGET else "missed"
                    checks[f"{TARGET} MB/s a core, {group}"] = f"{met}: {speed.high * scale:.2f}"
                if name != "tokenizers":
                    ratios.append(ratio(f"text a second, {group}", seconds, name, ["tokenizers"], None))
    checks["ids"] = f"the same as those of tokenizers in all {count} documents"
    shapes = {"documents": count, "megabytes": round(total / 1e6, 2), "fim_rate": RATE, "split_joined_rate": RATE}
    return Result("data", shapes, rows, ratios, checks)


def check(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, texts: list[str]) -> int:
    """Compares the ids of every text; their number."""
    expected = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    if [ids.tolist() for ids in WordEncoder(tokenizer).encode_batch(texts)] != expected:
        raise RunError("the ids of dsv3's encoder differ from those of tokenizers: the speeds cannot be compared")
    return sum(map(len, expected))


def encode(tokenizer: Tokenizer, chosen: list[Document]) -> None:
    """The ids of documents, by a new encoder."""
    DocumentEncoder(tokenizer, ENCODING).encode(chosen)


def build(tokenizer: Tokenizer, scratch: Path, limit: int) -> None:
    """Shards of the documents up to `limit` tokens, anew each time."""
    plan = ShardPlan(**asdict(ENCODING), uri=STDLIB, split="train", limit_tokens=limit)
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        build_shards(plan, tokenizer, Path(out))
