"""What may change in a recipe when a run continues: what decides nothing of the steps already made.

A schedule, or the length of the training, may change in what is still to come: the values of all steps so far must be the
same as before.
"""

from collections.abc import Iterator, Sequence

from dsv3.errors import UserError, nearest
from dsv3.recipe.differences import differences
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe

FREE = (
    "training.device", "training.cuda_graphs", "training.recompute", "training.max_skipped_steps", "training.checkpoint_every_steps",
    "training.keep_last", "training.keep_every_steps", "training.evaluate_every_steps", "training.load_every_steps",
    "evaluation", "logging", "parallel",
)  # fmt: skip
"""Keys and sections that decide how a run is watched and where it computes."""
TIMED = ("training.tokens", "schedule")
"""Keys and sections that may change in what is still to come."""


def check_changes(old: Recipe, new: Recipe, step: int, allow: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """(what changes and may, what would have to be allowed by name) in a recipe whose first `step` steps were made, each
    with both values; the notes do not count.

    `allow` holds keys, or sections with all their keys. Raises `UserError` for a name that is none.
    """
    check_names(allow, old, new)
    safe = (*FREE, *TIMED) if agree(old, new, step) else FREE
    accepted, refused = [], []
    for said in differences(old.content(), new.content()):
        key = said.partition(" ")[0]
        if within(key, safe):
            accepted.append(said)
        elif within(key, allow):
            accepted.append(f"{said} (allowed)")
        else:
            refused.append(said)
    return accepted, refused


def check_names(allow: Sequence[str], *recipes: Recipe) -> None:
    """Raises `UserError` for a name that is neither a key nor a section of one of the recipes."""
    legal = {name for recipe in recipes for name in names_in(recipe.content())}
    for name in allow:
        if name not in legal:
            raise UserError(f"--allow {name}: no recipe has this key; {nearest(name, legal)}")


def within(key: str, names: Sequence[str]) -> bool:
    """Whether a key is among the names, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def names_in(content: object, before: str = "") -> Iterator[str]:
    """The dotted keys of nested mappings, sections included; entries of lists by number."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        for key, each in content.items():
            yield f"{before}{key}"
            yield from names_in(each, f"{before}{key}.")


def agree(old: Recipe, new: Recipe, step: int) -> bool:
    """Whether all schedules of two recipes have the same values at the steps before `step`, and the new one goes further."""
    a, b = Schedules.resolve(old), Schedules.resolve(new)
    if step == 0:
        return True
    if old.data.sequence_length != new.data.sequence_length or b.total_steps < step:
        return False
    if a.timeline.runs(step) != b.timeline.runs(step):
        return False
    names = ("learning_rate", "mtp_weight", "bias_update_speed")
    changed = [(getattr(a, name), getattr(b, name)) for name in names if getattr(a, name) != getattr(b, name)]
    counts = ((at, a.timeline.tokens_at(at)) for at in range(step) if changed)
    return all(one.at(*count) == other.at(*count) for count in counts for one, other in changed)
