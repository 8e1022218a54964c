"""Reads the records of a run, finished or going: `run.json`, `metrics.jsonl`, `evaluations.jsonl`, the latest checkpoint."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import UserError

TRAININGS = ("pretrain", "extend")
"""What the directory of a training is called within its run."""

Row = Mapping[str, Any]
"""One line of `metrics.jsonl` or `evaluations.jsonl`; always has `step` and `tokens`."""


@dataclass(frozen=True)
class Run:
    """What a run directory holds at this moment."""

    path: Path
    about: Mapping[str, Any]
    """`run.json`: recipe, derived, machine, versions, command; empty before it is written."""
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    checkpoint: Path | None
    notes: Sequence[str]
    """One sentence for every part that is absent or unreadable."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """As `run.json` has it; empty before it is written."""
        return self.about.get("recipe") or {}


def read_run(path: Path) -> Run:
    """Reads as much of a run directory as has been written; `UserError` when `path` is not one."""
    if not any((path / part).is_dir() for part in ("tokenizer", "shards", *TRAININGS)):
        raise UserError(
            f"{path} is not a run directory: expected one that holds tokenizer/, shards/, pretrain/ or extend/, "
            "such as runs/quickstart, which `dsv3 quickstart` makes"
        )
    home = next((path / part for part in TRAININGS if (path / part).is_dir()), path / TRAININGS[0])
    notes, about = [], {}
    try:
        about = json.loads((home / "run.json").read_text("utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{home.name}/run.json is not there yet: the recipe and the machine are unknown.")
    except json.JSONDecodeError as error:
        notes.append(f"{home.name}/run.json is not whole ({error}): the recipe and the machine are left out.")
    records = {}
    for name, what in (("metrics.jsonl", "training step"), ("evaluations.jsonl", "evaluation")):
        records[name], unreadable = read_rows(home / name)
        if not records[name]:
            notes.append(f"{home.name}/{name} holds no {what} yet.")
        if unreadable:
            notes.append(f"Lines of {home.name}/{name} that are not whole records and are left out: {unreadable}.")
    latest = home / "checkpoints" / "latest"
    checkpoint = latest.parent / latest.read_text("utf-8", errors="replace").strip() if latest.is_file() else None
    if checkpoint is None:
        notes.append("There is no checkpoint yet.")
    return Run(path, about, records["metrics.jsonl"], records["evaluations.jsonl"], checkpoint, notes)


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The records of a JSONL file by rising step, and how many lines are none; `([], 0)` when there is no file.

    A last line without its newline is still being written and is not counted. Where a step repeats, the run was resumed
    before it, and the earlier records from that step on are dropped.
    """
    rows: list[Row] = []
    unreadable = 0
    if not path.is_file():
        return rows, unreadable
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step, _ = row["step"], row["tokens"]
            except (json.JSONDecodeError, TypeError, KeyError):
                unreadable += line.endswith("\n")
                continue
            while rows and rows[-1]["step"] >= step:
                rows.pop()
            rows.append(row)
    return rows, unreadable
