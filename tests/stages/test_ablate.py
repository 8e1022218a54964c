"""Processes, locks and links of `dsv3 ablate`; tests/cli/test_ablate.py trains."""

import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe
from dsv3.stages.ablate import Job, ablate, check_shared, find_recipes, run_jobs, start
from dsv3.stages.published import changed_keys

ABLATIONS = Path(__file__).parents[2] / "recipes" / "ablations"


@dataclass(frozen=True)
class Script(Job):
    """A job that runs a line of Python."""

    code: str = ""

    @property
    def command(self):
        return [sys.executable, "-c", self.code, str(self.out)]


def script(out, code):
    out.mkdir(exist_ok=True)
    return Script(Path(), (), out, code)


def run(jobs, at_once, notes=None):
    notes = [] if notes is None else notes
    return run_jobs(deque(jobs), len(jobs), at_once, lambda **_: None, notes.append), notes


def test_shipped_recipes_differ_in_what_is_ablated_alone():
    recipes = {path.stem: Recipe.load(path) for path in find_recipes([ABLATIONS])}
    assert list(recipes) == ["baseline", "balance-batch", "balance-sequence", "mtp-off"]
    changed = {name: changed_keys(recipes["baseline"], each) for name, each in recipes.items()}
    auxiliary = {"training.balance", "training.balance_alpha"}
    assert changed == {
        "baseline": set(), "mtp-off": {"model.num_nextn_predict_layers"},
        "balance-sequence": auxiliary, "balance-batch": auxiliary,
    }  # fmt: skip
    assert changed_keys(recipes["balance-batch"], recipes["balance-sequence"]) == {"training.balance"}
    check_shared([
        Job(ABLATIONS / f"{name}.toml", (f"training.seed={seed}",), Path(name)) for name in recipes for seed in (0, 1)
    ])  # fmt: skip


def test_recipes_of_fp8_differ_in_arithmetic_alone():
    recipes = {path.stem: Recipe.load(path) for path in find_recipes([ABLATIONS.parent / "fp8"])}
    changed = {name: changed_keys(recipes["baseline"], each) for name, each in recipes.items()}
    assert changed == {
        "baseline": set(), "bf16-split": {"training.micro_batch_size"}, "fp8": {"training.precision"},
        "fp8-gradient-blocks": {"training.precision", "training.fp8_scaling"},
        "fp8-tensors": {"training.precision", "training.fp8_scaling"},
    }  # fmt: skip
    tokens = {recipe.training.tokens for recipe in recipes.values()}
    assert tokens == {3000 * 8 * 2048}


def test_never_more_at_once_than_asked_for(tmp_path):
    log = tmp_path / "log"
    code = f"import time; f = open({str(log)!r}, 'a'); f.write('+'); f.flush(); time.sleep(0.4); f.write('-')"
    failed, notes = run([script(tmp_path / str(i), code) for i in range(5)], 2)
    assert failed == []
    running = [log.read_text()[: i + 1].count("+") - log.read_text()[:i].count("-") for i in range(10)]
    assert max(running) == 2
    assert sorted(note.split(":")[0] for note in notes if ": done in" in note) == list("01234")


def test_jobs_are_spread_over_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code = "import os, time; time.sleep(0.4); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    run([script(tmp_path / str(i), code) for i in range(4)], 4)
    assert sorted((tmp_path / str(i) / "log.txt").read_text() for i in range(4)) == ["3\n", "3\n", "5\n", "5\n"]


def test_a_failed_run_is_named_with_its_last_line_and_the_others_end(tmp_path):
    jobs = [script(tmp_path / "bad", "print('one'); exit('disk full')"), script(tmp_path / "good", "print('fine')")]
    failed, notes = run(jobs, 1)
    assert len(failed) == 1
    assert failed[0].startswith("bad (disk full; see ")
    assert (tmp_path / "good" / "log.txt").read_text() == "fine\n"
    assert any(note.startswith("bad: failed in") for note in notes)


def test_threads_are_shared_out_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    for told, seen in ((None, "2"), ("5", "5")):
        if told is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        run([script(tmp_path / seen, code)], 8)
        assert (tmp_path / seen / "log.txt").read_text().strip() == seen


def test_two_processes_never_train_in_one_directory(tmp_path):
    """The lock is the child's alone: it holds also when the process that started it is gone."""
    job = script(tmp_path / "a", "import time; time.sleep(60)")
    process = start(job, dict(os.environ))
    with pytest.raises(UserError, match=r"a is being trained by another process"):
        run([job], 1)
    process.kill()
    process.wait()
    assert run([script(tmp_path / "a", "")], 1)[0] == []


def test_ctrl_c_lets_runs_save_and_end(tmp_path, monkeypatch):
    code = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), sys.exit(130)))
print('on', flush=True)
time.sleep(60)
"""
    log = tmp_path / "a" / "log.txt"

    def interrupt_once(seconds):
        if log.exists() and "on" in log.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        run([script(tmp_path / "a", code), script(tmp_path / "b", code)], 1)
    assert log.read_text() == "on\nsaved\n"
    assert not (tmp_path / "b" / "log.txt").exists()


def test_recipes_that_need_other_shards_are_refused_before_anything_is_made(tmp_path):
    text = (ABLATIONS / "baseline.toml").read_text()
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "b.toml").write_text(text.replace("fim_rate = 0.1", "fim_rate = 0.5"))
    out = tmp_path / "out"
    options = (2, lambda **_: None, lambda _: None)
    with pytest.raises(UserError, match=r"a-seed0 and b-seed0 need different.*fim_rate was 0.1 and is 0.5"):
        ablate([tmp_path / "a.toml", tmp_path / "b.toml"], [], [0], out, *options)
    (tmp_path / "b.toml").write_text(text.replace("seed = 0\n", ""))
    with pytest.raises(UserError, match=r"b-seed0 and b-seed1 need different.*seed was 0 and is 1.*data.seed"):
        ablate([tmp_path / "b.toml"], [], [0, 1], out, *options)
    assert not out.exists()


def test_recipes_are_found_in_order_and_have_different_names(tmp_path):
    for name in ("a", "baseline", "z"):
        (tmp_path / f"{name}.toml").touch()
    assert [path.stem for path in find_recipes([tmp_path])] == ["baseline", "a", "z"]
    assert [path.stem for path in find_recipes([tmp_path / "z.toml", tmp_path / "a.toml"])] == ["z", "a"]
    with pytest.raises(UserError, match="two recipes are called z"):
        find_recipes([tmp_path, tmp_path / "z.toml"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no recipe is there; expected \.toml files"):
        find_recipes([tmp_path / "empty"])
