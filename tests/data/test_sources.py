import json
import os
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.files import Document, SkipReport
from dsv3.data.sources import documents, fingerprint, hash_fraction, sample
from dsv3.errors import RunError, UserError


@pytest.fixture(scope="module")
def stdlib() -> dict[str, list[Document]]:
    return {split: list(documents("builtin:stdlib", split, seed=0)) for split in ("train", "validation")}


def corpus(path: Path, count: int = 200) -> Path:
    for number in range(count):
        (path / f"part{number % 3}").mkdir(exist_ok=True)
        (path / f"part{number % 3}" / f"{number}.txt").write_text(f"document {number}\n")
    return path


def test_the_standard_library_is_megabytes_of_code(stdlib):
    ids = {document.id for split in stdlib.values() for document in split}
    total = sum(len(document.text.encode()) for split in stdlib.values() for document in split)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= ids
    assert 6e6 < total < 12e6
    root = Path(sysconfig.get_path("stdlib"))
    for split in stdlib.values():
        assert all((root / document.id).read_bytes().decode() == document.text for document in split[:50])


def test_files_that_a_program_wrote_are_no_part_of_it(stdlib):
    ids = {document.id for split in stdlib.values() for document in split}
    assert not [name for name in ids if name.startswith(("_sysconfigdata", "pydoc_data/", "test/", "idlelib/"))]
    assert not ids & {"keyword.py", "token.py", "stringprep.py", "encodings/cp1250.py"}
    # Hand-written neighbours, one of which speaks of generating in its first lines, stay.
    assert {"encodings/utf_8.py", "encodings/__init__.py", "ast.py", "tokenize.py"} <= ids


def test_splits_are_disjoint_complete_and_fixed(stdlib):
    train, validation = ({document.id for document in stdlib[split]} for split in ("train", "validation"))
    assert not train & validation
    assert 0.02 < len(validation) / len(train | validation) < 0.09
    again = list(documents("builtin:stdlib", "validation", seed=7))
    assert again == stdlib["validation"]
    # sha256("argparse.py") = c93f..., written down so that no change of the hash passes unnoticed.
    assert hash_fraction("argparse.py") == pytest.approx(float.fromhex("0x0.c93fa5724c1b"), abs=2**-32)


def test_the_fraction_grows_the_validation_split(tmp_path):
    corpus(tmp_path)
    held_out = [
        {d.id for d in documents(str(tmp_path), "validation", seed=0, validation_fraction=fraction)}
        for fraction in (0.1, 0.5)
    ]
    assert held_out[0] < held_out[1]
    assert 70 < len(held_out[1]) < 130


def test_directory_and_glob_agree(tmp_path):
    corpus(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("hidden")
    directory = list(documents(str(tmp_path), "train", seed=0))
    pattern = list(documents(str(tmp_path / "**" / "*.txt"), "train", seed=0))
    assert sorted(d.id for d in directory) == sorted(d.id for d in pattern)
    assert [d.id for d in directory] == sorted(d.id for d in directory)
    assert all(d.id.startswith("part") and d.id.endswith(".txt") for d in directory)


def test_one_text_file_serves_both_splits(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Sentence number {number} of a book.\n" for number in range(40_000)))
    train = list(documents(str(path), "train", seed=0))
    validation = list(documents(str(path), "validation", seed=0))
    assert len(validation) >= 1
    everything = sorted(train + validation, key=lambda d: int(d.id.split("#")[1]))
    assert "".join(d.text for d in everything) == path.read_text()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@given(text=st.text(st.sampled_from("ab \n字😀"), min_size=2, max_size=300), fraction=st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=40)
def test_a_short_text_is_divided_between_the_splits(tmp_path_factory, name, text, fraction):
    path = tmp_path_factory.mktemp("short") / name
    path.write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    train, validation = (
        list(documents(str(path), split, seed=0, validation_fraction=fraction)) for split in ("train", "validation")
    )
    assert len(train) == len(validation) == 1
    assert train[0].text + validation[0].text == text
    assert train[0].text
    assert validation[0].text
    assert train[0].id != validation[0].id
    if len(text) > 100 and " " in text[50:]:
        share = len(validation[0].text.encode()) / len(text.encode())
        assert min(fraction, 0.5) / 2 - 0.1 <= share <= 0.9


def test_of_a_small_source_the_longest_document_is_divided_where_a_split_would_be_empty(tmp_path):
    """And the rest stay where they are."""
    names = [name for name in (f"{n}.txt" for n in range(100)) if hash_fraction(name) > 0.5][:4]
    for name in names:
        (tmp_path / name).write_text(name * (50 if name == names[2] else 5))
    train, validation = (list(documents(str(tmp_path), split, seed=0)) for split in ("train", "validation"))
    assert sorted(d.id for d in train) == sorted({*names, f"{names[2]}#train"} - {names[2]})
    assert [d.id for d in validation] == [f"{names[2]}#validation"]
    assert {d.id: d.text for d in train}[f"{names[2]}#train"] + validation[0].text == names[2] * 50
    # With a document that belongs to validation by itself, nothing is divided.
    held_out = next(name for name in (f"x{n}.txt" for n in range(1000)) if hash_fraction(name) < 0.05)
    (tmp_path / held_out).write_text("held out")
    assert [d.id for d in documents(str(tmp_path), "validation", seed=0)] == [held_out]
    assert sorted(d.id for d in documents(str(tmp_path), "train", seed=0)) == sorted(names)


def test_one_character_cannot_be_divided(tmp_path):
    (tmp_path / "a.txt").write_text("字")
    assert [d.text for d in documents(str(tmp_path), "train", seed=0)] == ["字"]
    with pytest.raises(UserError, match="none of its 1 documents falls into the validation split"):
        list(documents(str(tmp_path), "validation", seed=0))
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(UserError, match="none of its 1 documents falls into the validation split"):
        list(documents(str(tmp_path), "validation", seed=0, validation_fraction=0.0))


def test_a_source_that_disappears_ends_the_build(tmp_path):
    corpus(tmp_path)
    found = documents(str(tmp_path), "train", seed=0)
    next(found)
    for path in list(tmp_path.rglob("*.txt")):
        path.unlink()
    with pytest.raises(RunError, match=r"was there when its source was listed, and cannot be read now: No such file"):
        list(found)


def test_empty_documents_are_counted(tmp_path):
    corpus(tmp_path)
    (tmp_path / "part0" / "empty.txt").write_text("")
    (tmp_path / "part1" / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    report = SkipReport()
    list(documents(str(tmp_path), "train", seed=0, report=report))
    assert (report.empty, report.count) == (2, 0)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    corpus(tmp_path)
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first != fingerprint(str(tmp_path / "part0"))
    (tmp_path / "part1" / "1.txt").write_text("other")
    assert fingerprint(str(tmp_path)) != first


def test_tinypy_train_is_endless_and_validation_is_its_own():
    train = list(islice(documents("builtin:tinypy", "train", seed=1), 500))
    validation = list(islice(documents("builtin:tinypy", "validation", seed=1), 50))
    assert len({d.id for d in train}) == 500
    assert all("def " in d.text for d in train + validation)
    assert train == list(islice(documents("builtin:tinypy", "train", seed=1), 500))


def test_what_cannot_be_read_is_reported_and_the_rest_is_used(tmp_path):
    corpus(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    report = SkipReport()
    assert list(documents(str(tmp_path), "train", seed=0, report=report))
    assert (report.count, report.named[0].split(":")[0]) == (1, "latin.txt")


def test_a_sample_is_bounded_spread_and_fixed():
    texts = [Document(str(number), f"{number:04d}" * 25) for number in range(1000)]
    chosen = sample(iter(texts), 10_000)
    assert 9_900 <= sum(map(len, chosen)) <= 10_000
    numbers = [int(text[:4]) for text in chosen]
    assert numbers == sorted(numbers)
    assert 350 < sum(numbers) / len(numbers) < 650
    assert sample(iter(texts), 10_000) == chosen
    assert sample(iter(texts), 10**9) == [document.text for document in texts]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_file_name_may_be_any_bytes(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as stream:
        stream.write("text")
    found = list(documents(str(tmp_path), "train", seed=0, validation_fraction=0.0))
    assert found == [Document("\\udcff.txt", "text")]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("builtin:stdlb", "did you mean 'builtin:stdlib'"),
        ("no/such/place", "'no/such/place' does not exist"),
        ("no/such/*.txt", r"no/such/\*\.txt holds no file"),
    ],
)
def test_unknown_sources_are_refused_at_once(uri, message):
    with pytest.raises(UserError, match=message):
        documents(uri, "train", seed=0)


def test_useless_paths_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="holds no file that is read here"):
        documents(str(tmp_path), "train", seed=0)
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected \.txt, \.md"):
        documents(str(tmp_path / "a.pdf"), "train", seed=0)


def test_empty_corpora_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text; expected at least one document"):
        list(documents(str(tmp_path), "train", seed=0))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"1 skipped, the first: b\.txt: not UTF-8"):
        list(documents(str(tmp_path), "train", seed=0))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_are_reported(tmp_path):
    corpus(tmp_path)
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    report = SkipReport()
    list(documents(str(tmp_path), "train", seed=0, report=report))
    assert "Permission denied" in report.named[0]
