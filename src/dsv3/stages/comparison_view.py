"""How a comparison looks: a table for terminals and Markdown, and a drawing of every figure over the training."""

import numpy as np
from matplotlib.figure import Figure

from dsv3.stages.compare import LAST, Comparison, Line, Variant, evaluated
from dsv3.stages.drawing import COLOURS, SERIES, binned, finite, shorten, tokens_axis

HEAD = ("figure", "variant", "mean", "difference", "report", "reproduces")
WORDS = {-1: "lower", 0: "the same", 1: "higher"}
COLUMNS = 3
"""Panels side by side in the drawing."""
EXPLANATION = (
    "Mean ± standard deviation over seeds. Differences are to the first variant, seed by seed, ± half their 95% interval "
    "(Student's t over seeds). `report`: how the variant stands to the first one in DeepSeek-V3's report. `reproduces`: "
    "`within the spread` is a difference smaller than its interval; where the report has no difference, that counts as `yes`."
)


def table(comparison: Comparison) -> list[list[str]]:
    """The cells, head first; a figure's name stands in its first line alone."""
    rows, before = [list(HEAD)], ""
    for line in comparison.lines:
        finding = line.finding
        said = f"{WORDS[finding.sign]} ({finding.source})" if finding else ""
        name = line.figure if line.figure != before else ""
        mean = with_spread(line.figure, line.mean, line.spread)
        difference = with_spread(line.figure, line.difference, line.margin, sign="+")
        rows.append([name, line.variant, mean, difference, said, line.reproduces or ""])
        before = line.figure
    return rows


def with_spread(figure: str, value: float | None, spread: float | None, sign: str = "") -> str:
    """`1.841 ± 0.010`; shares as percents; empty where there is no value."""
    if value is None:
        return ""
    scale, digits, unit = form(figure)
    around = "" if spread is None else f" ± {scale * spread:.{digits}f}"
    return f"{scale * value:{sign}.{digits}f}{around}{unit}"


def form(figure: str) -> tuple[float, int, str]:
    """(factor, digits after the point, unit) of a figure."""
    return (100.0, 1, "%") if figure.startswith("pass@1") else (1.0, 4, "")


def markdown(comparison: Comparison) -> str:
    """The table, what it means, and the notes."""
    head, *rows = ("| " + " | ".join(row) + " |" for row in table(comparison))
    lines = [head, "| " + " | ".join(["---"] * len(HEAD)) + " |", *rows, "", summary(comparison), "", EXPLANATION]
    return "\n".join([*lines, *(f"\n{note}" for note in comparison.notes), ""])


def summary(comparison: Comparison) -> str:
    """What was compared: tokens, runs, device, and what MaxVio is a mean of."""
    seeds = sorted({seed for variant in comparison.variants for seed in variant.runs})
    found = {str((run.about.get("machine") or {}).get("device", "unknown")) for run in comparison.runs}
    devices = ", ".join(sorted(found))
    return (
        f"{len(comparison.runs)} runs, seeds {', '.join(map(str, seeds))}, after {comparison.tokens:,} tokens, on {devices}. MaxVio: mean "
        f"over the last {LAST:.0%} of the steps and the MoE blocks that all runs have."
    )


def drawing(comparison: Comparison) -> Figure:
    """A panel a figure: the mean over seeds by tokens, and a band from the least to the greatest; legends have the signs."""
    names = list(dict.fromkeys(line.figure for line in comparison.lines))
    labels = {(line.figure, line.variant): label(line) for line in comparison.lines}
    bands = -(-len(names) // COLUMNS)
    figure = Figure((4.6 * min(COLUMNS, len(names)), 3.4 * bands), layout="constrained")
    for number, name in enumerate(names, 1):
        axes = tokens_axis(figure.add_subplot(bands, min(COLUMNS, len(names)), number))
        axes.set_title(f"{shorten(name)} {form(name)[2]}".strip())
        for index, variant in enumerate(comparison.variants):
            colour = COLOURS[SERIES[index % len(SERIES)]][0]
            tokens, values = course(variant, name, comparison)
            axes.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            marker = None if name == "MaxVio" else "o"
            named = labels[name, variant.name]
            axes.plot(tokens, values.mean(0), color=colour, marker=marker, markersize=4, label=named)
        axes.legend(fontsize=8)
    return figure


def label(line: Line) -> str:
    """A variant's name in a legend, with the report's sign and whether it shows."""
    said = f" (report: {WORDS[line.finding.sign]}; here: {line.reproduces})" if line.finding else ""
    return shorten(line.variant) + said


def course(variant: Variant, name: str, comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """(tokens `[points]`, one figure `[seeds, points]`) of the points that all seeds have, up to where runs are compared."""
    found: list[dict[int, float]] = []
    for run in variant.runs.values():
        if name == "MaxVio":
            found.append(
                {
                    row["tokens"]: float(np.mean([row["max_vio"][b] for b in sorted(comparison.blocks)]))
                    for row in run.metrics
                }
            )
        else:
            each = ((row["tokens"], evaluated(row)) for row in run.evaluations if row["tokens"])
            found.append({tokens: values[name] for tokens, values in each if name in values})
    common = sorted(tokens for tokens in set.intersection(*map(set, found)) if tokens <= comparison.tokens)
    scale = form(name)[0]
    values = scale * finite(np.array([[each[tokens] for tokens in common] for each in found]))
    if name != "MaxVio":
        return np.array(common, dtype=float), values
    return binned(np.array(common, dtype=float), 60)[0], np.stack([binned(each, 60)[0] for each in values])
