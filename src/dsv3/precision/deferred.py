"""Weight gradients as closures, so that a pipeline schedule can run them later (report, section 3.2.1: backward for weights).

with gradients.deferred():
    loss.backward()         # inputs' gradients travel on
gradients.run()             # the weights' are computed
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from dsv3.ops.cast import add_gradient


class WeightGradients:
    """Closures that add to the gradients of weights, first in, first out."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Backward passes inside leave the gradients of FP8 layers' weights to `run`."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False

    def run(self, count: int | None = None) -> None:
        """Computes the oldest `count` of what waits, all by default."""
        for _ in range(len(self.waiting) if count is None else count):
            self.waiting.popleft()()

    def take(self, weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> list[None]:
        """Has the gradients that `compute` gives added to their weights', now or later; what a backward pass returns for them."""

        def add() -> None:
            for weight, gradient in zip(weights, compute(), strict=True):
                add_gradient(weight, gradient)

        if self.deferring:
            self.waiting.append(add)
        else:
            add()
        return [None] * len(weights)
