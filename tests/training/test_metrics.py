import errno
import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3.errors import RunError
from dsv3.training.metrics import Metrics, flatten, keep_before


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "loss": 5.0 - step, "mtp_losses": [6.0 - step, 7.0], "max_vio": {"1": 0.5, "mtp.0": 1.5}, **more}  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_json_line_a_step_and_the_same_in_tensorboard(tmp_path):
    written = [record(1), record(2, load={"1": [0.5, 0.5]})]
    with Metrics(tmp_path) as metrics:
        metrics.evaluation({"step": 0, "tokens": 0, "bits_per_byte": {"a": 3.5}, "samples": [{"text": "x"}]})
        for each in written:
            metrics.step(each)
            assert lines(tmp_path / "metrics.jsonl")[-1] == each  # on disk at once
    assert lines(tmp_path / "metrics.jsonl") == written
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 4.0), (2, 3.0)]
    assert [e.value for e in board.Scalars("train/max_vio/mtp.0")] == [1.5, 1.5]
    assert [e.value for e in board.Scalars("train/mtp_losses/0")] == [5.0, 4.0]
    assert [(e.step, e.value) for e in board.Scalars("evaluation/bits_per_byte/a")] == [(0, 3.5)]
    assert not [tag for tag in board.Tags()["scalars"] if "load" in tag or "samples" in tag]


@pytest.mark.parametrize(("last", "steps", "scored"), [(2, [1, 2], [0, 2]), (None, [], []), (9, [1, 2, 3], [0, 2])])
def test_what_was_recorded_after_the_checkpoint_is_dropped(tmp_path, last, steps, scored):
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.step(record(step))
        for step in (0, 2):
            metrics.evaluation({"step": step, "tokens": 0})
    with Metrics(tmp_path, last):
        assert [each["step"] for each in lines(tmp_path / "metrics.jsonl")] == steps
        assert [each["step"] for each in lines(tmp_path / "evaluations.jsonl")] == scored
    assert not list(tmp_path.glob("*.partial"))


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.step(record(step))
    time.sleep(1)  # files are told apart by the second
    with Metrics(tmp_path, 1) as metrics:
        metrics.step(record(2, loss=9.0))
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 4.0), (2, 9.0)]


def test_a_line_that_was_being_written_when_the_machine_stopped_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2))[:20])
    keep_before(path, 9)
    assert lines(path) == [record(1)]
    keep_before(tmp_path / "absent.jsonl", 9)
    assert not (tmp_path / "absent.jsonl").exists()


def test_flatten_keeps_numbers_only():
    nested = {"step": 3, "a": 1, "b": {"c": 2.5, "d": "text"}, "e": [1.0, {"f": 2}], "g": True, "load": {"1": [0.5]}}
    assert flatten(nested) == [("a", 1.0), ("b/c", 2.5), ("e/0", 1.0), ("e/1/f", 2.0)]


def test_a_full_disk_ends_the_run_with_a_paragraph(tmp_path, monkeypatch):
    with Metrics(tmp_path) as metrics:

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
            metrics.step(record(1))
