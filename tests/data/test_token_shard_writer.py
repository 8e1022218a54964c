import errno
import hashlib
import os
from pathlib import Path

import pytest

from dsv3.data.token_shards import ShardSet
from dsv3.errors import RunError, UserError
from tests.data.shard_sets import DOCUMENTS, begin, contents, many, write


def test_without_finish_nothing_is_left(tmp_path):
    write(tmp_path)

    def stopped():
        yield from DOCUMENTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stopped())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"is no shard set: it has no manifest\.json"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("hashes", [False, True])
def test_complete_shards_of_an_interrupted_writer_are_kept(tmp_path, hashes):
    begin(tmp_path / "whole", many(), {"seed": 0}, hashes=hashes)
    for stop in (3, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path / "set", many(), {"seed": 0}, stop, hashes=hashes)
        with pytest.raises(UserError, match="is no shard set"):
            ShardSet.open(tmp_path / "set")
    # Shards of four documents each: the ninth is in one that was not complete.
    assert begin(tmp_path / "set", many(), {"seed": 0}, hashes=hashes) == 8
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    found = list(ShardSet.open(tmp_path / "set").text_hashes())
    expected = [hashlib.sha256(name.encode()).digest()[:16] for name, _, _ in many()]
    assert found == (expected if hashes else [])


def test_damaged_shards_and_those_of_another_build_are_not_kept(tmp_path):
    def interrupted():
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path, many(), {"seed": 0}, 11)

    interrupted()
    assert begin(tmp_path, many(), {"seed": 1}) == 0
    for name, kept in (("tokens-00001.bin", 4), ("documents-00000.names", 0), ("shard-00001.json", 4)):
        interrupted()
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-3])
        assert begin(tmp_path, many(), {"seed": 0}) == kept
        ShardSet.open(tmp_path).verify()
    # A finished set is given up as a whole: its shards are no longer on record.
    assert begin(tmp_path, many(), {"seed": 0}) == 0


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

    def write_full(path, data):
        with FullDisk(path.open("wb"), left) as stream:
            stream.write(data)

    monkeypatch.setattr(Path, "write_bytes", write_full)
    with pytest.raises(RunError, match=r"No space left on device.*free some space"):
        write(tmp_path / "set")
    with pytest.raises(UserError, match="is no shard set"):
        ShardSet.open(tmp_path / "set")
    left[0] = 2 * size
    write(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"cannot write shards into .*choose a directory"):
            write(tmp_path / place)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match="Permission denied; choose a directory"):
        write(tmp_path / "forbidden")
