import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.stages.run_directory import read_rows, read_run


def write(path: Path, steps: list[int]) -> list[dict]:
    rows = [{"step": step, "tokens": 10 * step, "nth": nth, "text": "é\u2028日本"} for nth, step in enumerate(steps)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return rows


def test_a_file_cut_anywhere_gives_its_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = write(path, [1, 2, 3])
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        whole = content[:end].count(b"\n")
        found, unreadable = read_rows(path)
        assert unreadable == 0
        # A last line that lacks nothing but its newline is whole as well.
        assert found in (rows[:whole], rows[: whole + 1] if content[end : end + 1] == b"\n" else rows[:whole])


@given(st.lists(st.integers(1, 8), max_size=20))
def test_a_step_that_comes_again_replaces_everything_from_it_on(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    rows = write(path, steps)
    expected = [row for row in rows if all(later["step"] > row["step"] for later in rows[row["nth"] + 1 :])]
    assert read_rows(path)[0] == expected


def test_lines_that_are_no_records_are_counted_and_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "tokens": 5}\n{"step": 2, "to{"step": 2, "tokens": 9}\n\xff\xfe\n[]\n3\n{"step": 3, "tokens": 9}\n'
    )
    rows, unreadable = read_rows(path)
    assert [row["step"] for row in rows] == [1, 3]
    assert unreadable == 4


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not a run directory: expected .*pretrain/"):
            read_run(path)


def test_a_run_that_has_just_begun_lists_what_is_missing(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    run = read_run(tmp_path)
    assert run.checkpoint is None
    for part in ("run.json", "metrics.jsonl", "evaluations.jsonl", "checkpoint"):
        assert any(part in note for note in run.notes)


def test_a_run_json_cut_short_is_said_so(make_run, tmp_path):
    path = make_run(tmp_path / "run", steps=5)
    about = path / "pretrain" / "run.json"
    about.write_text(about.read_text()[:40])
    run = read_run(path)
    assert run.about == {}
    assert any("run.json is not whole" in note for note in run.notes)
    assert len(run.metrics) == 5
    assert run.checkpoint == path / "pretrain/checkpoints/step-00000005"
