import io

import pytest
from rich.console import Console

from dsv3.cli.ui import Progress, panel, show_figure


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_where_there_is_no_terminal() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(Console(file=out, width=40), clock) as progress:
        for done in range(1, 31):
            progress(stage="pretrain", done=done, total=30, loss=5 - done / 10, tokens_per_second=7123.4)
            clock.now += 0.5
        progress(stage="report", done=1, total=1)
        progress.note("[kept] as it is")
    assert out.getvalue().splitlines() == [
        "pretrain: 1/30, loss 4.9, 7.12K tokens/s",
        "pretrain: 11/30, loss 3.9, 7.12K tokens/s, 10 seconds left",
        "pretrain: 21/30, loss 2.9, 7.12K tokens/s, 4 seconds left",
        "pretrain: 30/30, loss 2, 7.12K tokens/s, done in 14 seconds",
        "report: 1/1, done in 0 seconds",
        "[kept] as it is",
    ]


def test_time_left_counts_from_where_a_run_was_resumed() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(Console(file=out), clock)
    progress(stage="pretrain", done=900, total=1000)
    clock.now += 10
    progress(stage="pretrain", done=950, total=1000)
    assert out.getvalue().splitlines()[1] == "pretrain: 950/1000, 10 seconds left"


def test_bars_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress(stage="pretrain", done=3, total=10, loss=2.5)
        progress.note("a checkpoint")
        progress(stage="pretrain", done=10, total=10, loss=1.5)
    for words in ("pretrain", "3/10", "loss 2.5", "a checkpoint", "10/10  loss 1.5"):
        assert words in out.getvalue()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 3.14159, "loss 3.142"),
        ("step", 9999, "step 9999"),
        ("documents", 12345, "documents 12.3K"),
        ("tokens_per_second", 1_230_000.0, "1.23M tokens/s"),
        ("learning_rate", 2.2e-4, "learning rate 0.00022"),
        ("source", "stdlib", "source stdlib"),
    ],
)
def test_figures(name: str, value: float | str, text: str) -> None:
    assert show_figure(name, value) == text


def test_the_panel_aligns_its_rows() -> None:
    out = io.StringIO()
    panel(Console(file=out, width=60), "dsv3", {"tokens": "1.9M", "parameters": 123})
    top, first, second, bottom = out.getvalue().splitlines()
    assert "dsv3" in top
    assert first.index("1.9M") == second.index("123")
    assert bottom.startswith("╰")
