"""Context extension as stages: the start's tokenizer, shards, and training from the start's weights at a greater length."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.recipe.differences import differences
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.data import data_stages
from dsv3.stages.pretrain import training_stage
from dsv3.stages.runner import Stage
from dsv3.training.trainer import Trainer
from dsv3.weights.checkpoint import flatten
from dsv3.weights.fit import checked
from dsv3.weights.loading import fill
from dsv3.weights.opening import checkpoint_at, is_published, open_weights
from dsv3.weights.parts import undivided
from dsv3.weights.tensor_directory import ChunkReader

LENGTH_FIELDS = ("rope_scaling", "max_position_embeddings")
"""What an extension may change of the network; no weight's shape depends on it."""


@dataclass(frozen=True)
class Start:
    """What an extension begins from."""

    path: Path
    """The checkpoint, or the directory of published weights."""
    tokenizer: Path
    identity: dict[str, Any]
    """JSON-able; differs for other weights."""


def extension_stages(context: RunContext) -> list[Stage]:
    """The stages up to an extended model in `out/extend`. Raises `UserError` as `find_start` does."""
    recipe = context.recipe
    start = find_start(recipe)
    # To the stages before the training, the start's tokenizer is a finished one that a recipe names.
    content = recipe.to_dict()
    content["tokenizer"]["path"] = str(start.tokenizer)
    data = data_stages(replace(context, recipe=Recipe.from_dict({**content, "extension": None})))
    inputs = {**recipe.content(), "start": start.identity}
    return [*data, training_stage(context, "extend", inputs, data, partial(load_start, start=start))]


def find_start(recipe: Recipe) -> Start:
    """The start that a recipe names; no tensor is read.

    Raises `UserError` when there is none, when it is another network, or when it was not trained with
    `extension.from_length`: then the phase before is missing, or this one is done already.
    """
    wanted = recipe.extension
    if wanted is None:
        raise UserError(
            "this recipe has no [extension]: expected initial_from (the run to start from) and from_length (the sequence "
            "length it was trained with); without a start, use dsv3 pretrain"
        )
    named = Path(wanted.initial_from)
    if not named.exists():
        raise UserError(
            f"extension.initial_from = {wanted.initial_from!r} is not there: run the phase before this one, or name another "
            "run, checkpoint or Hugging Face directory with extension.initial_from=PATH"
        )
    source, tokenizer = open_weights(named)
    config = checked(source)
    refuse_other_network(config, recipe.model.config(), named)
    path, state = checkpoint_at(named)
    length = state["recipe"]["data"]["sequence_length"] if "recipe" in state else config.max_position_embeddings
    if length != wanted.from_length:
        raise UserError(
            f"{path} was trained with sequences of {length} tokens, and this phase goes on from {wanted.from_length} "
            f"(extension.from_length) to {recipe.data.sequence_length}: "
            + (
                "run the phase before it first, or name that one's run with extension.initial_from"
                if length < wanted.from_length
                else "it is past this phase already; name the run of an earlier phase with extension.initial_from"
            )
        )
    identity = {
        "state": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest(),
        "config": config.to_hf(),
    }
    return Start(path, tokenizer, identity)


def refuse_other_network(found: ModelConfig, wanted: ModelConfig, path: Path) -> None:
    """`UserError` if the networks differ in more than how far they read."""
    before, after = (
        {key: value for key, value in config.to_hf().items() if key not in (*LENGTH_FIELDS, "initializer_range")}
        for config in (found.replace(extra={}), wanted)
    )
    if changed := differences(before, after):
        raise UserError(
            f"{path} holds another network than the recipe's [model]: {'; '.join(changed)}. Start from a checkpoint of this "
            f"network; only {' and '.join(LENGTH_FIELDS)} may differ"
        )


def load_start(trainer: Trainer, start: Start) -> None:
    """Gives a trainer the start's weights and, where the recipe keeps it, its optimizer's state.

    Raises `UserError` when that state is wanted and there is none, or it is another optimizer's.
    """
    source, _ = open_weights(start.path)
    held = next(iter(trainer.model.held_experts().values()), None)
    shares = trainer.optimizer.shares
    for name, tensor in trainer.model.state_dict().items():
        narrow = name in shares.narrow
        whole = torch.empty_like(tensor, dtype=torch.float32) if narrow else tensor
        fill({name: whole}, source, trainer.model.config, held)
        if narrow:
            shares.put(name, whole)
    extension = trainer.recipe.extension
    if extension is not None and extension.optimizer_state == "fresh":
        return
    wanted = flatten({"optimizer": trainer.optimizer.tensors()})
    places = trainer.places() or undivided(wanted)
    reader = None if is_published(start.path) else ChunkReader(start.path)
    found = reader.layout if reader is not None else {}
    missing = [name for name, tensor in wanted.items() if found.get(name) != (tensor.dtype, places[name].shape)]
    if reader is None or missing:
        raise UserError(
            f"{start.path} lacks {len(missing)} of the {len(wanted)} tensors of this recipe's optimizer ({missing[0]}, ...): "
            "start with extension.optimizer_state = 'fresh', or with the [optimizer] it was trained with"
        )
    reader.fill(wanted, places)
