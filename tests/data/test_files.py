import base64
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import files
from dsv3.data.files import Document, SkipReport, pieces, read
from dsv3.errors import UserError

ROWS = ["first", "zweiter Text", "第三"]


def write(path, rows):
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    table = pyarrow.table({"id": list(range(len(rows))), "text": rows})
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        half = len(lines) // 2
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_of_every_format(tmp_path, suffix):
    report = SkipReport()
    found = list(read(write(tmp_path / f"rows{suffix}", ROWS), "rows", report))
    assert found == [Document(f"rows:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert report.count == 0


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes("\ufeffzwei\r\nZeilen\n".encode())
    assert list(read(tmp_path / f"a{suffix}", "a", SkipReport())) == [Document("a", "zwei\r\nZeilen\n")]


@given(text=st.text(st.sampled_from("ab \n字😀"), max_size=300), longest=st.integers(4, 50))
def test_pieces_join_to_the_whole_and_split_no_character(text, longest):
    found = list(pieces(io.BytesIO(text.encode()), longest))
    assert "".join(piece.decode() for piece in found) == text
    assert all(len(piece) <= longest for piece in found)
    for piece in found[:-1]:
        # Cut at white space wherever the second half of the piece has some.
        assert piece.endswith((b"\n", b" ")) or not {b"\n", b" "} & {bytes([b]) for b in piece[longest // 2 :]}
        assert len(piece) > longest // 2 - 4


def test_long_rows_become_several_documents(tmp_path):
    row = "word " * 50
    for suffix in (".jsonl", ".parquet"):
        found = list(read(write(tmp_path / f"a{suffix}", [row, "short"]), "a", SkipReport(), longest=100))
        assert [document.id for document in found] == ["a:1#0", "a:1#1", "a:1#2", "a:2"]
        assert "".join(document.text for document in found[:3]) == row


def test_an_undecodable_file_is_skipped_as_a_whole_and_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine " * 100 + b"\xff")
    report = SkipReport()
    assert list(read(tmp_path / "bad.txt", "bad.txt", report, longest=50)) == []
    assert report.count == 1
    assert report.named == ["bad.txt: not UTF-8 (invalid start byte)"]


def test_broken_rows_are_skipped_and_named(tmp_path):
    lines = [
        b'{"text": "good"}', b"not json", b'{"other": 1}', b'{"text": 5}', b'["text"]', b'{"text": "\\ud800"}', b"", b"\xff",
        b"[" * 100_000, b'{"text": "last"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    report = SkipReport()
    assert [d.id for d in read(tmp_path / "a.jsonl", "a", report)] == ["a:1", "a:10"]
    assert [line.split(": ")[0] for line in report.named] == ["a:2", "a:3", "a:4", "a:5", "a:6", "a:8", "a:9"]
    assert report.count == 7


def test_an_overlong_line_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_ROW", 64)
    write(tmp_path / "a.jsonl", ["x" * 500, "after", "y" * 40])
    report = SkipReport()
    assert [d.text for d in read(tmp_path / "a.jsonl", "a", report)] == ["after", "y" * 40]
    assert report.count == 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_files_are_skipped_from_the_damage_on(tmp_path, suffix, damage):
    path = write(tmp_path / f"a{suffix}", [f"row {os.urandom(300).hex()}" for _ in range(2000)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3] if damage == "truncated" else b"garbage" * 50)
    report = SkipReport()
    found = list(read(path, "a", report))
    assert all(document.text.startswith("row ") for document in found)
    assert len(found) < 2000
    assert any("unreadable after row" in line for line in report.named)


def test_a_table_without_text_is_skipped(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    report = SkipReport()
    assert list(read(tmp_path / "a.parquet", "a", report)) == []
    assert report.named == ["a: no column 'text' among body"]


def test_the_report_names_a_hundred_and_counts_all():
    report = SkipReport()
    for number in range(1000):
        report.add(str(number), "reason")
    assert (report.count, len(report.named)) == (1000, 100)


def test_a_missing_library_is_refused_with_the_way_out(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'dsv3\[parquet\]'"):
        list(read(path, "a", SkipReport()))


MEMORY = """
import re, sys
from pathlib import Path
from dsv3.data.build import ShardPlan, build_shards
from dsv3.data.sources import documents, sample
from dsv3.data.tokenizer import train_tokenizer

source, out, sample_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = train_tokenizer(sample(documents(source, "train", seed=0), sample_bytes), 320)
totals = [build_shards(ShardPlan(0, uri=source, split=split), tokenizer, Path(out, split)).bytes for split in ("train", "validation")]
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(sum(totals), int(peak[1]) * 1024)
"""


def peak_memory(tmp_path, line: Callable[[int], bytes], size: int, sample_bytes: int) -> int:
    """Peak bytes of a process that makes a tokenizer and shards of a file without line breaks, `line` repeated."""
    path = tmp_path / "line.txt"
    with path.open("wb") as stream:
        while stream.tell() < size:
            stream.write(line(stream.tell()))
    arguments = [str(path), str(tmp_path / "out"), str(sample_bytes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    total, peak = map(int, run.stdout.split())
    assert total == path.stat().st_size
    return peak


def words(seed: int) -> bytes:
    return b"words, and more words; " * 4000


def noise(seed: int) -> bytes:
    return base64.b64encode(Random(seed).randbytes(75_000))


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")


@needs_proc
def test_a_file_of_one_line_is_read_in_bounded_memory(tmp_path):
    assert peak_memory(tmp_path, words, 20_000_000, 500_000) < 250e6


@needs_proc
@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("line", [words, pytest.param(noise, marks=pytest.mark.long)])
def test_a_file_of_one_line_of_200_megabytes_is_read_below_a_gigabyte(tmp_path, line):
    assert peak_memory(tmp_path, line, 200_000_000, 8_000_000) < 1e9


COMMAND = """
import re, sys, threading, time
from pathlib import Path
from dsv3.cli import main

peaks = {}

def watch():
    while True:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                text = status.read_text()
            except OSError:
                continue
            own = status.parent.name == str(pid) or f"PPid:\\t{pid}\\n" in text
            if own and (peak := re.search(r"VmHWM:\\s+(\\d+) kB", text)):
                peaks[status.parent.name] = max(int(peak[1]) * 1024, peaks.get(status.parent.name, 0))
        time.sleep(0.2)

pid = Path("/proc/self").resolve().name
threading.Thread(target=watch, daemon=True).start()
code = main.run(sys.argv[1:])
time.sleep(0.5)
print(code, max(peaks.values()))
"""


@needs_proc
@pytest.mark.prove
@pytest.mark.timeout(1200)
def test_data_build_takes_a_file_of_one_line_of_200_megabytes_and_ends_well(tmp_path):
    """No process of it, workers included, takes a gigabyte."""
    path = tmp_path / "line.txt"
    with path.open("wb") as stream:
        while stream.tell() < 200_000_000:
            stream.write(words(0))
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart-reduced.toml"
    source = f'data.sources=[{{name="line", uri="{path}"}}]'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "data", "build", str(recipe), source, "--out", str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, peak = map(int, run.stdout.splitlines()[-1].split())
    assert code == 0, run.stderr
    assert peak < 1e9
    manifests = list((tmp_path / "out" / "shards").rglob("*.json"))
    assert manifests
