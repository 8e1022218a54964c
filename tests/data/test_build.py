from itertools import pairwise

import pytest

from dsv3.data import build
from dsv3.data.build import build_shards
from dsv3.data.joined import joined_newline_splits
from dsv3.data.shards import ShardSet
from dsv3.data.sources import documents
from dsv3.errors import UserError


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


def unfim(ids, tokenizer):
    if tokenizer.fim_begin_id not in ids:
        return ids
    hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
    return [ids[0], *ids[2:hole], *ids[end + 1 : -1], *ids[hole + 1 : end], ids[-1]]


def test_documents_are_framed_and_complete(corpus, tokenizer, tmp_path):
    manifest = build_shards(corpus, "train", tokenizer, tmp_path / "out", seed=0)
    texts = [document.text for document in documents(corpus, "train", seed=0)]
    assert every(tmp_path / "out") == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert manifest.bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer == tokenizer.hash
    assert manifest.skipped == {"count": 1, "named": ["bad.txt: not UTF-8 (invalid start byte)"]}
    assert manifest.origin["source"] == corpus
    assert (manifest.origin["split"], manifest.origin["seed"], manifest.origin["fim_rate"]) == ("train", 0, 0.0)


def test_rearranged_documents_hold_the_same_text(corpus, tokenizer, tmp_path):
    build_shards(corpus, "train", tokenizer, tmp_path / "plain", seed=0)
    build_shards(corpus, "train", tokenizer, tmp_path / "fim", seed=0, fim_rate=0.5)
    plain, fim = every(tmp_path / "plain"), every(tmp_path / "fim")
    assert 10 < sum(tokenizer.fim_begin_id in ids for ids in fim) < 50
    for whole, changed in zip(plain, fim, strict=True):
        assert changed[0] == tokenizer.bos_id
        assert changed[-1] == tokenizer.eos_id
        assert tokenizer.decode(unfim(changed, tokenizer)) == tokenizer.decode(whole)


def test_joined_tokens_are_split_at_the_rate(corpus, tokenizer, tmp_path):
    splits = joined_newline_splits(tokenizer)
    counts = []
    for rate in (0.0, 0.5, 1.0):
        build_shards(corpus, "train", tokenizer, tmp_path / str(rate), seed=0, split_joined_rate=rate, fim_rate=0.2)
        found = every(tmp_path / str(rate))
        counts.append(sum(token in splits for ids in found for token in ids))
    assert counts[0] > counts[1] > counts[2] == 0
    first, last = every(tmp_path / "0.0"), every(tmp_path / "1.0")
    assert [tokenizer.decode(ids) for ids in first] == [tokenizer.decode(ids) for ids in last]


def test_the_seed_decides_and_the_batch_does_not(corpus, tokenizer, tmp_path, monkeypatch):
    options = dict(fim_rate=0.5, split_joined_rate=0.5)
    build_shards(corpus, "train", tokenizer, tmp_path / "a", seed=0, **options)
    build_shards(corpus, "train", tokenizer, tmp_path / "b", seed=1, **options)
    monkeypatch.setattr(build, "BATCH_BYTES", 1)
    build_shards(corpus, "train", tokenizer, tmp_path / "c", seed=0, **options)
    names = ("tokens-00000.bin", "documents-00000.npy", "documents-00000.names", "manifest.json")
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "c" / n).read_bytes() for n in names]
    assert every(tmp_path / "a") != every(tmp_path / "b")


def test_a_limit_ends_the_set(corpus, tokenizer, tmp_path):
    assert build_shards(corpus, "train", tokenizer, tmp_path / "d", seed=0, limit_documents=7).documents == 7
    for key, total in (("limit_tokens", "tokens"), ("limit_bytes", "bytes")):
        manifest = build_shards(corpus, "train", tokenizer, tmp_path / key, seed=0, **{key: 500})
        last = ShardSet.open(tmp_path / key)
        last = last.lengths[-1] if total == "tokens" else last.byte_lengths[-1]
        assert getattr(manifest, total) - last < 500 <= getattr(manifest, total)


def test_endless_sources_need_a_limit(tokenizer, tmp_path):
    with pytest.raises(UserError, match="the train split of builtin:tinypy never ends; expected a limit"):
        build_shards("builtin:tinypy", "train", tokenizer, tmp_path / "a", seed=0)
    assert not (tmp_path / "a").exists()
    manifest = build_shards("builtin:tinypy", "train", tokenizer, tmp_path / "a", seed=0, limit_tokens=5000)
    assert 5000 <= manifest.tokens < 6000


def test_progress_counts_up(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH_BYTES", 1000)
    seen = []
    manifest = build_shards(
        corpus, "train", tokenizer, tmp_path / "a", seed=0, progress=lambda *totals: seen.append(totals)
    )
    assert len(seen) > 2
    assert all(a < b for earlier, later in pairwise(seen) for a, b in zip(earlier, later, strict=True))
    assert seen[-1] == (manifest.documents, manifest.tokens, manifest.bytes)


def test_bad_rates_and_empty_corpora_leave_nothing(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"fim_rate = 1\.5: expected a share"):
        build_shards(corpus, "train", tokenizer, tmp_path / "a", seed=0, fim_rate=1.5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        build_shards(str(tmp_path / "empty"), "train", tokenizer, tmp_path / "b", seed=0)
    with pytest.raises(UserError, match="is no shard set"):
        ShardSet.open(tmp_path / "b")
