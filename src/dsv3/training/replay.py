"""A micro-batch's passes recorded as a CUDA graph: the host launches one graph in place of thousands of kernels.

Small models train several times as fast with it: launching their kernels takes the host longer than computing them. The first
passes of each kind run eagerly, to compile what there is to compile; the next one is recorded. A recording cannot wait for the
device, so FP32, whose experts are a loop over counts that the host reads, has none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.errors import RunError
from dsv3.model.transformer import DeepSeekV3
from dsv3.training.gradients import Inputs, Setting, passes

WARM_UP = 2
"""Eager passes of each kind: they compile what there is to compile, the second with gradients to add to."""


@dataclass
class Recording:
    """One kind of pass."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    """Where the graph reads."""
    figures: Tensor
    load: dict[str, Tensor]


class Replay:
    """`Passes` on a GPU, replayed while neither shapes nor setting change.

    The graph adds to gradients in place, so they must be cleared by zeros (`Optimizer.keep_gradients`). All micro-batches of a
    step are of one kind.
    """

    def __init__(self) -> None:
        self.kind: object = None
        self.seen = 0
        self.recording: Recording | None = None

    def __call__(self, model: DeepSeekV3, inputs: Inputs, setting: Setting) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Passes`."""
        kind = tuple(None if each is None else each.shape for each in inputs), setting
        if kind != self.kind:
            self.kind, self.seen, self.recording = kind, 0, None
            # The first micro-batch of its step. Parameters that no longer get a gradient must have none.
            for parameter in model.parameters():
                parameter.grad = None
        self.seen += 1
        if self.seen <= WARM_UP:
            return passes(model, inputs, setting)
        # A graph reads the FP8 copies of weights in place, and makes none.
        model.refresh_fp8()
        if self.recording is None:
            self.recording = record(model, inputs, setting)
        for place, given in zip(self.recording.inputs, inputs, strict=True):
            if place is not None and given is not None:
                place.copy_(given)
        self.recording.graph.replay()
        return self.recording.figures.clone(), {name: each.clone() for name, each in self.recording.load.items()}


def record(model: DeepSeekV3, inputs: Inputs, setting: Setting) -> Recording:
    """Records the passes without running them. Parameters must have the gradients that the passes add to.

    Raises `RunError` where something waits for the device.
    """
    held = Inputs(*(None if each is None else each.clone() for each in inputs))  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may go on meanwhile: one may be pinning memory for checkpoints.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            figures, load = passes(model, held, setting)
    except RuntimeError as error:
        raise RunError(
            f"a micro-batch's passes cannot be recorded as a CUDA graph: {error}. Set training.cuda_graphs=false."
        ) from error
    return Recording(graph, held, figures, load)
