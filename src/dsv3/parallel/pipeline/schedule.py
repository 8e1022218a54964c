"""A schedule: what every rank does for one batch, in order. The executor runs it, the simulator times it, nothing else is one."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.errors import UserError
from dsv3.parallel.pipeline.instructions import Compute, Forward, Instruction, Program, chunks
from dsv3.parallel.pipeline.messages import with_messages


@dataclass(frozen=True)
class Schedule:
    """One program a rank, messages included."""

    name: str
    stages: int
    programs: tuple[tuple[Instruction, ...], ...]

    @classmethod
    def of(cls, name: str, stages: int, programs: Sequence[Sequence[Compute]]) -> "Schedule":
        """From what the ranks compute; who must tell whom follows from that."""
        return cls(name, stages, tuple(map(tuple, with_messages(programs))))

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.programs)

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        return tuple(sorted({stage for stage, _ in forwards(self.programs[rank])}))

    def micro_batches(self, rank: int, stage: int) -> tuple[int, ...]:
        """Those that pass a stage on a rank, in order."""
        return tuple(sorted(each for at, each in forwards(self.programs[rank]) if at == stage))

    @property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every stage."""
        held = [self.held(rank) for rank in range(self.ranks)]
        return tuple(tuple(rank for rank in range(self.ranks) if stage in held[rank]) for stage in range(self.stages))


def forwards(program: Program) -> list[tuple[int, int]]:
    """(stage, micro-batch) of every forward pass."""
    passes = [each for instruction in program for each in chunks(instruction)]
    return [(each.stage, each.micro_batch) for each in passes if isinstance(each, Forward)]


def at_least(least: int, name: str, ranks: int, micro_batches: int) -> None:
    """Refuses fewer micro-batches, or no rank at all."""
    if ranks < 1:
        raise UserError(f"{name} on {ranks} ranks: expected at least 1")
    if micro_batches < least:
        raise UserError(
            f"{name} on {ranks} ranks with {micro_batches} micro-batches: expected at least {least}. Use smaller micro-batches, "
            f"fewer ranks, or one_f_one_b, which takes any number"
        )
