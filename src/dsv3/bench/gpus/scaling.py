"""Weak scaling: training steps of a few layers, all GPUs together against each by itself, with as many tokens a GPU."""

from collections.abc import Callable, Sequence

import torch

from dsv3.bench.gpus.findings import Figure, Part, milliseconds
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.bench.measure import Spread, agree, times_faster
from dsv3.data.loader import Batch
from dsv3.parallel.dispatch import ExpertParallel
from dsv3.parallel.mesh import Mesh
from dsv3.recipe.schema import OptimizerSection
from dsv3.training.balance import update_biases
from dsv3.training.gradients import batch_gradients
from dsv3.training.optimizer import Optimizer

TARGET = 0.95
"""Of the speed of a GPU by itself."""
TOLERANCE = 0.02
"""Of the first step's loss."""
RATE = 1e-6


def measure_scaling(rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """A turn is one optimizer step."""
    size, n = sizes.scaling, rank.size
    batch, spread = random_batch(rank, size), rank.mesh(data=n, expert=n)
    steps = {
        "each GPU by itself": stepper(rank, size, Mesh(), batch),
        f"data = {n}": stepper(rank, size, rank.mesh(data=n), batch),
        f"data = {n}, expert = {n}": stepper(rank, size, spread, batch),
        f"data = {n}, expert = {n}, bounded": stepper(rank, size, spread, batch, True),
    }
    # By itself a GPU has the loss of its own rows; the mean of these is that of all.
    everyone = spread.world.objects({name: step() for name, step in steps.items()})
    losses = {name: sum(each[name] for each in everyone) / n for name in steps}
    agree("loss", losses, TOLERANCE)
    checks = {f"loss of the first step, {name}": f"{loss:.4f}" for name, loss in losses.items()}
    seconds = rank.turns(steps, "steps")
    alone, *together = seconds
    figures = [
        Figure(f"tokens a second and GPU, {name}", Spread.of([size.tokens / each for each in turns]))
        for name, turns in seconds.items()
    ]
    figures += [
        Figure(f"of the speed of a GPU by itself, {name}", times_faster(seconds[name], seconds[alone]), "%", TARGET)
        for name in together
    ]
    return [Part("scaling", f"weak scaling from 1 to {n} GPUs", size.shapes, milliseconds(seconds), figures, checks)]


def random_batch(rank: Rank, size: Size) -> Batch:
    """This rank's rows."""
    rows, generator = size.micro_batches * size.sequences, torch.Generator().manual_seed(rank.number)
    tokens = torch.randint(size.config.vocab_size, (rows, size.length + 1), generator=generator)
    positions = torch.arange(size.length + 1).expand(rows, -1).contiguous()
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), positions, [])


def stepper(rank: Rank, size: Size, mesh: Mesh, batch: Batch, bounded: bool = False) -> Callable[[], float]:
    """One optimizer step as the trainer does it, which gives back the batch's loss."""
    experts = ExpertParallel(mesh, bounded=bounded) if mesh.expert.size > 1 else None
    model = rank.network(size.config, dispatcher=experts)
    optimizer = Optimizer(model, OptimizerSection(moments="bf16"), torch.bfloat16, mesh)

    def step() -> float:
        losses, load = batch_gradients(model, batch, size.sequences, data=mesh.data)
        norms = optimizer.clip()
        keep = losses[0].isfinite() & norms["all"].isfinite()
        optimizer.step(RATE, ~keep)
        update_biases(model, load, 0.0, keep)
        return float(losses[0])

    return step
