import json
import multiprocessing
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from dsv3.data import build, token_shard_writer, workers
from dsv3.data.sources import documents, hash_fraction
from dsv3.data.token_shards import ShardSet
from dsv3.errors import RunError, UserError
from tests.data.shard_sets import build_set


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    for number in range(60):
        (path / f"{number}.txt").write_text(f"def f{number}(x):\n    return [x] + {'字' * number}\n")
    (path / "bad.txt").write_bytes(b"\xff\xfe")
    return str(path)


def every(directory):
    found = ShardSet.open(directory)
    return [found.document(index).tolist() for index in range(len(found))]


def test_documents_are_framed_and_complete(corpus, tokenizer, tmp_path):
    manifest = build_set(corpus, "train", tokenizer, tmp_path / "out", seed=0)
    texts = [document.text for document in documents(corpus, "train", seed=0)]
    assert every(tmp_path / "out") == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert manifest.bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer == tokenizer.hash
    assert manifest.skipped == {
        "count": 1, "named": ["bad.txt: not UTF-8 (invalid start byte)"], "empty": 0, "duplicates": 0,
    }  # fmt: skip
    assert manifest.origin["uri"] == corpus
    assert (manifest.origin["split"], manifest.origin["seed"], manifest.origin["fim_rate"]) == ("train", 0, 0.0)


def test_the_seed_decides_and_the_batch_does_not(corpus, tokenizer, tmp_path, monkeypatch):
    options = dict(fim_rate=0.5, split_joined_rate=0.5)
    build_set(corpus, "train", tokenizer, tmp_path / "a", seed=0, **options)
    build_set(corpus, "train", tokenizer, tmp_path / "b", seed=1, **options)
    monkeypatch.setattr(build, "BATCH_BYTES", 1)
    build_set(corpus, "train", tokenizer, tmp_path / "c", seed=0, **options)
    names = ("tokens-00000.bin", "documents-00000.npy", "documents-00000.names", "manifest.json")
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "c" / n).read_bytes() for n in names]
    assert every(tmp_path / "a") != every(tmp_path / "b")


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(("count", "limit"), [(3, None), (2, 1000)])
def test_the_number_of_workers_and_where_they_start_change_no_byte(
    corpus, tokenizer, tmp_path, monkeypatch, count, limit
):
    monkeypatch.setattr(build, "BATCH_BYTES", 500)
    monkeypatch.setattr(token_shard_writer, "SHARD_BYTES", 3000)
    options = dict(seed=0, fim_rate=0.3, split_joined_rate=0.5, limit_tokens=limit, earlier=[])
    for number in range(20):
        # Read ahead of a limit, and not to be counted then.
        (Path(corpus) / f"9{number}x.txt").write_text("" if number % 2 else "again and again")
    build_set(corpus, "train", tokenizer, tmp_path / "1", **options)
    monkeypatch.setattr(workers, "ALONE", 1000)
    build_set(corpus, "train", tokenizer, tmp_path / "more", workers=count, **options)
    assert files(tmp_path / "more") == files(tmp_path / "1")


def test_a_worker_that_dies_ends_the_build_and_what_is_complete_stays(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_BYTES", 500)
    monkeypatch.setattr(workers, "ALONE", 1000)
    monkeypatch.setattr(token_shard_writer, "SHARD_BYTES", 500)
    for number in range(200):
        (Path(corpus) / f"more{number}.txt").write_text(f"one more, number {number}, and longer than the others\n")
    begun = multiprocessing.active_children()

    def kill(*_):
        for child in set(multiprocessing.active_children()) - set(begun):
            child.kill()

    with pytest.raises(RunError, match="a process that encodes documents has ended"):
        build_set(corpus, "train", tokenizer, tmp_path / "out", seed=0, workers=2, progress=kill)
    assert list((tmp_path / "out").glob("shard-*.json"))
    monkeypatch.setattr(workers, "ALONE", 1 << 20)
    build_set(corpus, "train", tokenizer, tmp_path / "out", seed=0)
    build_set(corpus, "train", tokenizer, tmp_path / "whole", seed=0)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from dsv3.data import build, token_shard_writer, workers
from dsv3.data.tokenizer import Tokenizer

build.BATCH_BYTES, token_shard_writer.SHARD_BYTES, workers.ALONE = 500, 800, 1000
corpus, tokenizer, out = sys.argv[1:]

def say(*totals):
    print(*totals, flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    plan = build.ShardPlan(0, 0.3, 0.5, uri=corpus, split="train", limit_tokens=3000)
    build.build_shards(plan, Tokenizer.load(tokenizer), Path(out), earlier=[], workers=2, progress=say)
"""


def test_after_kill_9_the_build_continues_with_the_complete_shards(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_BYTES", 500)
    monkeypatch.setattr(token_shard_writer, "SHARD_BYTES", 800)
    (Path(corpus) / "10again.txt").write_text((Path(corpus) / "10.txt").read_text())
    options = dict(seed=0, fim_rate=0.3, split_joined_rate=0.5, earlier=[], limit_tokens=3000)
    whole = build_set(corpus, "train", tokenizer, tmp_path / "whole", **options)
    assert whole.skipped["duplicates"] == 1
    assert len(whole.shards) > 4
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [sys.executable, tmp_path / "killed.py", corpus, tmp_path / "tokenizer", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    for _ in range(2):
        assert process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
    process.kill()
    process.communicate()
    kept = len(list((tmp_path / "out").glob("shard-*.json")))
    assert 0 < kept < len(whole.shards)
    written = []
    replace_file = token_shard_writer.replace_file
    monkeypatch.setattr(token_shard_writer, "replace_file", lambda *to: written.append(to[0].name) or replace_file(*to))
    assert build_set(corpus, "train", tokenizer, tmp_path / "out", **options) == whole
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert len([name for name in written if name.startswith("tokens-")]) == len(whole.shards) - kept


def test_a_whole_set_is_left_as_it_is_unless_anything_differs(corpus, tokenizer, tmp_path):
    def built(**options):
        build_set(corpus, "train", tokenizer, tmp_path / "out", **{"seed": 0, **options})
        return (tmp_path / "out" / "manifest.json").stat().st_mtime_ns

    first = built()
    assert built() == first
    assert built(seed=1) > first
    first = built()
    (Path(corpus) / "0.txt").write_text("another text")
    second = built()
    assert second > first
    tokens = tmp_path / "out" / "tokens-00000.bin"
    data = bytearray(tokens.read_bytes())
    data[0] ^= 1
    tokens.write_bytes(data)
    assert built() > second


@pytest.fixture
def twice(tmp_path):
    """Two sources with documents in common, and one document twice in the first."""
    for source, texts in {"a": ["one", "two", "one", "three"], "b": ["two", "four", "five", "four"]}.items():
        (tmp_path / source).mkdir()
        lines = [json.dumps({"text": text * 50}) for text in texts for _ in range(1)]
        (tmp_path / source / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def texts_of(directory, tokenizer):
    return [tokenizer.decode(ids[1:-1]) for ids in every(directory)]


def test_of_equal_documents_the_first_is_kept_across_sources_and_splits(twice, tokenizer):
    done, found, duplicates = [], [], 0
    # Half of the rows are in either split, in both sources.
    fraction = sum(sorted(hash_fraction(f"rows.jsonl:{n}") for n in range(1, 5))[1:3]) / 2
    for source in ("a", "b"):
        for split in ("train", "validation"):
            out = twice / "out" / source / split
            options = dict(seed=0, validation_fraction=fraction, earlier=list(done))
            manifest = build_set(str(twice / source), split, tokenizer, out, **options)
            found += texts_of(out, tokenizer)
            duplicates += manifest.skipped["duplicates"]
            done.append(out)
    assert sorted(found) == sorted(text * 50 for text in ("one", "two", "three", "four", "five"))
    assert duplicates == 3


def test_a_set_of_duplicates_alone_is_refused(twice, tokenizer):
    options = dict(seed=0, validation_fraction=0.0)
    build_set(str(twice / "a"), "train", tokenizer, twice / "out", earlier=[], **options)
    with pytest.raises(UserError, match=r"all 4 documents of the train split of .* came before.*data\.deduplicate"):
        build_set(str(twice / "a"), "train", tokenizer, twice / "more", earlier=[twice / "out"], **options)


def test_a_limit_ends_the_set(corpus, tokenizer, tmp_path):
    manifest = build_set(corpus, "train", tokenizer, tmp_path / "t", seed=0, limit_tokens=500)
    assert manifest.tokens - ShardSet.open(tmp_path / "t").lengths[-1] < 500 <= manifest.tokens


def test_endless_sources_need_a_limit(tokenizer, tmp_path):
    with pytest.raises(UserError, match="the train split of builtin:tinypy never ends; expected a limit"):
        build_set("builtin:tinypy", "train", tokenizer, tmp_path / "a", seed=0)
    assert not (tmp_path / "a").exists()
    manifest = build_set("builtin:tinypy", "train", tokenizer, tmp_path / "a", seed=0, limit_tokens=5000)
    assert 5000 <= manifest.tokens < 6000


def test_progress_counts_up(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_BYTES", 1000)
    seen = []
    manifest = build_set(
        corpus, "train", tokenizer, tmp_path / "a", seed=0, progress=lambda *totals: seen.append(totals)
    )
    assert len(seen) > 2
    assert all(a < b for earlier, later in pairwise(seen) for a, b in zip(earlier, later, strict=True))
    assert seen[-1] == (manifest.documents, manifest.tokens, manifest.bytes)


def test_empty_corpora_leave_nothing(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        build_set(str(tmp_path / "empty"), "train", tokenizer, tmp_path / "b", seed=0)
    with pytest.raises(UserError, match="is no shard set"):
        ShardSet.open(tmp_path / "b")
