"""Stages cached by content: each has a key made from what it depends on, and is run only when its key is new.

Key and inputs are written before a stage runs and marked as done after, in `DIRECTORY/stages/NAME.json`. So a second run
skips what is done, resumes a stage that was interrupted (training does, from its checkpoint), and starts over, or refuses,
where an input changed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.disk import replace_file
from dsv3.errors import UserError
from dsv3.recipe.differences import differences


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline."""

    name: str
    inputs: dict[str, Any]
    """What the result depends on, JSON-able. The keys of the stages it needs count as well."""
    output: Path
    """The file or directory it makes; removed when the stage must start afresh."""
    run: Callable[[], object]
    needs: Sequence[str] = ()
    """Names of the stages it depends on."""
    refused: Callable[[], list[str] | None] = lambda: None
    """Called when the output was made from other inputs: the reasons why `run` cannot continue it, empty if it can; None
    when there is nothing to continue."""
    together: bool = False
    """Whether all ranks of a job run it, and not the first alone."""


def run_stages(
    stages: Sequence[Stage],
    directory: Path,
    say: Callable[[str], None],
    *,
    replace: bool = True,
    allow: Sequence[str] = (),
) -> None:
    """Runs the stages in order; `say` hears of each: "NAME: cached", "resumed" or "started".

    Where an input changed, a stage continues its output if it can. Otherwise the output is deleted and made again; without
    `replace` this is refused, unless only inputs named in `allow` changed. Raises `UserError` then, naming what changed,
    and when the directory cannot be written or holds files that no stage made.
    """
    try:
        (directory / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another output directory") from None
    for stage, before, key in chained(stages):
        record = directory / "stages" / f"{stage.name}.json"
        known = read_record(record)
        if is_done(stage, key, known):
            say(f"{stage.name}: cached")
            continue
        if known is None or known["key"] != key:
            # Where nothing is replaced unasked, stages before this one changed in what is allowed, if at all.
            fitting = known is not None and (known["before"] == before or not replace)
            if stage.output.exists() and not (fitting and stage.refused() == []):
                check_replaceable(stage, record, known, replace, allow)
                if stage.output.is_dir():
                    shutil.rmtree(stage.output)
                else:
                    stage.output.unlink()
            write_record(record, key, before, stage.inputs, done=False)
        say(f"{stage.name}: {'resumed' if stage.output.exists() else 'started'}")
        stage.run()
        write_record(record, key, before, stage.inputs, done=True)


def finished(stages: Sequence[Stage], directory: Path) -> bool:
    """Whether `run_stages` would find nothing to do."""
    return all(
        is_done(stage, key, read_record(directory / "stages" / f"{stage.name}.json"))
        for stage, _, key in chained(stages)
    )


def is_done(stage: Stage, key: str, known: dict[str, Any] | None) -> bool:
    """Whether a stage's output is there, and its record says that it was finished from the same inputs."""
    return known is not None and known["key"] == key and known["done"] and stage.output.exists()


def chained(stages: Sequence[Stage]) -> Iterator[tuple[Stage, str, str]]:
    """Each stage with the keys of those it needs and with its own: the SHA-256 of its name, its inputs and those keys."""
    keys: dict[str, str] = {}
    for stage in stages:
        before = " ".join(keys[name] for name in stage.needs)
        content = json.dumps([stage.name, stage.inputs, before], sort_keys=True)
        keys[stage.name] = hashlib.sha256(content.encode()).hexdigest()
        yield stage, before, keys[stage.name]


def check_replaceable(
    stage: Stage, record: Path, known: dict[str, Any] | None, replace: bool, allow: Sequence[str]
) -> None:
    """Refuses to delete an output that nothing here made, or that the caller wants to keep."""
    if not record.exists() and stage.output.is_dir():
        raise UserError(
            f"{stage.output} is there already and was not made by a run in this directory; move it away, or choose "
            "another output directory"
        )
    if replace:
        return
    refused = stage.refused()
    changed = differences(known["inputs"], json.loads(json.dumps(stage.inputs))) if known else []
    if refused is None and known is not None and all(is_allowed(each.partition(" ")[0], allow) for each in changed):
        return
    said = "; ".join(refused or changed) or "its record is unreadable"
    raise UserError(
        f"{stage.output} was made from other inputs: {said}. Continue with what it was made from, choose another output "
        "directory, or name with --allow what may differ"
    )


def is_allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether one of the names means an input: a stage may know a recipe's `data.fim_rate` by its last word."""
    return any(name == key or name.endswith(f".{key}") for name in allow)


def read_record(path: Path) -> dict[str, Any] | None:
    """A stage's record, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and content.keys() == {"key", "before", "inputs", "done"} else None


def write_record(path: Path, key: str, before: str, inputs: dict[str, Any], done: bool) -> None:
    """Replaces a stage's record as a whole; `before` is the key of the stage before it."""
    replace_file(path, json.dumps({"key": key, "before": before, "inputs": inputs, "done": done}))
