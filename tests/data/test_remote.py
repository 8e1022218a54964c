import sys

import fsspec
import pytest

from dsv3.data.files import SkipReport
from dsv3.data.sources import documents, fingerprint
from dsv3.errors import RunError, UserError
from tests.data.shard_sets import build_set
from tests.data.test_files import ROWS, write


@pytest.fixture
def memory():
    """The file system in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def copy(memory, tmp_path):
    """The same files here and at a URL."""
    for name in ("a.txt", "b/c.jsonl", "b/d.jsonl.zst", "e.parquet", "b/.hidden.txt", ".git/f.txt", "b/picture.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix in (".jsonl", ".zst", ".parquet"):
            write(path, ROWS * 10)
        else:
            path.write_text(f"text of {name}\n" * 30)
        memory.pipe(f"/corpus/{name}", path.read_bytes())
    return tmp_path


def every(uri):
    return [document for split in ("train", "validation") for document in documents(uri, split, seed=0)]


def test_a_directory_a_glob_and_a_file_at_a_url_are_those_here(copy):
    here = every(str(copy))
    assert len(here) == 91
    for uri in ("memory://corpus", "memory://corpus/", f"file://{copy}"):
        assert every(uri) == here
    assert (
        every("memory://corpus/b/*.jsonl") == every(str(copy / "b" / "c.jsonl")) == every("memory://corpus/b/c.jsonl")
    )
    assert every("memory://corpus/**/*.jsonl") == every(str(copy / "**" / "*.jsonl"))


def test_the_shards_are_those_of_the_files_here(copy, tokenizer, tmp_path):
    for name, uri in {"here": str(copy), "there": "memory://corpus"}.items():
        build_set(uri, "train", tokenizer, tmp_path / "out" / name, seed=0, fim_rate=0.5)
    for name in ("tokens-00000.bin", "documents-00000.names", "documents-00000.npy"):
        assert (tmp_path / "out/here" / name).read_bytes() == (tmp_path / "out/there" / name).read_bytes()


def test_the_fingerprint_changes_with_the_content(copy, memory):
    first = fingerprint("memory://corpus")
    assert fingerprint("memory://corpus") == first
    memory.pipe("/corpus/a.txt", b"other text")
    assert fingerprint("memory://corpus") != first


def test_what_cannot_be_decoded_is_reported_and_what_has_gone_ends_the_build(copy, memory):
    memory.pipe("/corpus/b/bad.txt", b"\xff\xfe")
    report = SkipReport()
    list(documents("memory://corpus", "train", seed=0, report=report))
    assert report.named == ["b/bad.txt: not UTF-8 (invalid start byte)"]
    found = documents("memory://corpus", "train", seed=0)
    next(found)
    memory.rm("/corpus", recursive=True)
    with pytest.raises(RunError, match=r"memory://.*corpus/.* was there when its source was listed"):
        list(found)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/corpus", "s3:// needs another package: .*s3fs"),
        ("nothing://bucket/corpus", "fsspec does not know nothing://"),
        ("memory://absent", "there is nothing at memory://absent"),
        ("memory://absent/*.txt", "there is nothing at"),
    ],
)
def test_what_cannot_be_opened_is_refused_at_once(memory, monkeypatch, uri, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=message):
        documents(uri, "train", seed=0)
