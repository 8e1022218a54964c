"""A schedule: what every rank does for one batch, in order. The executor runs it, the simulator times it, nothing else is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.parallel.pipeline.instructions import Compute, Forward, Instruction, Program, chunks
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
        """From what the ranks compute; who must tell whom follows from that."""
        return cls(name, placement, tuple(map(tuple, with_messages(programs))))

    @property
    def stages(self) -> int:
        """How many there are."""
        return 1 + max(map(max, self.placement))

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.programs)

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        return self.placement[rank]

    def micro_batches(self, rank: int, stage: int) -> tuple[int, ...]:
        """Those that pass a stage on a rank, in order."""
        return tuple(sorted(each for at, each in forwards(self.programs[rank]) if at == stage))

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every stage."""
        return tuple(tuple(r for r in range(self.ranks) if stage in self.held(r)) for stage in range(self.stages))


def forwards(program: Program) -> list[tuple[int, int]]:
    """(stage, micro-batch) of every forward pass."""
    passes = [each for instruction in program for each in chunks(instruction)]
    return [(each.stage, each.micro_batch) for each in passes if isinstance(each, Forward)]
