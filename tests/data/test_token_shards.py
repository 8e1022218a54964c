import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import token_shards
from dsv3.data.token_shards import ShardSet
from dsv3.errors import RunError, UserError
from tests.data.shard_sets import DOCUMENTS, begin, many, write


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_round_trip(tmp_path, vocab_size, dtype, shard_bytes):
    manifest = write(tmp_path, vocab_size=vocab_size, shard_bytes=shard_bytes)
    found = ShardSet.open(tmp_path, "hash")
    assert found.manifest == manifest
    assert len(manifest.shards) == (3 if shard_bytes == 1 else 1)
    assert len(found) == len(DOCUMENTS)
    for index, (name, ids, _) in enumerate(DOCUMENTS):
        assert found.document(index).tolist() == ids
        assert found.document(index).dtype == dtype
        assert found.name(index) == name
    assert found.lengths.tolist() == [4, 2, 1002]
    assert not found.document(0).flags.writeable
    with pytest.raises(IndexError):
        found.document(3)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60), shard_bytes=st.integers(1, 200))
def test_any_documents_come_back_from_any_number_of_shards(tmp_path_factory, lengths, shard_bytes):
    directory = tmp_path_factory.mktemp("shards")
    documents = [(str(n), [n, *range(length)], length) for n, length in enumerate(lengths)]
    manifest = write(directory, documents, shard_bytes=shard_bytes)
    found = ShardSet.open(directory)
    assert [found.document(n).tolist() for n in range(len(lengths))] == [ids for _, ids, _ in documents]
    assert manifest.tokens == sum(lengths) + len(lengths)
    assert all(shard.tokens * 2 < shard_bytes + 82 for shard in manifest.shards)


def test_the_manifest_says_what_the_set_is(tmp_path):
    write(tmp_path, shard_bytes=1)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["tokenizer"] == "hash"
    assert (content["dtype"], content["documents"], content["tokens"], content["bytes"]) == ("uint16", 3, 1008, 4009)
    assert content["origin"] == {"source": "here", "seed": 3}
    assert content["skipped"] == {"count": 1, "named": ["bad: why"], "empty": 0, "duplicates": 0}
    files = {name: digest for shard in content["shards"] for name, digest in shard["sha256"].items()}
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir() if path.name != "manifest.json")
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_another_tokenizer_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="was built with the tokenizer hash, the one in use is other"):
        ShardSet.open(tmp_path, "other")


def test_damage_is_refused(tmp_path):
    for name, change in {
        "tokens-00000.bin": lambda data: data[:-2],
        "documents-00000.npy": lambda data: data[:-8],
        "manifest.json": lambda data: data[:-9],
    }.items():
        write(tmp_path)
        (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
        with pytest.raises(UserError, match=r"is damaged|is no manifest"):
            ShardSet.open(tmp_path)
    write(tmp_path)
    (tmp_path / "tokens-00000.bin").unlink()
    with pytest.raises(UserError, match="is damaged"):
        ShardSet.open(tmp_path)


def test_every_file_is_compared_with_its_hash(tmp_path):
    begin(tmp_path, many(), {})
    found = ShardSet.open(tmp_path)
    assert len(found.manifest.shards) == 3
    found.verify()
    for name in ("tokens-00001.bin", "documents-00002.npy", "documents-00000.names"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 is .*delete .* and run again"):
            found.verify()
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    (tmp_path / "tokens-00002.bin").unlink()
    with pytest.raises(UserError, match=r"its sha256 is none \(it is gone\)"):
        found.verify()


def test_tokens_that_go_or_shrink_while_they_are_read_end_the_run(tmp_path):
    begin(tmp_path, many(), {})
    found = ShardSet.open(tmp_path)
    assert found.document(5, 3, 4).tolist() == [8, 9, 10, 11]
    (tmp_path / "tokens-00000.bin").unlink()
    with pytest.raises(RunError, match=r"tokens-00000\.bin cannot be read any more: No such file"):
        found.document(0)
    # One that is open already stays readable, as files do.
    (tmp_path / "tokens-00001.bin").unlink()
    assert found.document(5).tolist() == list(range(5, 35))
    os.truncate(tmp_path / "tokens-00002.bin", 100)
    with pytest.raises(RunError, match=r"tokens-00002\.bin ended early: expected 30 tokens of document 9"):
        found.document(9)


def test_a_bounded_number_of_files_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "OPEN_FILES", 2)
    documents = many(6)
    write(tmp_path, documents, shard_bytes=1)
    found = ShardSet.open(tmp_path)
    assert len(found.manifest.shards) == 6
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        for number, (_, ids, _) in enumerate(documents):
            assert found.document(number).tolist() == ids
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 2


def test_another_format_is_refused(tmp_path):
    write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (({"format": 2}, "has format 2, expected 1"), ({"more": 1}, "is no manifest")):
        (tmp_path / "manifest.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            ShardSet.open(tmp_path)
