"""An exponential moving average of the weights in CPU memory, updated by a thread while the next step computes.

The report keeps one to estimate early how good a model will be once its learning rate has decayed (section 3.2.3). Its decay and
its start are not published: here early weights count evenly, with decay `min(decay, (1 + n) / (10 + n))` at update n.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The average of a model's weights and routing biases, FP32; where FP32 weights are sharded, of this rank's share.

    `update` hands over the current values and returns; on a GPU `before_change` then keeps the next change of the weights (not
    the host) from overtaking the copy. All other methods wait for the thread.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, written: Callable[[], None] = lambda: None):
        """`weights` are the model's by name, from its `state_dict` or `Shares.masters`; `written` is called after values were
        written into them."""
        self.decay, self.weights, self.written = decay, weights, written
        self.device = next(iter(weights.values())).device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.copied: torch.cuda.Event | None = None
        size = sum(each.numel() for each in self.weights.values())
        self.staged = torch.empty(size, pin_memory=self.stream is not None)
        self.average = torch.empty(size)
        self.worker = ThreadPoolExecutor(1, "average of the weights")
        self.pending: Future[None] | None = None
        self.seconds = 0.0
        """Processor time of the thread so far."""
        self.restart()

    def restart(self) -> None:
        """Starts again from the current weights."""
        self.updates = 0
        self.stage()
        self.wait()
        self.average.copy_(self.staged)

    def tensors(self) -> dict[str, Tensor]:
        """The average by the weights' names, for a checkpoint to read or to fill."""
        self.wait()
        return self.parts(self.average)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor, one a weight."""
        pieces = flat.split([each.numel() for each in self.weights.values()])
        return {name: piece.view(each.shape) for (name, each), piece in zip(self.weights.items(), pieces, strict=True)}

    def stage(self) -> None:
        """Copies the current weights to the CPU; from a GPU while it computes on."""
        self.wait()
        parts = self.parts(self.staged)
        if self.stream is None:
            for name, part in parts.items():
                part.copy_(self.weights[name])
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, part in parts.items():
                part.copy_(self.weights[name], non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def update(self) -> None:
        """Adds the current weights to the average."""
        self.stage()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))

        def work() -> None:
            started = time.thread_time()
            self.arrive()
            self.average.lerp_(self.staged, 1 - decay)
            self.seconds += time.thread_time() - started

        self.pending = self.worker.submit(work)

    def before_change(self) -> None:
        """To be called before the weights change."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def arrive(self) -> None:
        """Waits for the copy from the GPU."""
        if self.copied is not None:
            self.copied.synchronize()

    def wait(self) -> None:
        """Waits until the last update is in the average."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
        self.arrive()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average as weights; afterwards its own again, to the bit. All ranks enter it together."""
        self.stage()
        self.wait()
        self.write(self.average)
        try:
            yield
        finally:
            self.write(self.staged)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Into the model's weights."""
        for name, part in self.parts(flat).items():
            self.weights[name].copy_(part)
        self.written()
