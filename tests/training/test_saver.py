import logging
import os
import threading

import pytest
import torch

from dsv3.errors import RunError
from dsv3.training.saver import Saver
from dsv3.weights import checkpoint
from dsv3.weights.checkpoint import latest_checkpoint, load_checkpoint


def tensors(fill):
    return {"model": {"a": torch.full((4, 3), float(fill)), "b": torch.full((2,), fill, dtype=torch.uint8)}}


def filled_with(directory):
    into = tensors(99)
    load_checkpoint(directory, into)
    assert (into["model"]["b"] == into["model"]["a"][0, 0].to(torch.uint8)).all()
    return int(into["model"]["a"][0, 0])


@pytest.fixture
def gate(monkeypatch):
    """Holds every save until it is set."""
    gate = threading.Event()
    write = checkpoint.ChunkWriter.write

    def waiting(*args):
        assert gate.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpoint.ChunkWriter, "write", waiting)
    return gate


def test_the_caller_goes_on_and_what_it_changes_then_is_not_saved(tmp_path, gate):
    saver, given = Saver(), tensors(1)
    saver.save(tmp_path / "step-1", given, {}, {})
    assert not list(tmp_path.glob("step-*"))  # it is back before anything is written
    for each in given["model"].values():
        each.fill_(7)
    saver.check()
    gate.set()
    saver.finish()
    assert filled_with(tmp_path / "step-1") == 1
    saver.save(tmp_path / "step-2", given, {}, {})  # into the same copy
    saver.save(tmp_path / "step-3", tensors(3), {}, {})
    saver.finish()
    assert [filled_with(tmp_path / f"step-{n}") for n in (1, 2, 3)] == [1, 7, 3]
    assert latest_checkpoint(tmp_path).name == "step-3"
    assert saver.spent.keys() == {"waiting", "preparing", "writing", "processor"}
    assert all(seconds > 0 for seconds in saver.spent.values())


def test_one_save_at_a_time(tmp_path, gate):
    saver = Saver()
    saver.save(tmp_path / "step-1", tensors(1), {}, {})
    threading.Timer(0.2, gate.set).start()
    saver.save(tmp_path / "step-2", tensors(2), {}, {})
    assert (tmp_path / "step-1").is_dir()  # the second waited for the first
    saver.finish()


def full(*_):
    raise OSError(28, "No space left on device")


def test_an_error_comes_up_at_the_next_look_and_only_once(tmp_path, monkeypatch):
    saver = Saver()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.ChunkWriter, "write", full)
        saver.save(tmp_path / "step-1", tensors(1), {}, {})
        saver.wait()
        with pytest.raises(RunError, match=r"could not save the checkpoint .*step-1.*No space left"):
            saver.check()
        saver.check()
        saver.save(tmp_path / "step-2", tensors(2), {}, {})
        with pytest.raises(RunError, match="step-2"):
            saver.save(tmp_path / "step-3", tensors(3), {}, {})
        with pytest.raises(RunError, match="step-4"), saver:
            saver.save(tmp_path / "step-4", tensors(4), {}, {})
    assert list(tmp_path.iterdir()) == []
    saver.save(tmp_path / "step-5", tensors(5), {}, {})
    saver.finish()
    assert filled_with(tmp_path / "step-5") == 5


def save_and_fail(directory, fill):
    with Saver() as saver:
        saver.save(directory, tensors(fill), {}, {})
        raise ZeroDivisionError


def test_leaving_by_another_error_finishes_the_save_and_hides_nothing(tmp_path, monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError):
        save_and_fail(tmp_path / "step-1", 1)
    assert filled_with(tmp_path / "step-1") == 1
    monkeypatch.setattr(checkpoint.ChunkWriter, "write", full)
    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        save_and_fail(tmp_path / "step-2", 2)
    assert "step-2" in caplog.text


def test_old_checkpoints_go_once_the_new_one_is_whole(tmp_path, monkeypatch):
    saver = Saver(keep_last=2, keep_every_steps=4)
    for step in range(1, 8):
        saver.save(tmp_path / f"step-{step:08d}", tensors(step), {}, {})
    saver.finish()
    kept = [path.name for path in sorted(tmp_path.glob("step-*"))]
    assert kept == ["step-00000004", "step-00000006", "step-00000007"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *kept]
    monkeypatch.setattr(checkpoint.ChunkWriter, "write", full)
    saver.save(tmp_path / "step-00000009", tensors(9), {}, {})
    with pytest.raises(RunError):
        saver.finish()
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == kept


def test_a_rename_that_fails_is_told(tmp_path, monkeypatch):
    saver = Saver(keep_last=1)
    saver.save(tmp_path / "step-1", tensors(1), {}, {})
    saver.finish()
    rename = os.rename

    def refused(source, target, **options):
        if str(target).endswith(".removed"):
            raise PermissionError(13, "Permission denied")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refused)
    saver.save(tmp_path / "step-2", tensors(2), {}, {})
    with pytest.raises(RunError, match=r"could not remove the old checkpoint .*step-1.*Permission denied"):
        saver.finish()
    assert filled_with(latest_checkpoint(tmp_path)) == 2


def test_room_is_made_in_the_thread_and_once(tmp_path):
    saver, given = Saver(), tensors(1)
    saver.prepare(given)
    saver.finish()
    room = saver.copy["model.a"] if "model.a" in saver.copy else next(iter(saver.copy.values()))
    saver.prepare(given)
    saver.save(tmp_path / "step-1", given, {}, {})
    saver.prepare(given)
    saver.finish()
    assert any(each is room for each in saver.copy.values())
    assert filled_with(tmp_path / "step-1") == 1
