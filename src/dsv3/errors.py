"""The two ways a run ends early. Both carry one paragraph for the user: what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The request cannot be served as written: an unknown key, a wrong shape, an illegal combination. Exit code 2."""


class RunError(RuntimeError):
    """The request was right, but the run cannot go on: disk full, a loss that is not finite. Exit code 1."""


def nearest(name: str, legal: Iterable[str]) -> str:
    """The end of a refusal: the closest legal names, or all of them when none is close."""
    legal = sorted(legal)
    close = difflib.get_close_matches(name, legal, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"legal are: {', '.join(legal)}"
