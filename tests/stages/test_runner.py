import json
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.stages.runner import Stage, finished, run_stages


class Pipeline:
    """Three stages that count how often they run; the second makes a directory and can be made to fail midway."""

    def __init__(self, directory: Path):
        self.directory, self.fail = directory, False
        self.inputs = {"one": {"size": 1}, "two": {"seed": 0, "nested": {"rate": 0.5}}, "three": {}}
        self.ran, self.said = [], []
        self.refused = lambda: None

    def stage(self, name):
        output = self.directory / (name if name != "three" else "three.html")

        def run():
            self.ran.append(name)
            if name == "three":
                output.write_text("page")
                return
            output.mkdir(exist_ok=True)
            (output / "begun").write_text("")
            if name == "two" and self.fail:
                raise ZeroDivisionError
            (output / "whole").write_text(json.dumps(self.inputs[name]))

        return Stage(
            name, self.inputs[name], output, run, {"one": (), "two": ("one",), "three": ("two",)}[name],
            (lambda: self.refused()) if name == "two" else lambda: None,
        )  # fmt: skip

    def run(self, **options):
        """(the stages that ran, what was said of each)"""
        self.ran.clear()
        self.said.clear()
        stages = [self.stage(name) for name in ("one", "two", "three")]
        run_stages(stages, self.directory, lambda said: self.said.append(said.partition(": ")[2]), **options)
        return list(self.ran), list(self.said)


@pytest.fixture
def pipeline(tmp_path):
    return Pipeline(tmp_path / "out")


NOTHING = ([], ["cached"] * 3)
ALL = (["one", "two", "three"], ["started"] * 3)


def test_a_second_run_does_nothing(pipeline):
    assert pipeline.run() == ALL
    assert pipeline.run() == NOTHING
    assert pipeline.run(replace=False) == NOTHING


def test_an_interrupted_stage_goes_on_with_what_it_left(pipeline):
    pipeline.fail = True
    with pytest.raises(ZeroDivisionError):
        pipeline.run()
    (pipeline.directory / "two" / "checkpoint").write_text("kept")
    pipeline.fail = False
    assert pipeline.run() == (["two", "three"], ["cached", "resumed", "started"])
    assert (pipeline.directory / "two" / "checkpoint").exists()


def test_a_changed_input_starts_its_stage_and_those_after_it_afresh(pipeline):
    pipeline.run()
    (pipeline.directory / "two" / "old").write_text("")
    pipeline.inputs["two"] = {"seed": 1, "nested": {"rate": 0.5}}
    assert pipeline.run() == (["two", "three"], ["cached", "started", "started"])
    assert not (pipeline.directory / "two" / "old").exists()
    pipeline.inputs["one"] = {"size": 2}
    assert pipeline.run() == ALL
    assert pipeline.run() == NOTHING


def test_a_change_while_a_stage_was_interrupted_starts_afresh(pipeline):
    pipeline.fail = True
    with pytest.raises(ZeroDivisionError):
        pipeline.run()
    pipeline.fail = False
    pipeline.inputs["two"] = {"seed": 9}
    assert pipeline.run() == (["two", "three"], ["cached", "started", "started"])


def test_nothing_is_replaced_where_that_is_not_wanted(pipeline):
    pipeline.run()
    pipeline.inputs["two"] = {"seed": 1, "nested": {"rate": 0.7}}
    with pytest.raises(UserError) as caught:
        pipeline.run(replace=False)
    assert "two was made from other inputs: nested.rate was 0.5 and is 0.7; seed was 0 and is 1." in str(caught.value)
    assert (pipeline.directory / "two" / "whole").exists()
    pipeline.inputs["two"] = {"seed": 0, "nested": {"rate": 0.5}}
    assert pipeline.run(replace=False) == NOTHING


def test_a_stage_that_may_goes_on_with_its_output(pipeline):
    pipeline.run()
    (pipeline.directory / "two" / "old").write_text("")
    pipeline.inputs["two"] = {"seed": 0, "nested": {"rate": 0.7}}
    pipeline.refused = lambda: ["rate was 0.5 and is 0.7"]
    with pytest.raises(UserError, match=r"other inputs: rate was 0.5 and is 0.7\. .*name with --allow"):
        pipeline.run(replace=False, allow=["nested.rate"])
    pipeline.refused = list
    assert pipeline.run(replace=False) == (["two", "three"], ["cached", "resumed", "started"])
    assert (pipeline.directory / "two" / "old").exists()


def test_what_was_made_of_other_things_is_not_gone_on_with(pipeline):
    """Its own inputs are the same, those of the stage before it are not."""
    pipeline.run()
    (pipeline.directory / "two" / "old").write_text("")
    pipeline.refused = list
    pipeline.inputs["one"] = {"size": 2}
    assert pipeline.run() == ALL
    assert not (pipeline.directory / "two" / "old").exists()


def test_what_is_allowed_by_name_is_made_again(pipeline):
    pipeline.run()
    (pipeline.directory / "two" / "old").write_text("")
    pipeline.inputs["one"] = {"size": 2}
    with pytest.raises(UserError, match="one was made from other inputs: size was 1 and is 2"):
        pipeline.run(replace=False, allow=["data.other"])
    pipeline.refused = list
    pipeline.fail = True
    with pytest.raises(ZeroDivisionError):
        pipeline.run(replace=False, allow=["data.size"])
    assert pipeline.said == ["started", "resumed"]
    assert (pipeline.directory / "two" / "old").exists()


def test_a_removed_output_is_made_again(pipeline):
    pipeline.run()
    (pipeline.directory / "three.html").unlink()
    assert pipeline.run() == (["three"], ["cached", "cached", "started"])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": "x"}', '{"key": "x", "before": "", "inputs": {}, "done": true}']
)
def test_a_damaged_record_starts_its_stage_afresh(pipeline, content):
    pipeline.run()
    (pipeline.directory / "stages" / "two.json").write_text(content)
    with pytest.raises(UserError, match=r"two was made from other inputs"):
        pipeline.run(replace=False)
    # What comes after depends on inputs, not on when they were made.
    assert pipeline.run() == (["two"], ["cached", "started", "cached"])
    assert pipeline.run() == NOTHING


def test_a_directory_that_no_stage_made_is_not_touched(pipeline):
    mine = pipeline.directory / "two" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(UserError, match=r"out/two is there already and was not made by a run in this directory"):
        pipeline.run()
    assert mine.read_text() == "precious"


def test_an_unwritable_directory_is_refused(pipeline):
    pipeline.directory.write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to .*out: Not a directory; choose another output directory"):
        pipeline.run()
    assert pipeline.ran == []


def test_finished_says_what_a_second_run_would_find(pipeline):
    def is_finished():
        return finished([pipeline.stage(name) for name in ("one", "two", "three")], pipeline.directory)

    assert not is_finished()
    pipeline.fail = True
    with pytest.raises(ZeroDivisionError):
        pipeline.run()
    assert not is_finished()
    pipeline.fail = False
    pipeline.run()
    assert is_finished()
    pipeline.inputs["one"] = {"size": 2}
    assert not is_finished()
    pipeline.run()
    (pipeline.directory / "three.html").unlink()
    assert not is_finished()


def test_a_stage_depends_on_those_it_needs_and_on_no_other(tmp_path):
    seeds, ran = {"root": 0, "left": 0, "right": 0, "end": 0}, []
    needs = {"root": (), "left": ("root",), "right": ("root",), "end": ("left", "right")}

    def make(name):
        ran.append(name)
        (tmp_path / name).write_text("")

    def changed(name):
        seeds[name] += 1
        ran.clear()
        stages = [
            Stage(name, {"seed": seed}, tmp_path / name, lambda name=name: make(name), needs[name])
            for name, seed in seeds.items()
        ]
        run_stages(stages, tmp_path, lambda *_: None)
        return ran

    assert changed("root") == ["root", "left", "right", "end"]
    assert changed("left") == ["left", "end"]
    assert changed("right") == ["right", "end"]
    assert changed("end") == ["end"]
