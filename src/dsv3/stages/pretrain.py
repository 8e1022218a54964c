"""Pre-training as stages: tokenizer, shards, training. `dsv3 pretrain` runs these; `dsv3 quickstart` adds the report."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.data.loader import Loader
from dsv3.data.token_shards import ShardSet
from dsv3.data.tokenizer import Tokenizer
from dsv3.disk import replace_file
from dsv3.errors import UserError
from dsv3.evaluation.validation_loss import ValidationLoss
from dsv3.model.device import pick_device
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.changes import check_names
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.data import data_stages, open_sets
from dsv3.stages.machine import command, machine, versions
from dsv3.stages.runner import Stage
from dsv3.stages.scores import Scores
from dsv3.training.resume import find_continuation
from dsv3.training.trainer import Trainer


def pretraining_stages(context: RunContext) -> list[Stage]:
    """The stages up to a trained model in `out/pretrain`; each is keyed by what it reads of the recipe.

    Raises `UserError` for a recipe that starts from another run.
    """
    recipe = context.recipe
    check_names(context.allow, recipe)
    if recipe.extension is not None:
        raise UserError(
            f"this recipe starts from {recipe.extension.initial_from} ([extension]): use dsv3 extend, or leave the section "
            "out to train from the beginning"
        )
    data = data_stages(context)
    return [*data, training_stage(context, "pretrain", recipe.content(), data)]


def training_stage(
    context: RunContext,
    name: str,
    inputs: dict[str, Any],
    data: Sequence[Stage],
    start: Callable[[Trainer], None] | None = None,
) -> Stage:
    """The training in `out/name`, over what the stages before it made; see `train` for `start`."""
    directory = context.out / name

    def refused() -> list[str] | None:
        found = find_continuation(directory / "checkpoints", context.recipe, context.allow)
        return None if found is None else found.refused

    needs = tuple(stage.name for stage in data)
    return Stage(name, inputs, directory, lambda: train(context, name, start), needs, refused, together=True)


def train(context: RunContext, stage: str = "pretrain", start: Callable[[Trainer], None] | None = None) -> Trainer:
    """Trains in `out/stage`, from the newest checkpoint if there is one; otherwise `start` prepares the trainer.

    Returns the trainer at its end. Every rank of the mesh calls it.
    """
    recipe, out, mesh = context.recipe, context.out, context.mesh
    tokenizer = Tokenizer.load(out / "tokenizer")
    shards = open_sets(recipe, out, "train")
    sets = [(source.name, shards[source.name], source.weight) for source in recipe.data.sources]
    row = recipe.data.sequence_length + 1
    laid_out = recipe.data.document_mask, recipe.data.packing
    loader = Loader(
        sets, row, recipe.training.seed, tokenizer.pad_id, *laid_out, rank=mesh.data.rank, ranks=mesh.data.size
    )
    scores = Scores(recipe, tokenizer)
    validation = ValidationLoss(
        open_sets(recipe, out, "validation"), row, recipe.evaluation.validation_tokens, tokenizer.pad_id, *laid_out
    )
    trainer = Trainer(
        recipe, loader, out / stage, files={"tokenizer": out / "tokenizer"}, progress=context.progress,
        evaluate=lambda model: {**scores(model), "validation_loss": validation(model)}, mesh=mesh,
    )  # fmt: skip
    if trainer.resume(context.allow):
        context.note(f"{stage}: continuing after step {trainer.step_count}")
        for change in trainer.changes:
            context.note(f"{stage}: {change}")
    elif start is not None:
        start(trainer)
    if mesh.first:
        write_run(recipe, out / stage, tokenizer, sets)
    trainer.run()
    return trainer


def derived(recipe: Recipe) -> dict[str, str]:
    """What follows from a recipe, with its notes on why: shown before the first step and in the report."""
    config, schedules = recipe.model.config(), Schedules.resolve(recipe)
    counts = count_parameters(config)
    flops = training_flops_per_token(config, recipe.data.sequence_length)
    batch = schedules.batch_size.at(0, 0)
    shares = sum(source.weight for source in recipe.data.sources)
    mixture = ", ".join(f"{source.name} {source.weight / shares:.0%}" for source in recipe.data.sources)
    facts = {
        "model": f"{recipe.model.preset}: {counts.trained:,} parameters, {counts.active:,} active a token, MTP depth {config.num_nextn_predict_layers}",
        "data": f"{mixture}; {recipe.data.fim_rate:.0%} of the documents to fill in the middle",
        "batch": f"{batch} sequences x {recipe.data.sequence_length} tokens = {batch * recipe.data.sequence_length:,} tokens a step",
        "length": f"{recipe.training.tokens:,} tokens in {schedules.total_steps:,} steps, {recipe.training.tokens * flops:.3g} FLOPs",
        "optimizer": f"{recipe.optimizer.kind}, weight decay {recipe.optimizer.weight_decay:g}, clipping at {recipe.optimizer.clip_norm:g}",
        "arithmetic": f"{recipe.training.precision} on {pick_device(recipe.training.device)}, FP32 weights",
    }
    return {**facts, **{f"why: {topic}": reason for topic, reason in recipe.notes.items()}}


def write_run(recipe: Recipe, directory: Path, tokenizer: Tokenizer, sets: list[tuple[str, ShardSet, float]]) -> None:
    """`run.json`: what the report needs beside the figures."""
    corpora = {
        f"corpus {name}": f"{shards.manifest.tokens:,} tokens, {shards.manifest.documents:,} documents"
        for name, shards, _ in sets
    }
    content: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "derived": {**derived(recipe), "tokenizer": f"byte-level BPE, {tokenizer.vocab_size:,} entries", **corpora},
        "machine": machine(pick_device(recipe.training.device)),
        "versions": versions(),
        "command": command(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / "run.json", json.dumps(content, indent=1))


def with_user_data(recipe: Recipe, paths: list[str]) -> Recipe:
    """The recipe with the user's own texts in place of its sources, each named after its file and of equal weight."""
    if not paths:
        return recipe
    if len(set(paths)) != len(paths):
        raise UserError("--data names a path twice; name each once")
    names: dict[str, str] = {}
    for path in paths:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("._-") or "data"
        number = 1
        while (name := stem if number == 1 else f"{stem}-{number}") in names:
            number += 1
        names[name] = path
    content = recipe.to_dict()
    content["data"]["sources"] = [{"name": name, "uri": uri} for name, uri in names.items()]
    content["notes"].pop("mixture", None)
    return Recipe.from_dict(content)
