"""A pipeline rank in training: its part of the network, and its passes."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.executor import Executor
from dsv3.parallel.pipeline.parts import hold
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.planning.layout import divided, schedule_of
from dsv3.precision.deferred import WeightGradients
from dsv3.recipe.schema import Recipe


class Pipelined:
    """One rank of the pipeline that `group` is. `build` makes the whole network on the meta device.

    Raises `UserError` for a network or a number of ranks that the recipe's schedule cannot divide.
    """

    def __init__(self, recipe: Recipe, group: Group, build: Callable[[], DeepSeekV3]):
        self.group, self.build, self.parallel = group, build, recipe.parallel
        fewest = schedule_of(recipe.parallel)
        self.layout = divided(recipe.model.config(), fewest.stages, recipe.data.sequence_length)
        self.holders = self.layout.holders(fewest)
        self.parts = {part for part, ranks in self.holders.items() if group.rank in ranks}
        self.gradients = WeightGradients()
        self.schedules: dict[int, Schedule] = {}
        """By the number of micro-batches."""
        self.executor: Executor | None = None

    def own(self) -> DeepSeekV3:
        """This rank's part of the network, on the meta device."""
        return hold(self.build(), self.parts)

    def passes(self, model: DeepSeekV3, batch: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Executor.run`; `model` is `own`, with values."""
        count = len(batch)
        if count not in self.schedules:
            self.schedules[count] = schedule_of(self.parallel, count)
        if self.executor is None:
            self.executor = Executor(model, self.layout, self.group, self.gradients)
        return self.executor.run(self.schedules[count], batch)
