"""Incremental detokenisation: whole characters only, and nothing that could be the beginning of a stop text."""

from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.params import SamplingParams


class TextSoFar:
    """Tokens in, text out; no text without a tokenizer. `stopped`: the stop text that was found."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams):
        self.stream, self.stop = None if tokenizer is None else tokenizer.stream(), params.stop
        self.shown_stop = params.include_stop_str_in_output
        self.hidden = tokenizer.special_ids if tokenizer and params.skip_special_tokens else frozenset[int]()
        self.held = ""
        self.stopped: str | None = None

    def push(self, token: int, search: bool = True) -> str:
        """The text that one more token releases; `search`: whether a stop text may end it already."""
        if self.stream is not None and token not in self.hidden:
            self.held += self.stream.push(token)
        return self.release(search)

    def flush(self) -> str:
        """The rest, at the end."""
        self.held += "" if self.stream is None else self.stream.flush()
        shown = self.release(search=True)
        return shown if self.stopped is not None else shown + self.taken(len(self.held))

    def release(self, search: bool) -> str:
        """The part of the held text that may be shown."""
        if not (search and self.stop):
            return self.taken(len(self.held))
        # The stop text that is complete first, so that the result does not depend on how the text is split.
        found = [(at + len(stop), at, stop) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            end, at, self.stopped = min(found)
            shown = self.taken(end if self.shown_stop else at)
            self.held = ""
            return shown
        return self.taken(len(self.held) - max((overlap(self.held, stop) for stop in self.stop), default=0))

    def taken(self, count: int) -> str:
        """Removes the first characters from the held text and returns them."""
        shown, self.held = self.held[:count], self.held[count:]
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
