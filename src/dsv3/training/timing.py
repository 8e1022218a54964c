"""Seconds spent, by what for."""

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager


@contextmanager
def timed(
    spent: MutableMapping[str, float], what: str, clock: Callable[[], float] = time.perf_counter
) -> Iterator[None]:
    """Adds what the clock says it lasted to `spent[what]`, which starts at 0; not when it ends in an error."""
    started = clock()
    yield
    spent[what] = spent.get(what, 0.0) + clock() - started
