"""A schedule: what every rank does for one batch, in order. The executor runs it, the simulator times it."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.parallel.pipeline.instructions import Compute, Instruction
from dsv3.parallel.pipeline.messages import with_messages

Placement = tuple[tuple[int, ...], ...]
"""The stages of every rank, in order."""


@dataclass(frozen=True)
class Schedule:
    """One program a rank, messages included. A rank may hold a stage that it computes nothing of: the copy of another's."""

    name: str
    placement: Placement
    programs: tuple[tuple[Instruction, ...], ...]

    @classmethod
    def of(cls, name: str, placement: Placement, programs: Sequence[Sequence[Compute]]) -> "Schedule":
        """From what the ranks compute; the messages follow from that."""
        return cls(name, placement, tuple(map(tuple, with_messages(programs))))

    @property
    def stages(self) -> int:
        """How many there are."""
        return 1 + max(map(max, self.placement))

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.programs)
