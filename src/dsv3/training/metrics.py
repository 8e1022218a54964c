"""Where a run's figures go: one JSON line a step, and TensorBoard."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dsv3.errors import RunError


class Metrics:
    """Writes `metrics.jsonl`, `evaluations.jsonl` and `tensorboard/` in a run's directory; a context manager.

    After a resume, lines of steps that are run again are dropped first, so that every step stands once.
    """

    def __init__(self, directory: Path, last_step: int = 0):
        self.directory = directory
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            keep_until(directory / name, last_step)
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """One training step."""
        self.append("metrics.jsonl", record)
        for name, value in flatten(record):
            self.board.add_scalar(f"train/{name}", value, record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation."""
        self.append("evaluations.jsonl", record)
        for name, value in flatten(record):
            self.board.add_scalar(f"evaluation/{name}", value, record["step"])

    def append(self, name: str, record: dict[str, Any]) -> None:
        """One line of a `.jsonl` file, on disk when this returns. Raises `RunError` when it cannot be written."""
        try:
            with (self.directory / name).open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.directory / name}: {error.strerror}") from error

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.board.close()


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


def keep_until(path: Path, last_step: int) -> None:
    """Keeps a file's whole lines up to a step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            kept.append(line + "\n")
    path.write_text("".join(kept))
