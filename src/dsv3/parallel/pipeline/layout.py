"""Which blocks are in which stage of a pipeline: data, uneven where it must be, balanced by what the blocks cost.

The embedding belongs to the first stage; final norm, head and MTP modules to the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from dsv3.errors import UserError
from dsv3.parallel.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Layout:
    """The names of the blocks (`Block.name`) of every stage, those of the MTP modules at the end of the last."""

    stages: tuple[tuple[str, ...], ...]

    @cached_property
    def last(self) -> int:
        """The last stage's number."""
        return len(self.stages) - 1

    def parts(self, stage: int) -> set[str]:
        """What a stage holds: prefixes of parameter names, the embedding's too where MTP modules read it."""
        blocks = self.stages[stage]
        held = {name if name.startswith("mtp.") else f"layers.{name}" for name in blocks}
        if stage == 0 or any(name.startswith("mtp.") for name in blocks):
            held.add("embed_tokens")
        return held | {"norm", "lm_head"} if stage == self.last else held

    def holders(self, schedule: Schedule) -> dict[str, tuple[int, ...]]:
        """The ranks that hold each part. Where there are several, its gradient is the sum of theirs, and the first one's counts."""
        held = [set().union(*map(self.parts, stages)) for stages in schedule.placement]
        return {part: tuple(r for r, own in enumerate(held) if part in own) for part in sorted(set().union(*held))}


def balanced_layout(costs: Sequence[float], stages: int, first: float, last: float, mtp_modules: int) -> Layout:
    """The blocks in order, so that the stage that costs most costs least, and the others differ least.

    `costs` are of the main model's blocks; `first` is what the first stage has beside blocks (the embedding), `last` what the
    last one has (final norm, head, MTP modules). Raises `UserError` where a stage would have no block.
    """
    blocks = len(costs)
    if not 1 <= stages <= blocks:
        raise UserError(
            f"{stages} pipeline stages for {blocks} blocks: expected 1 to {blocks}, at least a block a stage"
        )
    sums = [0.0, *accumulate(costs)]
    # best[end]: (the greatest cost, the sum of squares, where each stage begins) of stages that hold blocks 0 .. end - 1.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        beside = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, blocks - (stages - stage - 1) + 1):
            found[end] = min(
                (max(greatest, cost), squares + cost * cost, (*starts, start))
                for start, (greatest, squares, starts) in best.items()
                if start < end
                for cost in [sums[end] - sums[start] + beside]
            )
        best = found
    starts = best[blocks][2]
    parts = [tuple(map(str, range(a, b))) for a, b in zip(starts, (*starts[1:], blocks), strict=True)]
    return Layout((*parts[:-1], (*parts[-1], *(f"mtp.{k}" for k in range(mtp_modules)))))
