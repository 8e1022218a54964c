"""What long commands show: a panel of what was decided before the first step, then progress.

Code below `cli/` shows progress by calling what it was handed:
`progress(stage="pretrain", done=12, total=930, loss=5.1, tokens_per_second=7100.0)`. Any callable will do there; `Progress` is
the terminal's. On a terminal every stage is a live bar, otherwise a line every few seconds.
"""

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Self

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from dsv3.recipe.figures import duration, human, storage

SECONDS_BETWEEN_LINES = 5.0
WIDTH = 200
"""Columns of a table that is written to a file or a pipe."""


def print_table(head: Sequence[str], sections: Iterable[Iterable[Sequence[str]]], left: Container[int] = (0,)) -> None:
    """Prints a table on stdout with room between its sections: figures to the right, except for the columns with the numbers in `left`."""
    table = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number in left else "right")
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def verdict(aim: str, met: bool | None) -> str:
    """A target, and whether it was met; None: there is none, or nobody knows."""
    return aim if met is None else f"{aim}: {'met' if met else 'missed'}"


def panel(console: Console, title: str, rows: Mapping[str, object]) -> None:
    """Prints aligned rows in a frame."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, str(value))
    console.print(Panel(grid, title=title, title_align="left", box=box.ROUNDED, expand=False))


class Progress:
    """Shows the stages of a command. Use it as a context manager, and call it as often as there is news."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic):
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._live = self.console.is_terminal
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, in_bytes: bool = False, **figures: float | str) -> None:
        """`done` of `total` steps of `stage`, or bytes, and any figures by name; `..._per_second` is
        shown as `.../s`."""
        now = self._clock()
        started, first = self._started.setdefault(stage, (now, done))
        count = f"{storage(done)} of {storage(total)}" if in_bytes else f"{done}/{total}"
        parts = [count, *(show_figure(name, value) for name, value in figures.items())]
        if first < done < total:
            parts.append(f"{duration((now - started) * (total - done) / (done - first))} left")
        elif done >= total:
            parts.append(f"done in {duration(now - started)}")
        if self._live:
            text = "  ".join(parts)
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, text=text)
            self._bars.update(self._tasks[stage], total=total, completed=done, text=text)
        elif done >= total or now - self._printed.get(stage, -SECONDS_BETWEEN_LINES) >= SECONDS_BETWEEN_LINES:
            self._printed[stage] = now
            self.note(f"{stage}: {', '.join(parts)}")

    def note(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_figure(name: str, value: float | str) -> str:
    """A figure for a person: `loss 3.142`, `7.1K tokens/s`."""
    if isinstance(value, str):
        return f"{name.replace('_', ' ')} {value}"
    if name.endswith("_per_second"):
        return f"{human(value)} {name.removesuffix('_per_second').replace('_', ' ')}/s"
    return f"{name.replace('_', ' ')} {human(value)}"
