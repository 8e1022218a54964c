"""Memory of the optimizer's state with one data-parallel rank and with all: measured, and by the formula of `dsv3 plan`."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from dsv3.bench.gpus.findings import Figure, Part
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.bench.measure import Spread, clear, synchronize, track
from dsv3.errors import RunError
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cast import gradient_dtype
from dsv3.parallel.mesh import Mesh
from dsv3.planning.layout import holdings
from dsv3.recipe.schema import Recipe
from dsv3.training.optimizer import Optimizer

TOLERANCE = 0.02
"""Between what is allocated and the formula: tensors begin at multiples of 512 bytes, shares end at whole rows."""
MOMENTS = ("fp32", "bf16")


def measure_zero(rank: Rank, sizes: Sizes) -> Sequence[Part]:
    """Weights, moments, and what is there after a step, in bytes a rank; `RunError` where the formula is too far off."""
    size, figures, checks = sizes.zero, list[Figure](), dict[str, str]()
    precision = "bf16" if rank.device.type == "cuda" else "fp32"
    for moments, ranks in track(list(product(MOMENTS, (1, rank.size))), "memory", rank.progress):
        mesh = Mesh() if ranks == 1 else rank.mesh(data=ranks)
        recipe = recipe_of(size, ranks, precision, moments)
        found, (holding, *_) = memory(rank, size, mesh, recipe), holdings(recipe)
        expected = (holding.weights, holding.moments, holding.weights + holding.moments)
        for (what, measured), wanted in zip(found.items(), expected, strict=True):
            title = f"{what}, moments in {moments}, data = {ranks}"
            figures.append(Figure(title, Spread.of([measured / 1e9]), "GB"))
            checks[f"{title}, beside the formula's {wanted / 1e9:.4f} GB"] = f"{measured / wanted:.4f}"
            if abs(measured / wanted - 1) > TOLERANCE:
                raise RunError(f"{title}: {measured:,} bytes allocated, and the formula says {wanted:,}")
    shapes = {**size.shapes, "precision": precision}
    return [Part("zero", "memory of weights and optimizer", shapes, {}, figures, checks)]


def recipe_of(size: Size, ranks: int, precision: str, moments: str) -> Recipe:
    """What `dsv3 plan` would be asked."""
    content: dict[str, Any] = {
        "model": {"preset": size.preset, **size.changes, "num_nextn_predict_layers": 0},
        "data": {"sources": [{"name": "any", "uri": "builtin:stdlib", "tokens": 1}], "sequence_length": size.length},
        "schedule": {"learning_rate": 1e-4, "batch_size": ranks},
        "training": {"tokens": size.length * ranks, "precision": precision},
        "optimizer": {"moments": moments},
        "parallel": {"data": ranks},
    }
    return Recipe.from_dict(content)


def memory(rank: Rank, size: Size, mesh: Mesh, recipe: Recipe) -> dict[str, int]:
    """Bytes of the weights with their masters, of the moments, and of all after a step."""
    clear()  # what the measurement before has left would be freed within this one
    empty = torch.cuda.memory_allocated(rank.device) if rank.device.type == "cuda" else 0
    model = rank.network(size.config)
    optimizer = Optimizer(model, recipe.optimizer, torch.bfloat16, mesh)
    state = sum(each.nbytes for each in optimizer.tensors().values() if each.dim())
    weights = allocated(rank, model, optimizer) - empty - state
    for parameter in model.parameters():
        parameter.grad = torch.full(parameter.shape, 1e-3, dtype=gradient_dtype(parameter), device=parameter.device)
    optimizer.clip()
    optimizer.step(1e-6)
    after = allocated(rank, model, optimizer) - empty
    return {"weights": weights, "moments": state, "weights and moments after a step": after}


def allocated(rank: Rank, model: DeepSeekV3, optimizer: Optimizer) -> int:
    """Bytes held on the GPU; on the CPU, which has no counter, those of the tensors themselves."""
    if rank.device.type == "cuda":
        synchronize(rank.device)
        return torch.cuda.memory_allocated(rank.device)
    masters = [optimizer.shares.own[name] for name in optimizer.shares.narrow]
    return sum(each.nbytes for each in [*model.parameters(), *masters, *optimizer.tensors().values()])
