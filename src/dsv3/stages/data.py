"""The data of a training as stages: a tokenizer, then one shard set a source and split. `dsv3 data build` runs these alone."""

import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsv3.data.build import build_shards
from dsv3.data.shards import FORMAT, Manifest, ShardSet
from dsv3.data.sources import ENDLESS, Document, Split, documents, fingerprint, sample
from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.data.workers import cores
from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe, Source
from dsv3.stages.runner import Stage
from dsv3.training.trainer import Progress

ENDLESS_DOCUMENTS = 4000
"""Of a source that never ends, read for the tokenizer: its words repeat long before."""
VALIDATION_TOKENS = 200_000
"""Of an endless source's held-out split."""
SPLITS: tuple[Split, ...] = ("train", "validation")

Built = Callable[[str, float], None]
"""Called with a set, `SOURCE/SPLIT`, and the tokens a second it was built at."""


def data_stages(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    note: Callable[[str], None],
    *,
    workers: int | None = None,
    built: Built = lambda name, speed: None,
) -> list[Stage]:
    """The stages up to the shards in `out/shards`, each keyed by what it reads of the recipe.

    A set depends on the tokenizer, and where duplicates are left out on the sets before it: another weight builds none
    again, another rate of fill-in-the-middle those that are trained on. By default every core works.
    """
    prints = {source.name: fingerprint(source.uri) for source in recipe.data.sources}
    stages = [tokenizer_stage(recipe, out, prints, progress)]
    pairs = [(source, split) for source in recipe.data.sources for split in SPLITS]
    for number, (source, split) in enumerate(pairs):
        earlier = [directory(out, *pair) for pair in pairs[:number]] if recipe.data.deduplicate else None

        def build(
            source: Source = source, split: Split = split, earlier: list[Path] | None = earlier, number: int = number
        ) -> None:
            def show(**figures: float) -> None:
                progress(stage="shards", done=number, total=len(pairs), source=f"{source.name}/{split}", **figures)

            speed = make_shards(recipe, source, split, out, earlier, workers or cores(), show, note)
            built(f"{source.name}/{split}", speed)
            if number == len(pairs) - 1:
                progress(stage="shards", done=len(pairs), total=len(pairs))

        needs = [stage.name for stage in stages] if recipe.data.deduplicate else ["tokenizer"]
        inputs = {**what_is_built(recipe, source, split), "format": FORMAT, "content": prints[source.name]}
        name = f"shards.{source.name}.{split}"
        stages.append(Stage(name, inputs, directory(out, source, split), build, tuple(needs)))
    return stages


def directory(out: Path, source: Source, split: Split) -> Path:
    """Where a shard set is."""
    return out / "shards" / source.name / split


def tokenizer_stage(recipe: Recipe, out: Path, prints: dict[str, str], progress: Progress) -> Stage:
    """Training, or copying, the tokenizer. A finished one does not depend on the texts."""
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
    return Stage(
        "tokenizer", inputs, out / "tokenizer", lambda: make_tokenizer(recipe, out / "tokenizer", progress), ()
    )


def what_is_built(recipe: Recipe, source: Source, split: Split) -> dict[str, Any]:
    """What a shard set is built by: `build_shards`' arguments. Held-out text stays as it is."""
    training = split == "train"
    return {
        "uri": source.uri,
        "split": split,
        "seed": recipe.data_seed,
        "fim_rate": recipe.data.fim_rate if training else 0.0,
        "fim_unit": recipe.data.fim_unit if training else "character",
        "split_joined_rate": recipe.data.split_joined_rate if training else 0.0,
        "validation_fraction": recipe.data.validation_fraction,
        "limit_tokens": source.tokens if training else VALIDATION_TOKENS,
    }


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
    total = sum(source.weight for source in recipe.data.sources)
    texts = chain.from_iterable(
        sample(training_documents(recipe, source), int(recipe.tokenizer.training_bytes * source.weight / total))
        for source in recipe.data.sources
    )
    tokenizer = train_tokenizer(texts, recipe.model.config().vocab_size, recipe.tokenizer.digits)
    tokenizer.save(directory)
    progress(stage="tokenizer", done=1, total=1, entries=tokenizer.vocab_size)


def training_documents(recipe: Recipe, source: Source) -> Iterator[Document]:
    """A source's training split; of one that never ends, as many documents as the tokenizer can be trained on."""
    fraction = recipe.data.validation_fraction
    found = documents(source.uri, "train", seed=recipe.data_seed, validation_fraction=fraction)
    return islice(found, ENDLESS_DOCUMENTS) if (source.uri, "train") in ENDLESS else found


def make_shards(
    recipe: Recipe,
    source: Source,
    split: Split,
    out: Path,
    earlier: list[Path] | None,
    workers: int,
    show: Callable[..., None],
    note: Callable[[str], None],
) -> float:
    """Builds one shard set and says what it holds; the tokens a second."""
    started = time.perf_counter()

    def advance(documents: int, tokens: int, size: int) -> None:
        show(megabytes=size / 1e6, tokens_per_second=tokens / (time.perf_counter() - started))

    show()
    manifest = build_shards(
        tokenizer=Tokenizer.load(out / "tokenizer"), out_dir=directory(out, source, split),
        earlier=earlier, workers=workers, progress=advance, **what_is_built(recipe, source, split),
    )  # fmt: skip
    speed = manifest.tokens / (time.perf_counter() - started)
    note(f"{source.name}/{split}: {in_words(manifest)}; {speed:,.0f} tokens/s")
    # Both splits read the same files.
    if manifest.skipped["count"] and split == "train":
        named = ", ".join(manifest.skipped["named"])
        note(f"{source.name}: skipped {manifest.skipped['count']} files or rows that are no text: {named}")
    return speed


def in_words(manifest: Manifest) -> str:
    """What a shard set holds."""
    ratio = manifest.bytes / manifest.tokens
    left = [f"{manifest.skipped[key]:,} {key}" for key in ("empty", "duplicates") if manifest.skipped.get(key)]
    return ", ".join(
        [f"{manifest.documents:,} documents", f"{manifest.tokens:,} tokens", f"{ratio:.2f} bytes a token", *left]
    )


def open_sets(recipe: Recipe, out: Path, split: Split) -> dict[str, ShardSet]:
    """One split of every source, by name, whole and made with the run's tokenizer: `UserError` where it is not."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    sets = {source.name: ShardSet.open(directory(out, source, split), tokenizer.hash) for source in recipe.data.sources}
    for each in sets.values():
        each.verify()
    return sets
