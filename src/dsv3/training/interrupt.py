"""Ctrl-C as a request: the step is finished and saved before the run stops."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written; the message names it."""


@contextmanager
def stopping_on_interrupt(request: Callable[[], None]) -> Iterator[None]:
    """Calls `request` at the first Ctrl-C; a second one acts at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        request()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
