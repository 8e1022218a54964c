"""Runs one rank's program: forward and backward passes of its stages, overlapped pairs, deferred weight gradients.

Its twin is the serial run: losses and gradients are the same up to the order of sums.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3, count
from dsv3.ops.cast import gradient_dtype
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.instructions import (
    Backward,
    Chunk,
    Forward,
    InputGradient,
    Instruction,
    Message,
    Overlapped,
)
from dsv3.parallel.pipeline.layout import Layout
from dsv3.parallel.pipeline.mail import Mail
from dsv3.parallel.pipeline.messages import grouped
from dsv3.parallel.pipeline.passage import Passage, Work
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.stage import Flow, segments
from dsv3.precision.deferred import WeightGradients


class Executor:
    """One rank of a pipeline, which `group` is.

    `model` holds at least the rank's parts of the network (see `parts.hold`); `gradients` is what its FP8 layers were given,
    where it has any.
    """

    def __init__(self, model: DeepSeekV3, layout: Layout, group: Group, gradients: WeightGradients | None = None):
        self.model, self.layout, self.group = model, layout, group
        self.gradients = gradients or WeightGradients()
        model.defer_weight_gradients(self.gradients)
        self.device = next(model.parameters()).device
        # Communication is short and everything waits for it: its kernels go before those of products that have not started.
        self.side = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    def run(self, schedule: Schedule, batch: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the batch's gradients to the parameters held here: of those that two ranks hold, each has its part.

        Every rank is given all micro-batches, as many as the schedule has. Returns on every rank what the serial
        `batch_gradients` does: the means of main loss, balance loss without alpha and MTP losses (FP32), and the load (int64
        [E] by MoE block). Raises `RunError` when another rank has gone. A batch-wise balance loss, which recipes refuse with a
        pipeline, would be wrong: it needs the loads of all micro-batches before the first gradient.
        """
        run, activity = Run(self, schedule, batch), self.group.activity
        before = activity.instruction
        for instructions in grouped(schedule.programs[self.group.rank]):
            activity.begin(f"{before}: {', '.join(map(str, instructions))}")
            run.do(instructions)
        activity.begin(before)
        run.mail.finish()
        for name, parameter in self.model.named_parameters():
            # For parameters that only the other rank holding them has used. MTP modules that take no part have no gradient anywhere.
            if parameter.grad is None and (batch[0].mtp_weight > 0 or not name.startswith("mtp.")):
                parameter.grad = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))
        return run.figures()


class Run:
    """One batch."""

    def __init__(self, executor: Executor, schedule: Schedule, batch: Sequence[MicroBatch]):
        self.executor, self.batch = executor, batch
        model, layout, mtp = executor.model, executor.layout, batch[0].mtp_weight > 0
        self.steps = {
            stage: segments(model, layout.stages[stage], stage == 0, stage == layout.last, mtp)
            for stage in schedule.placement[executor.group.rank]
        }
        self.mail = Mail(executor.group)
        self.under_way: dict[tuple[int, int], Passage] = {}
        self.later: dict[tuple[int, int], list[Work]] = {}
        """Weight gradients that wait."""
        config = model.config
        first = config.num_dense_layers
        self.names = [str(i) for i in range(first, config.num_hidden_layers)]
        self.names += [f"mtp.{k}" for k in range(config.num_nextn_predict_layers) if mtp]
        self.load = torch.zeros(len(self.names), config.n_routed_experts, dtype=torch.long, device=executor.device)
        depth = config.num_nextn_predict_layers if mtp else 0
        self.losses = torch.zeros(2 + depth, device=executor.device)

    def do(self, instructions: list[Instruction]) -> None:
        """One instruction, or several messages sent together."""
        each = instructions[0]
        if isinstance(each, Message):
            self.mail.exchange([each for each in instructions if isinstance(each, Message)], self.empty)
        elif isinstance(each, Overlapped):
            self.overlap(each)
        elif isinstance(each, Forward):
            perform(self.start(each).forwards())
            self.forwarded(each)
        elif isinstance(each, Backward):
            perform(self.turn(each))
            self.returned(each)
        elif isinstance(each, InputGradient):
            self.later[each.stage, each.micro_batch] = self.deferring(*self.turn(each))
            self.returned(each)
        else:
            perform(self.later.pop((each.stage, each.micro_batch)))

    def overlap(self, pair: Overlapped) -> None:
        """The order of DeepSeek's training trace: each pass communicates while the other computes. The backward pass's weight
        gradients are computed while its next communication runs. The device has its computation before the forward pass
        communicates, since an exact exchange has the host wait for counts."""
        ahead, back = self.start(pair.forward).forwards(), self.turn(pair.backward)
        later = self.deferring(back[0])
        forth, returning = zip(ahead[:-1:2], ahead[1::2], strict=True), zip(back[1::2], back[2::2], strict=True)
        # Where one pass has fewer blocks than the other, it does nothing beside the other's last ones.
        for (compute, send), (send_back, compute_back) in zip_longest(forth, returning, fillvalue=(idle, idle)):
            send_back()
            perform([*later, compute])
            later = self.deferring(compute_back)
            send()
        perform([*later, ahead[-1]])
        self.forwarded(pair.forward)
        self.returned(pair.backward)

    def deferring(self, *work: Work) -> list[Work]:
        """Runs it, and returns the weight gradients left for later."""
        with self.executor.gradients.deferred() as later:
            perform(work)
        return later

    def start(self, chunk: Chunk) -> Passage:
        """A forward pass before its first step."""
        flow = Flow(self.batch[chunk.micro_batch])
        if chunk.stage:
            flow.stream = self.mail.take(("activation", chunk.stage, chunk.micro_batch))
        passage = Passage(self.executor.model, self.steps[chunk.stage], flow, self.executor.side)
        self.under_way[chunk.stage, chunk.micro_batch] = passage
        return passage

    def forwarded(self, chunk: Chunk) -> None:
        """After its last step: adds up its losses and loads, and posts its output."""
        flow, made = self.under_way[chunk.stage, chunk.micro_batch].close()
        balance, load, _ = count(flow.routings)
        for name, each in load.items():
            self.load[self.names.index(name)] += each
        if balance is not None:
            self.losses[1] += balance
        if flow.total is None:
            self.mail.put(("activation", chunk.stage + 1, chunk.micro_batch), made)
            return
        self.losses[0] += flow.losses[0]
        for k, loss in enumerate(flow.losses[1:]):
            self.losses[2 + k] += loss
        # The gradient of the loss itself, in place of one from a next stage.
        self.mail.put(("gradient", chunk.stage, chunk.micro_batch), torch.ones_like(made))

    def turn(self, chunk: Chunk) -> list[Work]:
        """The steps of a backward pass."""
        gradient = self.mail.take(("gradient", chunk.stage, chunk.micro_batch))
        return self.under_way[chunk.stage, chunk.micro_batch].backwards(gradient)

    def returned(self, chunk: Chunk) -> None:
        """After its last step: posts the input's gradient."""
        anchor = self.under_way.pop((chunk.stage, chunk.micro_batch)).anchor
        if anchor is not None and anchor.grad is not None:
            self.mail.put(("gradient", chunk.stage - 1, chunk.micro_batch), anchor.grad)

    def empty(self, message: Message) -> Tensor:
        """A buffer for an activation or its gradient."""
        model, (sequences, length) = self.executor.model, self.batch[message.micro_batch].inputs.shape
        dtype = model.compute_dtype or next(model.parameters()).dtype
        return torch.empty(sequences, length, model.config.hidden_size, dtype=dtype, device=self.executor.device)

    def figures(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Executor.run`."""
        losses, load = (self.executor.group.sum_(each) for each in (self.losses, self.load))
        return losses / len(self.batch), dict(zip(self.names, load, strict=True))


def idle() -> None:
    """Nothing to do."""


def perform(work: Sequence[Work]) -> None:
    """One after the other."""
    for each in work:
        each()
