"""The report's signs, as its tables and section 4.5.3 have them."""

from pathlib import Path

import pytest

from dsv3.recipe.schema import Recipe
from dsv3.stages.published import published

ABLATIONS = Path(__file__).parents[2] / "recipes" / "ablations"


def recipe(name, *overrides):
    return Recipe.load(ABLATIONS / f"{name}.toml", overrides)


@pytest.mark.parametrize(
    ("first", "other", "text", "tasks"),
    [
        ("baseline", "mtp-off", (0, "Table 4"), (-1, "Table 4")),
        ("mtp-off", "baseline", (0, "Table 4"), (1, "Table 4")),
        ("baseline", "balance-sequence", (1, "Table 5, section 4.5.3"), (-1, "Table 5")),
        ("balance-sequence", "baseline", (-1, "Table 5, section 4.5.3"), (1, "Table 5")),
        ("baseline", "balance-batch", (0, "section 4.5.3"), None),
        ("balance-batch", "balance-sequence", (1, "section 4.5.3"), None),
        ("mtp-off", "balance-batch", None, None),
        ("baseline", "baseline", None, None),
    ],
)
def test_signs(first, other, text, tasks):
    found = [published(recipe(first), recipe(other, "training.seed=4"), kind) for kind in ("text", "tasks")]
    assert [each and (each.sign, each.source) for each in found] == [text, tasks]


@pytest.mark.parametrize(
    "overrides",
    [["training.tokens=2M"], ["optimizer.kind=adamw"], ["schedule.mtp_weight=0.3", "data.fim_rate=0.0"]],
)
def test_a_pair_that_differs_in_more_has_no_sign(overrides):
    assert published(recipe("baseline"), recipe("mtp-off", *overrides), "text") is None


def test_what_does_nothing_is_no_balancing_and_no_mtp():
    idle = recipe("baseline", "schedule.bias_update_speed=0.0")
    assert published(idle, recipe("balance-sequence"), "text") is None
    assert published(recipe("baseline"), recipe("balance-batch", "training.balance_alpha=0.0"), "text") is None
    unweighted = recipe("baseline", "schedule.mtp_weight=0.0")
    assert published(recipe("baseline"), unweighted, "tasks").sign == -1
    assert published(recipe("mtp-off"), unweighted, "tasks") is None
