"""What the report's ablations found, as signs: Table 4 (MTP), Table 5 and section 4.5.3 (balancing)."""

from dataclasses import dataclass
from typing import Literal

from dsv3.recipe.differences import differences
from dsv3.recipe.schema import Recipe
from dsv3.recipe.segment import as_segments

Kind = Literal["text", "tasks"]
"""What a figure measures: how well text is predicted (bits per byte, loss: less is better), or the share of tasks solved."""

MTP_KEYS = ("model.num_nextn_predict_layers", "schedule.mtp_weight")
BALANCE_KEYS = ("training.balance", "training.balance_alpha", "schedule.bias_update_speed")
LOSS_RANK = {"bias": 0, "batch": 0, "sequence": 1}
"""Section 4.5.3, validation losses of the 1B model: 2.253 with biases, 2.253 batch-wise, 2.258 sequence-wise; of the 3B
model 2.080, 2.080 and 2.085."""


@dataclass(frozen=True)
class Finding:
    """How one variant's figure stands to another's in the report."""

    sign: int
    """1 higher, -1 lower, 0 the same."""
    source: str


def published(first: Recipe, other: Recipe, kind: Kind) -> Finding | None:
    """What the report found of `other` against `first`; None where it has no such pair.

    It has only pairs that differ in MTP alone or in balancing alone; seeds do not count.
    """
    mtp, balance = (uses_mtp(first), uses_mtp(other)), (balancing(first), balancing(other))
    changed = changed_keys(first, other)
    if changed <= set(MTP_KEYS) and mtp[0] != mtp[1]:
        return Finding(0 if kind == "text" else mtp[1] - mtp[0], "Table 4")
    if changed <= set(BALANCE_KEYS) and balance[0] and balance[1] and balance[0] != balance[1]:
        sign = LOSS_RANK[balance[1]] - LOSS_RANK[balance[0]]
        if "batch" in balance:
            return Finding(sign, "section 4.5.3") if kind == "text" else None
        return Finding(sign, "Table 5, section 4.5.3") if kind == "text" else Finding(-sign, "Table 5")
    return None


def changed_keys(first: Recipe, other: Recipe) -> set[str]:
    """The keys in which two recipes differ, schedules as wholes, the seed left out."""
    found = {each.split(" ", 1)[0] for each in differences(first.content(), other.content())}
    keys = {".".join(key.split(".")[:2]) for key in found}
    return keys - {"training.seed"}


def uses_mtp(recipe: Recipe) -> bool:
    """Whether there is an MTP module, and a loss for it."""
    weights = [value for segment in as_segments(recipe.schedule.mtp_weight) for value in segment.values]
    return recipe.model.config().num_nextn_predict_layers > 0 and max(weights) > 0


def balancing(recipe: Recipe) -> str | None:
    """`training.balance`; None where that does nothing."""
    training = recipe.training
    speeds = [value for segment in as_segments(recipe.schedule.bias_update_speed) for value in segment.values]
    acts = max(speeds) > 0 if training.balance == "bias" else training.balance_alpha > 0
    return training.balance if acts else None
