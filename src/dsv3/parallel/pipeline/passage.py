"""One micro-batch through one stage, forward and later backward, step by step, so that two of them can alternate."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.pipeline.stage import Flow, Step
from dsv3.parallel.pipeline.tape import Cut, port

Work = Callable[[], None]


class Passage:
    """`steps` compute at even places and communicate at odd ones; on a GPU those run on the stream `side`."""

    def __init__(self, model: DeepSeekV3, steps: list[list[Step]], flow: Flow, side: torch.cuda.Stream | None):
        self.model, self.steps, self.flow, self.side = model, steps, flow, side
        self.cuts: list[Cut] = []
        self.anchor: Tensor | None = None
        """Where the gradient of the stage's input arrives."""
        if flow.stream is not None:
            flow.stream, self.anchor = port(flow.stream)
        self.before: torch.cuda.Event | None = None

    def forwards(self) -> list[Work]:
        """The steps of the forward pass."""
        return [partial(self.perform, partial(self.forward, i), i % 2 == 1) for i in range(len(self.steps))]

    def backwards(self, gradient: Tensor) -> list[Work]:
        """The steps of the backward pass, from the gradient of the forward pass's output: as many, alternating as well."""
        cuts, self.cuts = self.cuts[::-1], []
        work: list[Work] = [
            partial(torch.autograd.backward, [self.output], [gradient]),
            *(cut.backward for cut in cuts),
        ]
        return [partial(self.perform, each, i % 2 == 1) for i, each in enumerate(work)]

    def perform(self, work: Work, communicates: bool) -> None:
        """One step, after the one before it."""
        if self.side is None:
            work()
            return
        with torch.cuda.stream(self.side if communicates else torch.cuda.current_stream()):
            if self.before is not None:
                torch.cuda.current_stream().wait_event(self.before)
            work()
            self.before = torch.cuda.current_stream().record_event()

    def forward(self, number: int) -> None:
        """One step of the forward pass, after a cut."""
        if number:
            cut = Cut()
            self.flow = cut.through(self.flow)
            self.cuts.append(cut.close())
        with self.model.watching(part=True):
            for step in self.steps[number]:
                step(self.flow)

    def close(self) -> tuple[Flow, Tensor]:
        """(the flow at its end, the pass's output: the loss, or the next stage's input). Keeps nothing but the graphs."""
        flow = self.flow
        made = flow.stream if flow.total is None else flow.total
        assert made is not None
        self.output = get_gradient_edge(made)
        del self.flow
        return flow, made.detach()
