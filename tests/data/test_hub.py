import json
import sys

import pytest

from dsv3.data.files import SkipReport
from dsv3.data.sources import documents, fingerprint
from dsv3.data.token_shards import ShardSet
from dsv3.errors import UserError
from tests.data.shard_sets import build_set

ROWS = [{"id": n, "text": f"row number {n}, 第{n}行\n" * (1 + n % 3)} for n in range(150)]


@pytest.fixture(scope="module")
def datasets():
    # The package takes a second to import; without it, its own way out is tested below.
    return pytest.importorskip("datasets", reason="the extra `datasets` is not installed")


@pytest.fixture(params=["saved", "saved dict", "files"])
def directory(datasets, tmp_path, monkeypatch, request):
    """One data set in each form that a directory may have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = datasets.Dataset.from_list(ROWS)
    if request.param == "saved":
        made.save_to_disk(tmp_path / "set")
    elif request.param == "saved dict":
        datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "set"


def test_the_rows_are_the_documents(directory):
    splits = [list(documents(f"hf:{directory}", split, seed=0)) for split in ("train", "validation")]
    assert all(splits)
    found = sorted((d for split in splits for d in split), key=lambda d: int(d.id))
    assert [d.text for d in found] == [row["text"] for row in ROWS]
    assert [d.id for d in found] == [str(n) for n in range(len(ROWS))]


def test_shards_are_built_and_the_content_counts(directory, tokenizer, tmp_path):
    uri = f"hf:{directory}"
    manifest = build_set(uri, "train", tokenizer, tmp_path / "out", seed=0)
    assert manifest.documents == len(ShardSet.open(tmp_path / "out")) > 130
    first = fingerprint(uri)
    assert fingerprint(uri) == first
    (directory / "more").write_text("")
    assert fingerprint(uri) != first


def test_bad_rows_and_missing_fields(datasets, tmp_path):
    datasets.Dataset.from_list([{"text": "good " * 20}, {"text": None}, {"text": "more"}]).save_to_disk(
        tmp_path / "set"
    )
    report = SkipReport()
    assert list(documents(f"hf:{tmp_path / 'set'}", "train", seed=0, report=report))
    assert report.named == ["1: no text in the field 'text'"]
    datasets.Dataset.from_list([{"body": "good"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="has no field 'text'; expected it among its fields body"):
        documents(f"hf:{tmp_path / 'other'}", "train", seed=0)


def test_what_is_no_data_set_is_refused(datasets, tmp_path):
    with pytest.raises(UserError, match="cannot be opened as a data set with a split named train"):
        documents(f"hf:{tmp_path}", "train", seed=0)


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[datasets\]'"):
        documents("hf:owner/name", "train", seed=0)
