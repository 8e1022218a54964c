"""Pipelines: one network of dense blocks over all GPUs by our schedules, and by those of `torch.distributed.pipelining`.

All sides hold the same weights in BF16, read the same micro-batches, and end a turn with every gradient in place.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv3.bench.gpus.findings import Figure, Part, milliseconds
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Sizes
from dsv3.bench.gpus.torch_pipeline import TorchPipeline
from dsv3.bench.measure import agree, times_faster
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.executor import Executor
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.planning.layout import divided

log = logging.getLogger(__name__)
SCHEDULES = {"DualPipeV": "dual_pipe_v", "1F1B": "one_f_one_b"}
"""By their names in the table."""
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
FAILS = "torch 2.11 fails at the weights' gradients of its last stage on one rank, and the other waits for ever"
"""Torch's DualPipeV before torch 2.13, which runs it."""
TOLERANCE = 0.01
"""Of losses and gradient norms, which sum BF16 numbers in different orders."""


@dataclass(frozen=True)
class Ours:
    """One of our schedules."""

    executor: Executor
    schedule: Schedule
    batch: Sequence[MicroBatch]

    @property
    def model(self) -> DeepSeekV3:
        """This rank's part of the network."""
        return self.executor.model

    def step(self) -> Tensor:
        """Gradients of the batch from none; its mean loss, FP32, on every rank."""
        self.model.zero_grad()
        return self.executor.run(self.schedule, self.batch)[0][0]


def measure_pipeline(rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """All sides take turns."""
    size, group = sizes.pipeline, rank.mesh(pipeline=rank.size).pipeline
    config, count = size.config, size.micro_batches
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (count, size.length + 1), generator=generator).to(rank.device)
    batch = [MicroBatch.of(config, each[None], scale=1 / count, divisor=float(size.length)) for each in rows]
    sides: dict[str, Ours | TorchPipeline] = {}
    checks = {}
    for words, name in SCHEDULES.items():
        schedule = make_schedule(name, rank.size, count)
        layout, held = divided(config, schedule.stages, size.length), schedule.placement[rank.number]
        network = partial(rank.network, config, torch.bfloat16, parts=set().union(*map(layout.parts, held)))
        sides[f"dsv3 {words}"] = Ours(Executor(network(), layout, group), schedule, batch)
        if words == "DualPipeV" and TORCH < (2, 13):
            checks[f"torch {words}"] = f"left out: {FAILS}"
            log.warning("torch's %s cannot run these blocks and is left out: %s", words, FAILS)
        else:
            sides[f"torch {words}"] = TorchPipeline(network(), layout, group, held, rows, words)
    losses = {name: float(side.step()) for name, side in sides.items()}
    norms = {name: gradient_norm(side.model, group) for name, side in sides.items()}
    agree("loss", losses, TOLERANCE)
    agree("gradient's norm", norms, TOLERANCE)
    checks |= {f"loss and gradient's norm, {name}": f"{losses[name]:.4f}, {norms[name]:.4f}" for name in sides}
    seconds = rank.turns({name: side.step for name, side in sides.items()}, "schedules")
    pairs = [("dsv3 DualPipeV", "dsv3 1F1B"), ("dsv3 DualPipeV", "torch DualPipeV"), ("dsv3 1F1B", "torch 1F1B"),
             ("dsv3 DualPipeV", "torch 1F1B")]  # fmt: skip
    figures = [
        Figure(f"{ours}, times faster than {theirs}", times_faster(seconds[ours], seconds[theirs]))
        for ours, theirs in pairs
        if theirs in seconds
    ]
    shapes = {**size.shapes, "weights": "bf16" if rank.device.type == "cuda" else "fp32"}
    return [Part("pipeline", f"a pipeline of {rank.size} GPUs", shapes, milliseconds(seconds), figures, checks)]


def gradient_norm(model: DeepSeekV3, group: Group) -> float:
    """Of all ranks' gradients together."""
    squares = [each.grad.float().square().sum() for each in model.parameters() if each.grad is not None]
    return float(group.sum_(torch.stack(squares).sum()).sqrt())
