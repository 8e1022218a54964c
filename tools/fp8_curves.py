"""How far FP8 training lies from BF16: the losses of runs, step by step, against the first one's.

    dsv3 ablate recipes/fp8 --seeds 0 --jobs 5 --out runs/fp8
    python -m tools.fp8_curves runs/fp8/*-seed0 --plot docs/images/fp8.svg --json docs/results/fp8-h200.json

Curves are smoothed as in the report (its figure 10: an exponential average of coefficient 0.9), the baseline first. It exits
with 1 when the run `fp8` differs by 0.25% or more from step 300 on.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure

from dsv3.errors import UserError
from dsv3.stages.drawing import COLOURS, HALF, SERIES, save
from dsv3.stages.run_directory import Run, read_run

SMOOTHING = 0.9
FROM_STEP = 300
LIMIT = 0.0025
BASELINE, PROMISED = "baseline", "fp8"
EVERY = 10
"""Steps between the points that are written."""


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--plot", type=click.Path(path_type=Path), help="Draws the curves to this .svg or .png.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Also writes every tenth point to this file."
)
def main(runs: Sequence[Path], plot: Path | None, json_path: Path | None) -> None:
    """See the module's docstring."""
    named = {path.name.rsplit("-seed", 1)[0]: read_run(path) for path in runs}
    if BASELINE not in named:
        raise click.UsageError(f"expected {BASELINE}-seed0 among the runs, and found {', '.join(named)}")
    order = [BASELINE, *sorted(set(named) - {BASELINE})]
    curves = {name: smoothed(losses(named[name])) for name in order}
    steps = {name: min(len(curve), len(curves[BASELINE])) for name, curve in curves.items()}
    errors = {name: curves[name][: steps[name]] / curves[BASELINE][: steps[name]] - 1 for name in order[1:]}
    click.echo(f"relative difference of the loss (average of {SMOOTHING}) from step {FROM_STEP} on")
    for name, error in errors.items():
        late = error[FROM_STEP - 1 :]
        click.echo(
            f"{name:22} {steps[name]:5} steps  largest {np.abs(late).max():.2%}  mean size {np.abs(late).mean():.2%}  "
            f"mean {late.mean():+.2%}  at the end {late[-1]:+.2%}  {scores(named[name])}"
        )
    click.echo(
        f"{BASELINE:22} {steps[BASELINE]:5} steps  loss at the end {curves[BASELINE][-1]:.4f}  {scores(named[BASELINE])}"
    )
    if plot is not None:
        save(lambda: draw(curves, errors), plot)
    if json_path is not None:
        json_path.write_text(json.dumps(record(named, curves, errors)) + "\n")
    worst = float(np.abs(errors[PROMISED][FROM_STEP - 1 :]).max()) if PROMISED in errors else 0.0
    if worst >= LIMIT:
        click.echo(f"missed: {PROMISED} differs by {worst:.3%}, expected less than {LIMIT:.2%}", err=True)
        sys.exit(1)


def losses(run: Run) -> np.ndarray:
    """The main loss of every step."""
    found = [row["loss"] for row in run.metrics]
    if len(found) <= FROM_STEP or None in found:
        raise UserError(
            f"{run.path}: expected more than {FROM_STEP} steps, all with a finite loss, and found {len(found)}"
        )
    return np.array(found)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The exponential average up to each value, of what has been seen by then alone."""
    total, average = 0.0, np.empty(len(values))
    for step, value in enumerate(values):
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        average[step] = total / (1 - SMOOTHING ** (step + 1))
    return average


def scores(run: Run) -> str:
    """What it was evaluated with at its end."""
    last = run.evaluations[-1] if run.evaluations and run.evaluations[-1]["step"] == len(run.metrics) else {}
    mean = np.mean(list(last["bits_per_byte"].values())) if "bits_per_byte" in last else np.nan
    return f"{mean:.4f} bits per byte" if np.isfinite(mean) else "not evaluated"


def record(named: dict[str, Run], curves: dict[str, np.ndarray], errors: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is kept of it."""
    about = named[BASELINE].about
    kept = {key: about[key] for key in ("machine", "versions") if key in about}
    points = {name: [round(float(value), 5) for value in curve[EVERY - 1 :: EVERY]] for name, curve in curves.items()}
    late = {name: np.abs(error[FROM_STEP - 1 :]) for name, error in errors.items()}
    differences = {
        name: {"steps": len(errors[name]), "largest": float(each.max()), "mean": float(each.mean())}
        for name, each in late.items()
    }
    last = {name: run.evaluations[-1] if run.evaluations else None for name, run in named.items()}
    return {
        **kept,
        "command": sys.argv,
        "every": EVERY,
        "losses": points,
        "differences": differences,
        "evaluations": last,
    }


def draw(curves: dict[str, np.ndarray], errors: dict[str, np.ndarray]) -> Figure:
    """Losses above, differences below."""
    figure = Figure((HALF, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title("training loss, nats")
    below.set_title(f"relative difference to {BASELINE}, %")
    colours = dict(zip(curves, (COLOURS[name][0] for name in SERIES), strict=False))
    for name, curve in curves.items():
        above.plot(np.arange(1, len(curve) + 1), curve, color=colours[name], label=name, linewidth=1)
    for name, error in errors.items():
        late = np.arange(FROM_STEP, len(error) + 1)
        below.plot(late, 100 * error[FROM_STEP - 1 :], color=colours[name], linewidth=1)
    for sign in (-1, 1):
        below.axhline(100 * sign * LIMIT, color=COLOURS["quiet"][0], linewidth=0.8, linestyle="--")
    above.set_ylim(top=float(np.median(curves[BASELINE][: FROM_STEP // 2])))
    above.legend(fontsize=8)
    below.set_xlabel("step")
    return figure


if __name__ == "__main__":
    main()
