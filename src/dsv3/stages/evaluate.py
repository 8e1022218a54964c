"""Scores of any model on disk: its own recipe's held-out texts, or texts that the user names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.sources import Document, documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError, nearest
from dsv3.evaluation.tasks import TASKS, Plan, run_tasks
from dsv3.recipe.schema import Recipe
from dsv3.stages.scores import held_out, take
from dsv3.weights.checkpoint import STATE, read_state
from dsv3.weights.opening import find_checkpoint, load_model

LONGEST = 4096
"""Window of a model that comes without its recipe; a shorter one where it reads less far."""
VALIDATION_FRACTION = 0.05
"""Of a builtin corpus that the user names; files that he names are read whole."""


@dataclass(frozen=True)
class Request:
    """What `dsv3 eval` was asked for. `length` None is the length it was trained with; no `data` the texts of its recipe."""

    tasks: Sequence[str]
    data: Sequence[str] = ()
    bytes: int = 200_000
    length: int | None = None
    tinypy_tasks: int = 300
    needle_lengths: Sequence[int] = ()
    needle_depths: int = 5
    needle_samples: int = 4
    ema: bool = False
    """The average of the weights that a run kept, instead of its weights."""


def evaluate_path(
    path: Path, request: Request, device: str = "auto", progress: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """What `run_tasks` gives for the model at `path`, with `path`, `step` (None for published weights) and `length`.

    Raises `UserError` for an unknown task, and where texts are asked for and nothing says which.
    """
    for task in request.tasks:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}: {nearest(task, TASKS)}")
    recipe, step = recipe_of(path)
    needs_texts = bool({"bpb", "position"} & set(request.tasks))
    if needs_texts and not request.data and recipe is None:
        raise UserError(
            f"{path} comes without a recipe that names its held-out texts: name some with --data PATH, or builtin:stdlib"
        )
    model, tokenizer = load_model(path, device=device, ema=request.ema)
    longest = min(model.config.max_position_embeddings, LONGEST)
    length = request.length or (recipe.data.sequence_length if recipe else longest)
    plan = Plan(
        tasks=request.tasks,
        length=length,
        texts=texts_of(recipe, request) if needs_texts else {},
        tinypy_tasks=request.tinypy_tasks,
        needle_lengths=request.needle_lengths,
        needle_depths=request.needle_depths,
        needle_samples=request.needle_samples,
    )
    found = run_tasks(model, Tokenizer.load(tokenizer), plan, progress)
    return {"path": str(path), "step": step, "length": length, **found}


def recipe_of(path: Path) -> tuple[Recipe | None, int | None]:
    """The recipe that a checkpoint was trained with, and its step; None for published weights."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run, a checkpoint or a Hugging Face directory")
    if (path / "config.json").is_file() and not (path / STATE).is_file():
        return None, None
    state = read_state(find_checkpoint(path))
    return (Recipe.from_dict(state["recipe"]) if "recipe" in state else None), state.get("step")


def texts_of(recipe: Recipe | None, request: Request) -> dict[str, list[str]]:
    """Documents by source up to the request's bytes: those that the user names, or the recipe's held-out ones."""
    if not request.data:
        assert recipe is not None
        return {source.name: held_out(recipe, source.uri, request.bytes) for source in recipe.data.sources}
    return {uri: take(named(uri), request.bytes) for uri in request.data}


def named(uri: str) -> Iterator[Document]:
    """Of a builtin the held-out split; of files everything."""
    if uri.startswith("builtin:"):
        return documents(uri, "validation", seed=0, validation_fraction=VALIDATION_FRACTION)
    return documents(uri, "train", seed=0, validation_fraction=0.0)
