"""Scores of any model on disk: its own recipe's held-out texts, or texts that the user names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3.data.sources import documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.tasks import run_tasks
from dsv3.recipe.schema import EvaluationSection, Recipe
from dsv3.stages.scores import held_out, take
from dsv3.weights.opening import checkpoint_at, load_model

LONGEST = 4096
"""The longest window for a model that comes without its recipe."""


def evaluate_path(
    path: Path,
    wanted: EvaluationSection,
    data: Sequence[str] = (),
    length: int | None = None,
    *,
    ema: bool = False,
    device: str = "auto",
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """What `run_tasks` gives for the model at `path`, with `path`, `step` (None for published weights) and `length`.

    By default `length` is what the model was trained with, and the texts are its recipe's held-out ones. `ema` scores the
    average of the weights that a run kept. Raises `UserError` where texts are asked for and nothing says which.
    """
    recipe, step = recipe_of(path)
    texts: dict[str, list[str]] = {}
    if {"bpb", "position", "mtp"} & set(wanted.tasks):
        if data:
            texts = {uri: named(uri, wanted.bits_per_byte_bytes) for uri in data}
        elif recipe is not None:
            texts = held_out(recipe, wanted.bits_per_byte_bytes)
        else:
            raise UserError(
                f"{path} comes without a recipe that names its held-out texts: name some with --data PATH, or builtin:stdlib"
            )
    model, tokenizer = load_model(path, device=device, ema=ema)
    longest = min(model.config.max_position_embeddings, LONGEST)
    length = length or (recipe.data.sequence_length if recipe else longest)
    found = run_tasks(model, Tokenizer.load(tokenizer), wanted, length, texts, progress)
    return {"path": str(path), "step": step, "length": length, **found}


def recipe_of(path: Path) -> tuple[Recipe | None, int | None]:
    """The recipe that a checkpoint was trained with, and its step; None for published weights."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run, a checkpoint or a Hugging Face directory")
    _, state = checkpoint_at(path)
    return (Recipe.from_dict(state["recipe"]) if "recipe" in state else None), state.get("step")


def named(uri: str, limit: int) -> list[str]:
    """Up to `limit` bytes: of a builtin, its held-out split; of anything else, all of it."""
    if uri.startswith("builtin:"):
        return take(documents(uri, "validation", seed=0), limit)
    return take(documents(uri, "train", seed=0, validation_fraction=0.0), limit)
