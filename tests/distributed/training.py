"""A short training on ranks, or in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.data.loader import Loader
from dsv3.data.token_shards import ShardSet
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.mesh import Mesh, make_mesh
from dsv3.recipe.schema import Recipe
from dsv3.stages.extend import Start, load_start
from dsv3.training.trainer import Trainer

CONTENT: dict[str, Any] = {
    "model": {"preset": "debug"},
    "data": {"sources": [{"name": "counts", "uri": "builtin:stdlib"}], "sequence_length": 32, "document_mask": True},
    "optimizer": {"clip_norm": 0.5},
    "schedule": {"learning_rate": 3e-3, "batch_size": 8, "bias_update_speed": 0.01},
    "training": {
        "tokens": 8 * 32 * 5, "precision": "fp32", "device": "cpu", "initialization": "fan_in", "balance_alpha": 0.01,
        "ema_decay": 0.9,
    },
}  # fmt: skip
PAD = 2


def make(
    shards: str, directory: str, overrides: list[str], ranks_per_node: int | None = None, **options: Any
) -> Trainer:
    recipe = Recipe.from_dict(CONTENT, overrides)
    mesh = Mesh() if ranks_per_node is None else make_mesh(recipe.parallel, ranks_per_node)
    data = recipe.data
    loader = Loader(
        [("counts", ShardSet.open(Path(shards)), 1.0)], data.sequence_length + 1, recipe.training.seed, PAD, data.document_mask,
        rank=mesh.data.rank, ranks=mesh.data.size,
    )  # fmt: skip
    return Trainer(recipe, loader, Path(directory), files={}, mesh=mesh, **options)


def evaluate(model):
    """A loss of every parameter, MTP's included."""
    rows = torch.arange(60).view(3, 20) + 3
    with torch.no_grad():
        losses = model.loss(rows, mtp_weight=0.3)
    return {"losses": [each.item() for each in (losses.main, *losses.mtp)]}


def train(
    shards: str, directory: str, overrides: list[str], ranks_per_node: int | None = None, resume: bool = False,
    start: str | None = None, wide: bool = False, save: bool = False,
):  # fmt: skip
    """The parameters, biases and average of this rank after training, where its experts begin, and its optimizer's bytes.

    `start` is the checkpoint that an extension begins with. `wide` has all weights in FP32 on all ranks,
    `save` a checkpoint written although nothing was left to train.
    """
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(DeepSeekV3, "matrices", lambda model: set())
        trainer = make(shards, directory, overrides, ranks_per_node, evaluate=evaluate)
    assert trainer.resume() == resume
    if start is not None:
        load_start(trainer, Start(Path(start), Path("tokenizer"), {}))
    trainer.run()
    if save:
        trainer.save()
        trainer.saver.finish()
    tensors = {name: each.detach().clone() for name, each in trainer.model.state_dict().items()}
    tensors |= {f"ema.{name}": each.clone() for name, each in trainer.average.tensors().items()}
    held = {f"{prefix}{name}": trainer.model.held_experts()[each]
            for prefix in ("", "ema.")
            for name, each in trainer.model.named_parameters() if each in trainer.model.held_experts()}  # fmt: skip
    state = sum(each.numel() for each in trainer.optimizer.tensors().values())
    return tensors, held, state
