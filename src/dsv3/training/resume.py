"""Continuing a run: the newest checkpoint, and whether this recipe may go on from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import UserError
from dsv3.recipe.changes import check_changes
from dsv3.recipe.schema import Recipe
from dsv3.weights.checkpoint import STATE, latest_checkpoint, read_state


@dataclass(frozen=True)
class Continuation:
    """A checkpoint to continue from."""

    directory: Path
    state: dict[str, Any]
    accepted: list[str]
    """Differences of its recipe that are harmless or allowed, one sentence each."""
    refused: list[str]
    """Differences that must be allowed by name."""


def find_continuation(parent: Path, recipe: Recipe, allow: Sequence[str] = ()) -> Continuation | None:
    """The newest whole checkpoint in `parent` and what differs in its recipe; None where there is none at all.

    `allow` names keys, or sections, that may differ. Raises `UserError` for a name that no recipe has, and where no checkpoint is
    whole.
    """
    found = latest_checkpoint(parent, every_byte=True)
    if found is None:
        if any(parent.glob(f"[!.]*/{STATE}")):
            raise UserError(
                f"none of the checkpoints in {parent} is whole; the warnings above say what is wrong with each. Put back what "
                "is missing, or remove them to start afresh"
            )
        return None
    state = read_state(found)
    accepted, refused = check_changes(Recipe.from_dict(state["recipe"]), recipe, state["step"], allow)
    return Continuation(found, state, accepted, refused)


def refuse(what: Path, refused: Sequence[str]) -> UserError:
    """The refusal to go on with another recipe."""
    keys = ",".join(each.partition(" ")[0] for each in refused)
    return UserError(
        f"{what} was trained with another recipe: {'; '.join(refused)}. Continue with the recipe it was trained with, "
        f"start in another directory, or allow what may differ by name: --allow {keys}"
    )
