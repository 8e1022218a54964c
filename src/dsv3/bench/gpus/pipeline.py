"""Pipelines: one network of dense blocks over all GPUs by our schedules, and by those of `torch.distributed.pipelining`.

All sides hold the same weights in BF16, read the same micro-batches, and end a turn with every gradient in place.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3.bench.gpus.findings import Figure, Part, milliseconds
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.bench.gpus.torch_pipeline import TorchPipeline
from dsv3.bench.measure import Work, times_faster
from dsv3.errors import RunError
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.executor import Executor
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.planning.layout import divided

log = logging.getLogger(__name__)
SCHEDULES = {"DualPipeV": "dual_pipe_v", "1F1B": "one_f_one_b"}
"""By the words of the table."""
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
TORCH_FAILS = {
    "DualPipeV": "torch 2.11 fails at the weights' gradients of its last stage on one rank, and the other waits for ever"
}
"""Before torch 2.13, which runs it."""
TOLERANCE = 0.01
"""Of losses and gradient norms, which are sums in other orders of numbers in BF16."""


class Ours:
    """One of our schedules."""

    def __init__(self, rank: Rank, size: Size, group: Group, schedule: Schedule, batch: Sequence[MicroBatch]):
        layout = divided(size.config, schedule.stages, size.length)
        parts = set().union(*map(layout.parts, schedule.held(rank.number)))
        self.model = rank.network(size.config, torch.bfloat16, parts=parts)
        self.executor, self.schedule, self.batch = Executor(self.model, layout, group), schedule, batch

    def step(self) -> Tensor:
        """Gradients of the batch from none; its mean loss, FP32, on every rank."""
        self.model.zero_grad()
        return self.executor.run(self.schedule, self.batch)[0][0]


def measure_pipeline(rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """All sides take turns."""
    size, mesh = sizes.pipeline, rank.mesh(pipeline=rank.size)
    config = size.config
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (size.micro_batches, size.length + 1), generator=generator).to(rank.device)
    count = size.micro_batches
    batch = [MicroBatch.of(config, each[None], scale=1 / count, divisor=float(size.length)) for each in rows]
    steps: dict[str, tuple[DeepSeekV3, Callable[[], Tensor]]] = {}
    checks = {}
    for words, name in SCHEDULES.items():
        schedule = make_schedule(name, rank.size, count)
        ours = Ours(rank, size, mesh.pipeline, schedule, batch)
        steps[f"dsv3 {words}"] = ours.model, ours.step
        refused = TORCH_FAILS.get(words) if TORCH < (2, 13) else None
        if refused is None:
            theirs = TorchPipeline(rank, size, mesh.pipeline, schedule, rows, words)
            steps[f"torch {words}"] = theirs.model, theirs.step
        else:
            checks[f"torch {words}"] = f"left out: {refused}"
            log.warning("torch's %s cannot run these blocks and is left out: %s", words, refused)
    checks |= agreement(mesh.pipeline, {name: (model, step()) for name, (model, step) in steps.items()})
    sides: dict[str, Work] = {name: step for name, (_, step) in steps.items()}
    seconds = rank.turns(sides, "schedules")
    pairs = [("dsv3 DualPipeV", "dsv3 1F1B"), ("dsv3 DualPipeV", "torch DualPipeV"), ("dsv3 1F1B", "torch 1F1B"),
             ("dsv3 DualPipeV", "torch 1F1B")]  # fmt: skip
    figures = [
        Figure(f"{ours}, times faster than {theirs}", times_faster(seconds[ours], seconds[theirs]))
        for ours, theirs in pairs
        if theirs in seconds
    ]  # fmt: skip
    shapes = {**size.shapes, "weights": "bf16" if rank.device.type == "cuda" else "fp32"}
    return [Part("pipeline", f"a pipeline of {rank.size} GPUs", shapes, milliseconds(seconds), figures, checks)]


def agreement(group: Group, first: dict[str, tuple[DeepSeekV3, Tensor]]) -> dict[str, str]:
    """Each side's loss and gradient norm, for all to see; `RunError` where they are not those of the others."""
    found = {}
    for name, (model, loss) in first.items():
        squares = [each.grad.float().square().sum() for each in model.parameters() if each.grad is not None]
        found[name] = float(loss), float(group.sum_(torch.stack(squares).sum()).sqrt())
    expected = next(iter(found.values()))
    for name, figures in found.items():
        for what, figure, wanted in zip(("loss", "gradient's norm"), figures, expected, strict=True):
            if not abs(figure - wanted) <= TOLERANCE * abs(wanted):
                raise RunError(
                    f"the schedules do not compute the same: the {what} of {name} is {figure:.5f}, of {next(iter(found))} {wanted:.5f}"
                )
    return {f"loss and gradient's norm, {name}": f"{loss:.4f}, {norm:.4f}" for name, (loss, norm) in found.items()}
