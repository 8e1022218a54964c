"""The data of a training as stages: a tokenizer, then one shard set a source and split. `dsv3 data build` runs these alone."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

from dsv3.data.build import ShardPlan, build_shards
from dsv3.data.sources import Split, fingerprint, to_learn_from
from dsv3.data.token_shards import FORMAT, ShardSet
from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.data.workers import cores
from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe, Source
from dsv3.stages.context import RunContext
from dsv3.stages.runner import Stage
from dsv3.training.trainer import Progress

VALIDATION_TOKENS = 200_000
"""The most that a held-out split holds."""
SPLITS: tuple[Split, ...] = ("train", "validation")


def data_stages(
    context: RunContext, *, workers: int | None = None, built: Callable[[str, float], None] = lambda name, speed: None
) -> list[Stage]:
    """The stages up to the shards in `out/shards`, each keyed by what it reads of the recipe.

    A set depends on the tokenizer and, where duplicates are left out, on the sets before it: a new weight rebuilds none, a
    new rate of fill-in-the-middle only the training sets. `built` is called with each set, `SOURCE/SPLIT`, and the tokens
    a second it was built at. By default all cores are used.
    """
    recipe, out = context.recipe, context.out
    prints = {source.name: fingerprint(source.uri) for source in recipe.data.sources}
    pairs = [(source, split) for source in recipe.data.sources for split in SPLITS]

    def set_stage(number: int, source: Source, split: Split) -> Stage:
        plan, name = plan_of(recipe, source, split), f"{source.name}/{split}"
        before = [(each.name, part) for each, part in pairs[:number]] if recipe.data.deduplicate else None
        earlier = None if before is None else [out / "shards" / each / part for each, part in before]

        def run() -> None:
            show = partial(context.progress, stage="shards", total=len(pairs), source=name)
            built(name, make_shards(context, plan, name, earlier, workers or cores(), partial(show, done=number)))
            if number == len(pairs) - 1:
                show(done=len(pairs))

        inputs = {**asdict(plan), "format": FORMAT, "content": prints[source.name]}
        needs = ("tokenizer", *(f"shards.{each}.{part}" for each, part in before or ()))
        return Stage(f"shards.{source.name}.{split}", inputs, out / "shards" / name, run, needs)

    return [tokenizer_stage(context, prints), *(set_stage(i, *pair) for i, pair in enumerate(pairs))]


def tokenizer_stage(context: RunContext, prints: dict[str, str]) -> Stage:
    """Training, or copying, the tokenizer. A finished one does not depend on the texts."""
    recipe, directory = context.recipe, context.out / "tokenizer"
    content = recipe.content()
    inputs = {"tokenizer": {**content["tokenizer"], "vocab_size": content["model"]["vocab_size"]}}
    if recipe.tokenizer.path is not None:
        inputs["tokenizer"]["hash"] = Tokenizer.load(recipe.tokenizer.path).hash
    else:
        inputs["texts"] = {
            "corpora": prints,
            "sources": content["data"]["sources"],
            "validation_fraction": recipe.data.validation_fraction,
            "seed": recipe.data_seed,
        }
    return Stage("tokenizer", inputs, directory, lambda: make_tokenizer(recipe, directory, context.progress), ())


def plan_of(recipe: Recipe, source: Source, split: Split) -> ShardPlan:
    """What a shard set holds. Held-out text stays as it is."""
    data, training = recipe.data, split == "train"
    how = (data.fim_rate, data.split_joined_rate, data.fim_unit) if training else ()
    limit, fraction = source.tokens if training else VALIDATION_TOKENS, data.validation_fraction
    return ShardPlan(
        recipe.data_seed, *how, uri=source.uri, split=split, validation_fraction=fraction, limit_tokens=limit
    )


def make_tokenizer(recipe: Recipe, directory: Path, progress: Progress) -> None:
    """Trains the tokenizer on an even sample of the training split, each source by its weight; or copies a finished one."""
    if recipe.tokenizer.path is not None:
        finished, most = Tokenizer.load(recipe.tokenizer.path), recipe.model.config().vocab_size
        if finished.vocab_size > most:
            raise UserError(
                f"the tokenizer in {recipe.tokenizer.path} has {finished.vocab_size} entries, and model.vocab_size = "
                f"{most}: expected at least as many; raise model.vocab_size"
            )
        finished.save(directory)
        return
    progress(stage="tokenizer", done=0, total=1)
    total, fraction = sum(source.weight for source in recipe.data.sources), recipe.data.validation_fraction
    texts = chain.from_iterable(
        to_learn_from(
            source.uri, recipe.data_seed, fraction, int(recipe.tokenizer.training_bytes * source.weight / total)
        )
        for source in recipe.data.sources
    )
    tokenizer = train_tokenizer(texts, recipe.model.config().vocab_size, recipe.tokenizer.digits)
    tokenizer.save(directory)
    progress(stage="tokenizer", done=1, total=1, entries=tokenizer.vocab_size)


def make_shards(
    context: RunContext, plan: ShardPlan, name: str, earlier: list[Path] | None, workers: int, show: Progress
) -> float:
    """Builds the shard set called `name` and notes what it holds; returns the tokens a second."""
    started = time.perf_counter()

    def advance(documents: int, tokens: int, size: int) -> None:
        show(megabytes=size / 1e6, tokens_per_second=tokens / (time.perf_counter() - started))

    show()
    tokenizer, directory = Tokenizer.load(context.out / "tokenizer"), context.out / "shards" / name
    made = build_shards(plan, tokenizer, directory, earlier=earlier, workers=workers, progress=advance)
    speed = made.tokens / (time.perf_counter() - started)
    left_out = "".join(f", {made.skipped[key]:,} {key}" for key in ("empty", "duplicates") if made.skipped.get(key))
    context.note(
        f"{name}: {made.documents:,} documents, {made.tokens:,} tokens, {made.bytes / made.tokens:.2f} bytes a token{left_out}; "
        f"{speed:,.0f} tokens/s"
    )
    # Both splits read the same files.
    if made.skipped["count"] and plan.split == "train":
        named = ", ".join(made.skipped["named"])
        context.note(f"{name}: skipped {made.skipped['count']} files or rows that are no text: {named}")
    return speed


def open_sets(recipe: Recipe, out: Path, split: Split) -> dict[str, ShardSet]:
    """One split of every source, by name, whole and made with the run's tokenizer: `UserError` where it is not."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    sets = {
        source.name: ShardSet.open(out / "shards" / source.name / split, tokenizer.hash)
        for source in recipe.data.sources
    }
    for each in sets.values():
        each.verify()
    return sets
