import builtins
import errno
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import shards
from dsv3.data.files import SkipReport
from dsv3.data.shards import ShardSet, ShardWriter
from dsv3.errors import RunError, UserError

DOCUMENTS = [("a.py", [0, 300, 65535, 1], 9), ("dir/ü\n.txt", [0, 1], 0), ("c", [0, *range(1000), 1], 4000)]


def write(directory, documents=DOCUMENTS, *, vocab_size=65536, shard_bytes=1 << 30):
    options = dict(vocab_size=vocab_size, tokenizer_hash="hash", shard_bytes=shard_bytes)
    with ShardWriter(directory, **options) as writer:
        for name, ids, byte_count in documents:
            writer.add(name, ids, byte_count)
        return writer.finish({"source": "here", "seed": 3}, SkipReport(1, ["bad: why"]))


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
    assert found.byte_lengths.tolist() == [9, 0, 4000]
    assert not found.document(0).flags.writeable
    with pytest.raises(IndexError):
        found.document(3)


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
    assert content["skipped"] == {"count": 1, "named": ["bad: why"]}
    files = {name: digest for shard in content["shards"] for name, digest in shard["sha256"].items()}
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir() if path.name != "manifest.json")
    for name, digest in files.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_without_finish_nothing_is_left(tmp_path):
    write(tmp_path)

    def stopped():
        yield from DOCUMENTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopped(), shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"is no shard set: it has no manifest\.json"):
        ShardSet.open(tmp_path)


class FullDisk:
    """A file on a disk with room for so many more bytes."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.stream.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("room", [0, 10, 2100, 2200, 2500, 2700])
def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, room):
    write(tmp_path / "whole")
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    assert room < size
    left = [room]

    def open_full(*arguments):
        return FullDisk(builtins.open(*arguments), left)

    monkeypatch.setattr(shards, "open", open_full, raising=False)
    with pytest.raises(RunError, match=r"No space left on device.*free some space"):
        write(tmp_path / "set")
    assert list((tmp_path / "set").iterdir()) == []
    with pytest.raises(UserError, match="is no shard set"):
        ShardSet.open(tmp_path / "set")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"cannot write shards into .*choose a directory"):
            write(tmp_path / place)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shards, "open", refuse, raising=False)
    with pytest.raises(UserError, match="Permission denied; choose a directory"):
        write(tmp_path / "forbidden")


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


def test_another_format_is_refused(tmp_path):
    write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    for change, message in (({"format": 2}, "has format 2, expected 1"), ({"more": 1}, "is no manifest")):
        (tmp_path / "manifest.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            ShardSet.open(tmp_path)
