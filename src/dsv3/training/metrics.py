"""Where a run's figures go: one JSON line a step, and TensorBoard."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from dsv3.errors import RunError


class Metrics:
    """Writes `metrics.jsonl`, `evaluations.jsonl` and `tensorboard/` in a run's directory; a context manager.

    `last_step` is the step after which the run continues, None where it begins. Records of later steps are dropped, so
    that every step is there once. `sinks` (see `open_sinks`) are given everything as well.
    """

    def __init__(self, directory: Path, last_step: int | None = None, sinks: Sequence[Any] = ()):
        self.directory, self.sinks = directory, sinks
        first = 0 if last_step is None else last_step + 1
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            keep_before(directory / name, first)
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=first)

    def step(self, record: dict[str, Any]) -> None:
        """One training step."""
        self.write("metrics.jsonl", "train", record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation."""
        self.write("evaluations.jsonl", "evaluation", record)

    def write(self, name: str, group: str, record: dict[str, Any]) -> None:
        """One record, everywhere: on disk when this returns. Raises `RunError` when it cannot be written."""
        try:
            with (self.directory / name).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.directory / name}: {error.strerror}") from error
        figures = {f"{group}/{name}": value for name, value in flatten(record)}
        # One event for all of them: one `add_scalar` each would take twice as long as the rest of a record.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self.board._get_file_writer().add_summary(Summary(value=values), record["step"])
        for sink in self.sinks:
            sink.log(figures, step=record["step"])

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.board.close()
        for sink in self.sinks:
            sink.finish()


def flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested record with slashed names; lists of loads are left to the JSON lines."""
    numbers: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, bool | str) or key in ("load", "samples", "step"):
            continue
        if isinstance(value, int | float):
            numbers.append((prefix + key, float(value)))
        elif isinstance(value, dict):
            numbers += flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            numbers += flatten({str(i): each for i, each in enumerate(value)}, f"{prefix}{key}/")
    return numbers


def keep_before(path: Path, first_step: int) -> None:
    """Keeps a file's whole lines of the steps before one; replaces the file in one go."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] < first_step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
