"""Which ranks do what together: the job as pipeline x data, with the experts spread within data.

Rank p * data + d is stage p of pipeline d. Of the data-parallel ranks of a stage, `expert` neighbours hold the routed experts
once between them (so that they share a node, or few nodes); ranks at a distance of `expert` hold the same ones.

| group | ranks | what they share |
| --- | --- | --- |
| `pipeline` | the stages of one pipeline | a micro-batch, one after the other |
| `data` | all ranks of one stage | a batch; the sum of the gradients of all but the experts; optimizer state |
| `expert` | neighbours in `data` | the experts, each of which is on one of them |
| `expert_data` | those of `data` with the same experts | the sum of these experts' gradients; their optimizer state |
| `node`, `rail` | those of `expert` on one node; those with the same place in each node | the two legs of the dispatch |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dsv3.errors import RunError, UserError
from dsv3.parallel.activity import Activity
from dsv3.parallel.group import Group
from dsv3.recipe.parallel import ParallelSection

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long ranks wait on the host for the first one, which may be building token shards. If that one fails, `torchrun` ends them."""


@dataclass(frozen=True)
class Mesh:
    """One rank's groups; by default those of a process alone."""

    world: Group = field(default_factory=lambda: Group("world"))
    """All ranks; for objects and tensors on the CPU alone."""
    pipeline: Group = field(default_factory=lambda: Group("pipeline"))
    data: Group = field(default_factory=lambda: Group("data"))
    expert: Group = field(default_factory=lambda: Group("expert"))
    expert_data: Group = field(default_factory=lambda: Group("expert_data"))
    node: Group = field(default_factory=lambda: Group("node"))
    rail: Group = field(default_factory=lambda: Group("rail"))
    saving: Group = field(default_factory=lambda: Group("saving"))
    """All ranks, for the thread that writes checkpoints."""

    @property
    def activity(self) -> Activity:
        """What this rank is doing."""
        return self.world.activity

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, and writes what is written once."""
        return self.world.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first rank alone; its result on every rank. `UserError`, `RunError` and `OSError` are raised on all."""
        found: T | UserError | RunError | OSError | None = None
        if self.first:
            try:
                found = work()
            except (UserError, RunError, OSError) as error:
                found = error
        result = self.world.objects(found)[0]
        if isinstance(result, UserError | RunError | OSError):
            raise result
        return result


def make_mesh(parallel: ParallelSection, ranks_per_node: int) -> Mesh:
    """The mesh of a process whose default process group is there. Every process makes every group, in the same order."""
    rank, size = dist.get_rank(), dist.get_world_size()
    activity = Activity(rank)

    def group(name: str, all_ranks: Sequence[Sequence[int]], backend: str | None = None) -> Group:
        """This process's one of these groups, which together are all ranks."""
        own = Group(name, (rank,), 0, None, activity)
        for ranks in all_ranks:
            if len(ranks) == 1:
                continue
            handle = dist.new_group(list(ranks), backend=backend, timeout=PATIENCE if backend == "gloo" else None)
            if rank in ranks:
                own = Group(name, tuple(ranks), ranks.index(rank), handle, activity)
        return own

    everyone = list(range(size))
    data = [everyone[start : start + parallel.data] for start in range(0, size, parallel.data)]
    expert = [
        each[start : start + parallel.expert] for each in data for start in range(0, parallel.data, parallel.expert)
    ]
    width = min(ranks_per_node, parallel.expert)
    if parallel.expert % width:
        raise UserError(
            f"parallel.expert = {parallel.expert} with {ranks_per_node} processes a node: expected a multiple or a divisor "
            "of these, so that the experts fill whole nodes"
        )
    return Mesh(
        world=group("world", [everyone], "gloo"),
        pipeline=group("pipeline", [everyone[start :: parallel.data] for start in range(parallel.data)]),
        data=group("data", data),
        expert=group("expert", expert),
        expert_data=group("expert_data", [each[i :: parallel.expert] for each in data for i in range(parallel.expert)]),
        node=group(
            "node", [each[start : start + width] for each in expert for start in range(0, parallel.expert, width)]
        ),
        rail=group("rail", [each[i::width] for each in expert for i in range(width)]),
        saving=replace(group("saving", [everyone], "gloo"), activity=Activity(rank)),
    )
