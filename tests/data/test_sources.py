import os
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from dsv3.data import sources
from dsv3.data.files import Document, SkipReport
from dsv3.data.sources import documents, hash_fraction, sample
from dsv3.errors import UserError


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
    assert list(documents(str(tmp_path), "train", seed=0)) == [Document("\\udcff.txt", "text")]


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
    with pytest.raises(UserError, match=r"validation_fraction = 1\.5"):
        documents(str(tmp_path), "train", seed=0, validation_fraction=1.5)


def test_empty_corpora_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text; expected at least one document"):
        list(documents(str(tmp_path), "train", seed=0))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"1 skipped, the first: b\.txt: not UTF-8"):
        list(documents(str(tmp_path), "train", seed=0))


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(UserError, match="none of its 1 documents falls into the validation split"):
        list(documents(str(tmp_path), "validation", seed=0, validation_fraction=0.0))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_are_reported(tmp_path):
    corpus(tmp_path)
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    report = SkipReport()
    list(documents(str(tmp_path), "train", seed=0, report=report))
    assert "Permission denied" in report.named[0]


def test_every_builtin_is_known():
    known = (sources.STDLIB, sources.TINYPY, sources.NEEDLE)
    assert known == ("builtin:stdlib", "builtin:tinypy", "builtin:needle")
