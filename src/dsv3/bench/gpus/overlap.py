"""Dispatch and combine beside computation: blocks of DeepSeek-V3's width with their experts over all GPUs.

One turn is some pairs of passes, the forward pass of a micro-batch and the backward pass of the one before. They run overlapped by
the pipeline's executor, one after the other, and overlapped with dispatchers that bring what was brought once without doing
anything. What the last one saves is what communication costs; beside it stands what the communicating phases take alone. Exchanges
are exact, with a wait of the host; bounded (`parallel.bounded_exchange`), whose phases do nothing but exchange; and bounded by copy
engines (`parallel.transport`).

Legend: T tokens, K experts per token, D hidden, R rows sorted by expert.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3.bench.gpus.findings import Figure, Part, milliseconds
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.bench.measure import Spread, Work, clear, times_faster
from dsv3.errors import RunError
from dsv3.model.feed_forward import Dispatcher
from dsv3.model.micro_batch import MicroBatch
from dsv3.parallel.copies import symmetric
from dsv3.parallel.dispatch import ExpertParallel, Parcel
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline.executor import Executor, Run
from dsv3.parallel.pipeline.instructions import Backward, Forward, Instruction, Overlapped
from dsv3.parallel.pipeline.layout import Layout
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.precision.deferred import WeightGradients

log = logging.getLogger(__name__)
HIDDEN_SHARE = 0.9
"""The target."""
APART = "one after the other"
MIDDLE = 1
"""The stage between those of embedding and head, which no rank holds here."""


class Instead(torch.autograd.Function):
    """`made` in the place of what would be made of `given`, whose gradient is `gradient`."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, made: Tensor, gradient: Tensor) -> Tensor:
        """Free of cost."""
        ctx.gradient = gradient
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Free of cost as well."""
        return ctx.gradient.view_as(ctx.gradient), None, None


class Remembered:
    """The dispatcher of one block whose communicating phases bring again what those of `real` brought at the first time. All
    else is `real`'s."""

    def __init__(self, real: Dispatcher):
        self.real = real
        self.sent: Parcel | None = None
        """What was given to `send`, without graph."""
        self.back: Tensor | None = None
        """What `send_back` brought."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def send(self, parcel: Parcel) -> Parcel:
        """See `Dispatcher`."""
        if self.sent is None:
            self.sent = replace(parcel, rows=parcel.rows.detach(), slip=parcel.slip.detach())
            with torch.no_grad():
                self.arrived = self.real.send(self.sent)
        return replace(
            self.arrived,
            rows=Instead.apply(parcel.rows, self.arrived.rows, self.sent.rows),
            slip=Instead.apply(parcel.slip, self.arrived.slip, self.sent.slip),
        )

    def send_back(self, rows: Tensor, handle: Any) -> Any:
        """See `Dispatcher`."""
        if self.back is None:
            self.returned, self.handle = rows.detach(), handle
            with torch.no_grad():
                self.back = self.real.send_back(self.returned, handle)
        return Instead.apply(rows, self.back, self.returned)

    def alone(self) -> None:
        """The real communicating phases of one micro-batch, forward and backward, with nothing between."""
        assert self.sent is not None
        assert self.back is not None
        rows, slip = (each.detach().requires_grad_() for each in (self.sent.rows, self.sent.slip))
        arrived = self.real.send(replace(self.sent, rows=rows, slip=slip))
        back = self.real.send_back(self.returned.detach().requires_grad_(), self.handle)
        torch.autograd.backward([arrived.rows, arrived.slip, back], [self.arrived.rows, self.arrived.slip, self.back])


@dataclass
class Stream:
    """Pairs of passes of equal micro-batches through the same blocks; forward is always one micro-batch ahead."""

    executor: Executor
    batch: list[MicroBatch]
    x: Tensor
    """[1, T, D]: what every micro-batch enters with, so that all have the same rows."""
    gradient: Tensor
    dispatchers: Sequence[Any]
    """By block; a `Remembered` stands for a `Dispatcher`."""

    def __post_init__(self) -> None:
        self.run = Run(self.executor, Schedule("pairs", ((MIDDLE,),), ((),)), self.batch)
        self.number = 0
        """The micro-batch under way, 0 and 1 in turn."""
        self.enter()
        self.feed(0)
        self.run.do([Forward(MIDDLE, 0)])
        self.found = self.collect()

    def enter(self) -> None:
        """Has the blocks use this stream's dispatchers."""
        for block, dispatcher in zip(self.executor.model.blocks(), self.dispatchers, strict=True):
            assert block.moe is not None
            block.moe.dispatcher = dispatcher

    def feed(self, number: int) -> None:
        """What the stages around would have sent."""
        self.run.mail.put(("activation", MIDDLE, number), self.x)
        self.run.mail.put(("gradient", MIDDLE, number), self.gradient)

    def collect(self) -> list[Tensor]:
        """What would go to the stages around; only the check reads it."""
        found, self.run.mail.here = self.run.mail.here, {}
        self.run.mail.here = {key: each for key, each in found.items() if key[:2] == ("gradient", MIDDLE)}
        return [each for key, (each, _) in found.items() if key[:2] != ("gradient", MIDDLE)]

    def pair(self, overlapped: bool) -> None:
        """The next forward pass, and the backward pass of the one before."""
        forth, back = Forward(MIDDLE, 1 - self.number), Backward(MIDDLE, self.number)
        self.feed(forth.micro_batch)
        instructions: list[Instruction] = [Overlapped(forth, back)] if overlapped else [forth, back]
        for each in instructions:
            self.run.do([each])
        self.number = 1 - self.number
        self.found = self.collect()

    def pairs(self, count: int, overlapped: bool) -> None:
        """One turn."""
        self.enter()
        for _ in range(count):
            self.pair(overlapped)


def measure_overlap(rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """In BF16, then with products and what is dispatched in FP8."""
    size, mesh = sizes.overlap, rank.mesh(data=rank.size, expert=rank.size)
    model = rank.network(size.config, dispatcher=ExpertParallel(mesh))
    gradients, found, copies = WeightGradients(), [], can_copy(rank, mesh)
    for precision in ("bf16", "fp8"):
        fp8 = precision == "fp8"
        if fp8:
            model.compute_in_fp8(gradients)
        model.zero_grad()
        clear()
        kinds = {"": ExpertParallel(mesh, fp8), ", bounded": ExpertParallel(mesh, fp8, bounded=True)}
        if copies:
            kinds[", copied"] = ExpertParallel(mesh, fp8, True, symmetric)
        # All blocks are in the stage between two that are elsewhere.
        layout = Layout(((), tuple(block.name for block in model.blocks()), ()))
        found.append(compare(rank, size, precision, Executor(model, layout, Group("pipeline"), gradients), kinds))
    return found


def can_copy(rank: Rank, mesh: Mesh) -> bool:
    """Whether all ranks see each other's memory; says why not."""
    refusal = "copy engines are a GPU's" if rank.device.type != "cuda" else None
    if refusal is None:
        try:
            symmetric(mesh.node, 2**20, rank.device)
        except RunError as error:
            refusal = str(error)
    refused = [each for each in mesh.world.objects(refusal) if each is not None]
    if refused and rank.number == 0:
        log.warning("exchanges by copies are left out: %s", refused[0])
    return not refused


def compare(rank: Rank, size: Size, precision: str, executor: Executor, kinds: Mapping[str, ExpertParallel]) -> Part:
    """The sides in one precision: each kind of exchange overlapped, left out and alone, the first also one after the other."""
    config, count, sides = size.config, size.micro_batches, dict[str, Work]()
    generator = torch.Generator(rank.device).manual_seed(rank.number)
    shape, dtype = (1, size.length, config.hidden_size), executor.model.compute_dtype
    x, gradient = (torch.randn(shape, device=rank.device, dtype=dtype, generator=generator) for _ in range(2))
    tokens = torch.zeros(1, size.length + 1, dtype=torch.long, device=rank.device)
    batch = [MicroBatch.of(config, tokens, divisor=1.0)] * 2
    streams: dict[str, Stream] = {}
    for kind, real in kinds.items():
        remembered = [Remembered(real) for _ in range(config.num_hidden_layers)]
        streams[f"overlapped{kind}"] = Stream(executor, batch, x, gradient, [real] * config.num_hidden_layers)
        streams[f"overlapped{kind}, nothing exchanged"] = Stream(executor, batch, x, gradient, remembered)
        sides[f"dispatch and combine alone{kind}"] = partial(alone, remembered, count)
    streams[APART] = Stream(executor, batch, x, gradient, streams["overlapped"].dispatchers)
    sides |= {name: partial(stream.pairs, count, name != APART) for name, stream in streams.items()}
    seconds = rank.turns(sides, f"{precision} pairs")
    figures, checks = [], {f"output and input's gradient, {APART}, twice": agreement(APART, streams)}
    for kind, real in kinds.items():
        names = (f"overlapped{kind}", f"overlapped{kind}, nothing exchanged", f"dispatch and combine alone{kind}")
        rounds = zip(*(seconds[name] for name in names), strict=True)
        figures += [
            Figure(f"dispatch and combine hidden{kind}", Spread.of([1 - (o - w) / e for o, w, e in rounds]), "%", HIDDEN_SHARE),
            Figure(f"overlapped{kind}, times faster than {APART}", times_faster(seconds[names[0]], seconds[APART])),
            Figure(f"sent by a rank a pair{kind}", Spread.of([wire(streams[names[0]], real)]), "MB"),
        ]  # fmt: skip
        checks[f"output and input's gradient, overlapped{kind}"] = agreement(names[0], streams)
    shapes = {**size.shapes, "precision": precision}
    return Part(
        "overlap", f"experts over {rank.size} GPUs, {precision}", shapes, milliseconds(seconds), figures, checks
    )


def alone(dispatchers: Sequence[Remembered], count: int) -> None:
    """What one turn exchanges, and nothing else."""
    for each in [*dispatchers] * count:
        each.alone()


def wire(stream: Stream, real: ExpertParallel) -> float:
    """Megabytes that this rank sends to the others in one pair."""
    before = sum(group.traffic["sent"] for group in real.groups)
    stream.pairs(1, True)
    return (sum(group.traffic["sent"] for group in real.groups) - before) / 1e6


def agreement(name: str, streams: Mapping[str, Stream]) -> str:
    """How far apart outputs and inputs' gradients of a side and of passes one after the other are; `RunError` where it is more than
    rounding."""
    both = []
    for side in (name, APART):
        streams[side].pairs(1, side != APART)
        both.append(streams[side].found)
    found = []
    for what, a, b in zip(("outputs", "gradients of inputs"), *both, strict=True):
        # By token: one that went astray would hardly be seen among all. Attention's backward pass differs from run to run in its last
        # bits, which FP8 rounds to some percent.
        worst = float(((a - b).float().norm(dim=-1) / b.float().norm(dim=-1)).max())
        found.append(f"{what} {worst:.2g}")
        if not worst < 0.1:
            raise RunError(f"{name} and {APART}, a token's {what} differ by {worst:.3g} of their norm")
    return f"{' and '.join(found)} of a token's norm apart at most"
