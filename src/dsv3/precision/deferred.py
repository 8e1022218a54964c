"""Weight gradients as closures, so that a pipeline schedule can run them later (report, section 3.2.1: backward for weights).

with gradients.deferred() as later:
    loss.backward()         # inputs' gradients travel on
for add in later:
    add()                   # the weights' are computed
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv3.ops.cast import add_gradient

Sums = Sequence[Tensor | None]
"""Gradients of weights from micro-batches before; None for the first."""


class WeightGradients:
    """Who asks whether the gradients of weights are wanted now or later."""

    def __init__(self) -> None:
        self.later: list[Callable[[], None]] | None = None

    @contextmanager
    def deferred(self) -> Iterator[list[Callable[[], None]]]:
        """Backward passes inside leave the gradients of linear layers' weights to what they add to the list."""
        self.later = later = list[Callable[[], None]]()
        try:
            yield later
        finally:
            self.later = None

    def take(self, weights: Sequence[Tensor], compute: Callable[[Sums], Sequence[Tensor]]) -> list[None]:
        """Has the gradients that `compute` gives added to their weights', now or later; what a backward pass returns for them.

        `compute` is given the sums so far, and may add to one itself and give it back.
        """

        @torch.no_grad()
        def add() -> None:
            for weight, gradient in zip(weights, compute([each.grad for each in weights]), strict=True):
                add_gradient(weight, gradient)

        if self.later is None:
            add()
        else:
            self.later.append(add)
        return [None] * len(weights)
