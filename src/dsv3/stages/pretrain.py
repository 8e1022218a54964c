"""Pre-training as stages: tokenizer, shards, training. `dsv3 pretrain` runs these; `dsv3 quickstart` adds the report."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from dsv3.data.build import build_shards
from dsv3.data.loader import Loader
from dsv3.data.shards import ShardSet
from dsv3.data.sources import ENDLESS, Document, Split, documents, fingerprint, sample
from dsv3.data.tokenizer import Tokenizer, train_tokenizer
from dsv3.errors import UserError
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.changes import check_names
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe, Source
from dsv3.stages.runner import Stage
from dsv3.stages.scores import Scores
from dsv3.training.device import pick_device
from dsv3.training.resume import find_continuation
from dsv3.training.trainer import Progress, Trainer

ENDLESS_DOCUMENTS = 4000
"""Of a source that never ends, read for the tokenizer: its words repeat long before."""
VALIDATION_TOKENS = 200_000
"""Of an endless source's held-out split."""


def pretraining_stages(
    recipe: Recipe, out: Path, progress: Progress, note: Callable[[str], None], allow: Sequence[str] = ()
) -> list[Stage]:
    """The stages up to a trained model in `out/pretrain`; each is keyed by what it reads of the recipe.

    `allow` names keys of the recipe that may differ from those of a run that is continued; see `recipe/changes.py`.
    """
    check_names(allow, recipe)
    content = recipe.content()
    data = content["data"]
    texts = {
        "corpora": {source.name: fingerprint(source.uri) for source in recipe.data.sources},
        "sources": data["sources"],
        "validation_fraction": data["validation_fraction"],
        "seed": recipe.data_seed,
    }
    vocabulary = {**content["tokenizer"], "vocab_size": content["model"]["vocab_size"]}
    if recipe.tokenizer.path is not None:
        vocabulary["hash"] = Tokenizer.load(recipe.tokenizer.path).hash
    changes = {key: data[key] for key in ("fim_rate", "split_joined_rate")}
    return [
        Stage(
            "tokenizer",
            {"texts": texts, "tokenizer": vocabulary},
            out / "tokenizer",
            lambda: make_tokenizer(recipe, out / "tokenizer", progress),
        ),
        Stage("shards", changes, out / "shards", lambda: make_shards(recipe, out, progress, note)),
        Stage(
            "pretrain",
            content,
            out / "pretrain",
            partial(train, recipe, out, progress, note, allow),
            lambda: refused_changes(out / "pretrain", recipe, allow),
        ),
    ]


def refused_changes(directory: Path, recipe: Recipe, allow: Sequence[str]) -> list[str] | None:
    """What keeps this recipe from going on with the run in a directory; None where that has no checkpoint yet."""
    found = find_continuation(directory / "checkpoints", recipe, allow)
    return None if found is None else found.refused


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


def make_shards(recipe: Recipe, out: Path, progress: Progress, note: Callable[[str], None]) -> None:
    """Token shards of every source and split."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    splits: tuple[Split, ...] = ("train", "validation")
    done, total = 0, len(splits) * len(recipe.data.sources)
    for source in recipe.data.sources:
        skipped: list[dict[str, Any]] = []
        for split in splits:
            progress(stage="shards", done=done, total=total, source=f"{source.name}/{split}")
            training = split == "train"
            manifest = build_shards(
                source.uri, split, tokenizer, out / "shards" / source.name / split, seed=recipe.data_seed,
                fim_rate=recipe.data.fim_rate if training else 0.0,
                split_joined_rate=recipe.data.split_joined_rate if training else 0.0,
                validation_fraction=recipe.data.validation_fraction,
                limit_tokens=source.tokens if training else VALIDATION_TOKENS,
            )  # fmt: skip
            skipped.append(manifest.skipped)
            done += 1
        # Both splits read the same files, each up to its limit.
        most = max(skipped, key=lambda each: each["count"])
        if most["count"]:
            named = ", ".join(most["named"])
            note(f"{source.name}: skipped {most['count']} files or rows that are no text: {named}")
    progress(stage="shards", done=done, total=total)


def train(
    recipe: Recipe, out: Path, progress: Progress, note: Callable[[str], None], allow: Sequence[str] = ()
) -> Trainer:
    """Trains in `out/pretrain`, from the newest checkpoint where there is one; the trainer at its end."""
    tokenizer = Tokenizer.load(out / "tokenizer")
    sets = [
        (source.name, ShardSet.open(out / "shards" / source.name / "train", tokenizer.hash), source.weight)
        for source in recipe.data.sources
    ]
    loader = Loader(
        sets, recipe.data.sequence_length + 1, recipe.training.seed, tokenizer.pad_id, recipe.data.document_mask
    )
    files = {"tokenizer": out / "tokenizer"}
    scores = Scores(recipe, tokenizer)
    trainer = Trainer(recipe, loader, out / "pretrain", files=files, progress=progress, evaluate=scores)
    if trainer.resume(allow):
        note(f"pretrain: continuing after step {trainer.step_count}")
        for change in trainer.changes:
            note(f"pretrain: {change}")
    write_run(recipe, out / "pretrain", tokenizer, sets)
    trainer.run()
    return trainer


def derived(recipe: Recipe) -> dict[str, str]:
    """What follows from a recipe, and why it is as it is: shown before the first step, and in the report."""
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
        "machine": {
            "processor": processor(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads()),
            "system": platform.platform(terse=True),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": shlex.join(["dsv3", *sys.argv[1:]]),
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "run.json.partial"
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(directory / "run.json")


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


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
