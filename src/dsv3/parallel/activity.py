"""What a rank is doing, for the message when the job fails or hangs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dsv3.errors import RunError


class LostError(RunError):
    """A collective operation failed: another rank ended, or was too late."""


class Activity:
    """The instruction under way on one rank."""

    def __init__(self, rank: int = 0):
        self.rank = rank
        self.instruction = "starting"
        self.since = time.monotonic()

    def begin(self, instruction: str) -> None:
        """Notes the instruction that starts now."""
        self.instruction, self.since = instruction, time.monotonic()

    @contextmanager
    def communicating(self, what: str) -> Iterator[None]:
        """Around one collective operation; `LostError` naming rank and instruction where other ranks have gone."""
        before, since = self.instruction, self.since
        self.begin(f"{before}: {what}")
        try:
            yield
        except RuntimeError as error:
            raise LostError(
                f"rank {self.rank} lost the others in {self.instruction!r}, after {time.monotonic() - self.since:.0f} s: "
                f"{str(error).splitlines()[0]}. Another rank ended or hangs; its own message says why. Start the job "
                "again with --resume to go on from the last checkpoint."
            ) from error
        self.instruction, self.since = before, since
