"""Runs side by side: their figures over seeds, the differences to the first variant, and whether the report's signs reproduce."""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe
from dsv3.stages.published import BALANCE_KEYS, MTP_KEYS, Finding, Kind, changed_keys, published
from dsv3.stages.run_directory import Row, Run, read_run

LAST = 0.2
"""Share of the training, at its end, that MaxVio is averaged over."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t: the two-sided 95% quantile for 1, 2, ... degrees of freedom."""
SEED = re.compile(r"[-_.]?(seed)?[-_.]?\d+$")


@dataclass(frozen=True)
class Variant:
    """The runs of one recipe, by seed."""

    name: str
    recipe: Recipe
    """Of one of the runs."""
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class Line:
    """One figure of one variant."""

    figure: str
    variant: str
    values: Mapping[int, float]
    """By seed."""
    mean: float
    spread: float | None
    """Standard deviation over seeds; None for one seed."""
    difference: float | None = None
    """Mean over the seeds that both have of this variant less the first; None for the first."""
    margin: float | None = None
    """Half the width of the difference's 95% interval (Student's t over seeds); None for one seed."""
    finding: Finding | None = None
    """What the report says of this difference."""
    reproduces: str | None = None
    """Whether that shows here: `yes`, `no`, `within the spread`, `one seed`; None where the report says nothing."""


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared."""

    tokens: int
    """Where in the training the runs are compared."""
    variants: Sequence[Variant]
    lines: Sequence[Line]
    """By figure, then by variant."""
    notes: Sequence[str]
    blocks: Set[str]
    """The MoE blocks whose MaxVio every step of every run has."""

    @property
    def runs(self) -> list[Run]:
        """All runs of all variants."""
        return [run for variant in self.variants for run in variant.runs.values()]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "tokens": self.tokens,
            "runs": {each.name: {seed: str(run.path) for seed, run in each.runs.items()} for each in self.variants},
            "lines": [asdict(line) for line in self.lines],
            "notes": self.notes,
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """Compares runs at the last evaluation that all of them have.

    Raises `UserError` for directories that are no runs or say nothing of their recipe, two runs of one recipe and seed, and
    runs without a common evaluation.
    """
    # Each once, so that `RUNS/baseline-* RUNS/*` puts the baseline first.
    once = {path.resolve(): path for path in paths}.values()
    variants = group([read_run(path) for path in once])
    runs = [run for variant in variants for run in variant.runs.values()]
    tokens = last_common(runs)
    recorded = [set(row.get("max_vio") or ()) for run in runs for row in run.metrics]
    blocks = set.intersection(*recorded) if recorded else set()
    values = {run.path: figures_of_run(run, tokens, blocks) for run in runs}
    names = [name for name in values[runs[0].path] if all(name in found for found in values.values())]
    lines = []
    for name in names:
        by_variant = [{seed: values[run.path][name] for seed, run in each.runs.items()} for each in variants]
        lines += [line(name, variants[0], by_variant[0], *pair) for pair in zip(variants, by_variant, strict=True)]
    return Comparison(tokens, variants, lines, notes_on(variants, tokens), blocks)


def notes_on(variants: Sequence[Variant], tokens: int) -> list[str]:
    """Caveats of a comparison."""
    first, *others = variants
    end = max(variant.recipe.training.tokens for variant in variants)
    notes = [f"Not at the end of the training: at {tokens:,} of {end:,} tokens."] if tokens < end else []
    for other in others:
        changed = changed_keys(first.recipe, other.recipe)
        if not changed <= set(MTP_KEYS) and not changed <= set(BALANCE_KEYS):
            named = ", ".join(sorted(changed))
            notes.append(f"{other.name} differs from {first.name} in {named}: the report has no such pair.")
    return notes


def group(runs: Sequence[Run]) -> list[Variant]:
    """Runs of one recipe and different seeds are one variant, named as its first directory is without the seed."""
    found: dict[str, tuple[Recipe, dict[int, Run]]] = {}
    for run in runs:
        if "recipe" not in run.about:
            raise UserError(f"{run.path} does not say what it trains: expected pretrain/run.json in it. {run.notes[0]}")
        recipe = Recipe.from_dict(run.about["recipe"])
        key = json.dumps(Recipe.from_dict(run.about["recipe"], ["training.seed=0"]).content(), sort_keys=True)
        seed, (_, same) = recipe.training.seed, found.setdefault(key, (recipe, {}))
        if seed in same:
            raise UserError(
                f"{same[seed].path} and {run.path} are runs of one recipe and one seed: expected another "
                "seed (training.seed), or another recipe; name one of them"
            )
        same[seed] = run
    names = [next(iter(same.values())).path.resolve().name for _, same in found.values()]
    short = [SEED.sub("", name) for name in names]
    if len(set(short)) == len(short) and all(short):
        names = short
    named = zip(names, found.values(), strict=True)
    return [Variant(name, recipe, dict(sorted(same.items()))) for name, (recipe, same) in named]


def last_common(runs: Sequence[Run]) -> int:
    """The tokens of the last evaluation that all runs have; that before training does not count."""
    common = set.intersection(*({row["tokens"] for row in run.evaluations if row["tokens"]} for run in runs))
    if not common:
        last = ", ".join(f"{run.path} {run.evaluations[-1]['tokens'] if run.evaluations else 'never'}" for run in runs)
        raise UserError(
            f"these runs have no evaluation at the same number of tokens; the last of each: {last}. Wait until they are at "
            "their ends, or compare runs that are evaluated alike (training.evaluate_every_steps)"
        )
    return max(common)


def evaluated(row: Row) -> dict[str, float]:
    """The figures of one evaluation by name."""
    found = {f"validation loss, {name}": value for name, value in (row.get("validation_loss") or {}).items()}
    found |= {f"bits per byte, {name}": value for name, value in (row.get("bits_per_byte") or {}).items()}
    found |= {f"pass@1, {name}": each["passed"] / each["total"] for name, each in (row.get("pass_at_1") or {}).items()}
    return found


def figures_of_run(run: Run, tokens: int, blocks: Set[str]) -> dict[str, float]:
    """All figures of a run at a number of tokens; MaxVio is the mean over `blocks` and the last part of the steps."""
    found = evaluated(next(row for row in run.evaluations if row["tokens"] == tokens))
    steps = [row for row in run.metrics if (1 - LAST) * tokens < row["tokens"] <= tokens]
    if blocks and steps:
        found["MaxVio"] = fmean(row["max_vio"][block] for row in steps for block in blocks)
    return found


def line(
    name: str, first: Variant, reference: Mapping[int, float], variant: Variant, values: Mapping[int, float]
) -> Line:
    """One figure of one variant against the first one's."""
    mean, spread = fmean(values.values()), stdev(values.values()) if len(values) > 1 else None
    if variant is first:
        return Line(name, variant.name, values, mean, spread)
    paired = [values[seed] - reference[seed] for seed in values if seed in reference]
    difference = fmean(paired) if paired else mean - fmean(reference.values())
    margin = half_width(paired) if len(paired) > 1 else None
    # The report gives no number for MaxVio.
    kind: Kind | None = None if name == "MaxVio" else "tasks" if name.startswith("pass@1") else "text"
    finding = published(first.recipe, variant.recipe, kind) if kind else None
    reproduces = verdict(difference, margin, finding.sign) if finding else None
    return Line(name, variant.name, values, mean, spread, difference, margin, finding, reproduces)


def half_width(differences: Sequence[float]) -> float:
    """Half the width of the 95% interval of their mean."""
    count = len(differences)
    return (T_95[count - 2] if count - 2 < len(T_95) else 2.0) * stdev(differences) / sqrt(count)


def verdict(difference: float, margin: float | None, sign: int) -> str:
    """Whether a difference has the report's sign. "Unchanged" shows as a difference within the spread."""
    if margin is None:
        return "one seed"
    inside = abs(difference) <= margin
    if sign == 0:
        return "yes" if inside else "no"
    if inside:
        return "within the spread"
    return "yes" if difference * sign > 0 else "no"
