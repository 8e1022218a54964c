"""Runs one rank's program of a schedule: forward and backward passes of stages, overlapped pairs, deferred weight gradients.

Its twin is the serial run: losses and gradients are the same up to the order of sums.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3, count
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
    """One rank of a pipeline. `group` is the pipeline's, of as many ranks as the schedule has.

    `model` holds at least the rank's parts of the network (see `hold`); `gradients` is what its FP8 layers were given, where it
    has any. `begin` is told every instruction before it runs.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        layout: Layout,
        schedule: Schedule,
        group: dist.ProcessGroup | None = None,
        gradients: WeightGradients | None = None,
        begin: Callable[[str], None] | None = None,
    ):
        ranks = dist.get_world_size(group)
        if (len(layout.stages), ranks) != (schedule.stages, schedule.ranks):
            raise UserError(
                f"{schedule.name} has {schedule.stages} stages on {schedule.ranks} ranks; the layout has "
                f"{len(layout.stages)} stages, and the group {ranks} ranks"
            )
        self.model, self.layout, self.schedule, self.group, self.begin = model, layout, schedule, group, begin
        self.rank = dist.get_rank(group)
        self.gradients = gradients or WeightGradients()
        model.defer_weight_gradients(self.gradients)
        self.device = next(model.parameters()).device
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def run(self, batch: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the batch's gradients to the parameters held here; those of parts that two ranks hold are the sum of both.

        Every rank is given all micro-batches, as many as the schedule has. Returns on every rank what the serial
        `batch_gradients` does: the means of main loss, balance loss without alpha and MTP losses (FP32), and the load (int64
        [E] by MoE block). Raises `UserError` for a batch-wise balance loss, and `RunError` when another rank has gone.
        """
        if any(rows.shared.batch_wise for rows in batch):
            raise UserError(
                "a balance loss over the whole batch needs the loads of all micro-batches before the first gradient, and a "
                "pipeline does not know them: use training.balance = 'bias' or 'sequence', or parallel.pipeline = 1"
            )
        run = Run(self, batch)
        for instructions in grouped(self.schedule.programs[self.rank]):
            if self.begin is not None:
                self.begin(", ".join(map(str, instructions)))
            run.do(instructions)
        run.mail.finish()
        self.sum_shared(run.mail)
        return run.figures()

    def sum_shared(self, mail: Mail) -> None:
        """Gradients of what another rank holds too. Two numbers have the same sum on both."""
        for part, ranks in self.layout.holders(self.schedule).items():
            if len(ranks) == 1 or self.rank not in ranks:
                continue
            (peer,) = set(ranks) - {self.rank}
            found = [each for name, each in self.model.named_parameters() if name.startswith(f"{part}.")]
            for each in found:
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
            own = [each.grad for each in found if each.grad is not None]
            for mine, other in zip(own, mail.swap(own, peer), strict=True):
                mine.add_(other)


class Run:
    """One batch."""

    def __init__(self, executor: Executor, batch: Sequence[MicroBatch]):
        self.executor, self.batch = executor, batch
        model, layout, mtp = executor.model, executor.layout, batch[0].mtp_weight > 0
        self.steps = {
            stage: segments(model, layout.stages[stage], stage == 0, stage == layout.last, mtp)
            for stage in executor.schedule.held(executor.rank)
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
        """Messages that go together, or one instruction."""
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
            with self.executor.gradients.deferred() as later:
                perform(self.turn(each))
            self.later[each.stage, each.micro_batch] = later
            self.returned(each)
        else:
            perform(self.later.pop((each.stage, each.micro_batch)))

    def overlap(self, pair: Overlapped) -> None:
        """The order of DeepSeek's training trace: each pass communicates while the other computes; what weight gradients the
        backward pass leaves behind are computed while its next communication runs."""
        ahead, back = self.start(pair.forward).forwards(), self.turn(pair.backward)
        later = self.deferring(back[0])
        for forth, returning in zip_longest(
            zip(ahead[:-1:2], ahead[1::2], strict=True), zip(back[1::2], back[2::2], strict=True)
        ):
            if returning is not None:
                returning[0]()
            perform(later)
            if forth is not None:
                perform(forth)
            later = self.deferring(returning[1]) if returning is not None else []
        perform([*later, ahead[-1]])
        self.forwarded(pair.forward)
        self.returned(pair.backward)

    def deferring(self, work: Work) -> list[Work]:
        """Does it but for the weights' gradients, which it gives back."""
        with self.executor.gradients.deferred() as later:
            work()
        return later

    def start(self, chunk: Chunk) -> Passage:
        """The passage of a forward pass, before its first step."""
        flow = Flow(self.batch[chunk.micro_batch])
        if chunk.stage:
            flow.stream = self.mail.take(("activation", chunk.stage, chunk.micro_batch))
        passage = Passage(self.executor.model, self.steps[chunk.stage], flow, self.executor.side)
        self.under_way[chunk.stage, chunk.micro_batch] = passage
        return passage

    def forwarded(self, chunk: Chunk) -> None:
        """Behind its last step: notes what it found, and posts what it made."""
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
        # The loss's own gradient is what a stage behind it would have sent.
        self.mail.put(("gradient", chunk.stage, chunk.micro_batch), torch.ones_like(made))

    def turn(self, chunk: Chunk) -> list[Work]:
        """The steps of a backward pass."""
        gradient = self.mail.take(("gradient", chunk.stage, chunk.micro_batch))
        return self.under_way[chunk.stage, chunk.micro_batch].backwards(gradient)

    def returned(self, chunk: Chunk) -> None:
        """Behind its last step: posts the input's gradient."""
        anchor = self.under_way.pop((chunk.stage, chunk.micro_batch)).anchor
        if anchor is not None and anchor.grad is not None:
            self.mail.put(("gradient", chunk.stage - 1, chunk.micro_batch), anchor.grad)

    def empty(self, message: Message) -> Tensor:
        """Room for an activation or its gradient."""
        model, (sequences, length) = self.executor.model, self.batch[message.micro_batch].inputs.shape
        dtype = model.compute_dtype or next(model.parameters()).dtype
        return torch.empty(sequences, length, model.config.hidden_size, dtype=dtype, device=self.executor.device)

    def figures(self) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Executor.run`."""
        dist.all_reduce(self.losses, group=self.executor.group)
        dist.all_reduce(self.load, group=self.executor.group)
        return self.losses / len(self.batch), dict(zip(self.names, self.load, strict=True))


def perform(work: Sequence[Work]) -> None:
    """One after the other."""
    for each in work:
        each()


def hold(model: DeepSeekV3, parts: set[str]) -> DeepSeekV3:
    """The model without what is not among these parts (names as of `Layout.parts`): blocks, embedding, final norm, head.

    What is left keeps its names, so that whatever walks `model.blocks()` or the parameters meets what is here and no more.
    """
    for owner, prefix in ((model, ""), (model.layers, "layers."), (model.mtp, "mtp.")):
        assert isinstance(owner, nn.Module)
        for name in [name for name, _ in owner.named_children()]:
            if f"{prefix}{name}" not in parts and (prefix or name not in ("layers", "mtp")):
                delattr(owner, name)
    return model
