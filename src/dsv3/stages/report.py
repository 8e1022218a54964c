"""The report page: one self-contained HTML file about a run, finished or going; what is absent is named on the page."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dsv3.disk import replace_file
from dsv3.errors import UserError
from dsv3.recipe.figures import duration, human
from dsv3.stages import charts
from dsv3.stages.drawing import COLOURS, svg
from dsv3.stages.run_directory import Row, Run, read_run


def write_report(run_dir: Path, out: Path) -> None:
    """Writes the page about `run_dir` to `out`, replacing it in one step; the same files give the same page.

    Raises `UserError` when `run_dir` is no run directory or `out` cannot be written.
    """
    page = render(read_run(run_dir))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another file with --out") from None


def render(run: Run) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files(__package__) / "report.html.j2").read_text("utf-8"))
    sampled = having(run.evaluations, "samples")
    found, spent = scores(run), costs(run)
    return template.render(
        run=run,
        name=run.path.resolve().name,
        verdict=" · ".join([*(map(str, found) if found else ["not evaluated yet"]), *map(str, spent[:1])]),
        tiles=[*found, *spent],
        evaluations=evaluations(run),
        state=state(run),
        figures={name: Markup(drawing) for name, drawing in draw_figures(run).items()},
        sampled=[sampled[-1], sampled[0]] if len(sampled) > 1 else sampled,
        recipe=to_toml(run.recipe),
        commands=commands(run),
        colours=COLOURS,
    )


def draw_figures(run: Run) -> dict[str, str]:
    """The drawings that the records so far allow: name -> inline SVG."""
    bits, solved, needles = (having(run.evaluations, key) for key in ("bits_per_byte", "pass_at_1", "needle"))
    loads = run.metrics if having(run.metrics, "load") else []
    drawable = {
        "loss": (charts.loss, run.metrics, "Training loss over tokens"),
        "optimisation": (charts.optimisation, run.metrics, "Learning rate, gradient norm, bias magnitude and speed"),
        "experts": (charts.expert_load, loads, "Load of every expert over tokens, and MaxVio, for every MoE block"),
        "bits": (charts.bits_per_byte, bits, "Bits per byte on held-out text over tokens"),
        "pass": (charts.pass_at_1, solved, "Share of tasks solved at the first try over tokens"),
        "needle": (charts.needles, needles, "Share of needles found by length of the text and depth of the needle"),
    }
    return {name: svg(partial(draw, rows), name, label) for name, (draw, rows, label) in drawable.items() if rows}


@dataclass(frozen=True)
class Tile:
    """A headline figure: what it is, its value by now, and the first evaluation's value where that is another."""

    what: str
    now: str
    was: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.was} → {self.now} {self.what}" if self.was else f"{self.now} {self.what}"


def scores(run: Run) -> list[Tile]:
    """Bits per byte of one source (the standard library, or the first) and the share of solved tasks."""
    tiles = []
    when = "" if run.evaluations and run.evaluations[-1]["step"] else ", before training"
    if scored := [row["bits_per_byte"] for row in having(run.evaluations, "bits_per_byte")]:
        sources = (run.recipe.get("data") or {}).get("sources") or ()
        library = next((source["name"] for source in sources if source["uri"] == "builtin:stdlib"), None)
        name = library if library in scored[-1] else next(iter(scored[-1]))
        values = [f"{row[name]:.2f}" for row in scored if name in row]
        what = f"bits per byte on held-out {'standard library' if name == library else name}{when}"
        tiles.append(Tile(what, values[-1], values[0] if len(values) > 1 else None))
    tested = [row["pass_at_1"] for row in having(run.evaluations, "pass_at_1")]
    for task in tested[-1] if tested else ():
        results = [(row[task]["passed"], row[task]["total"]) for row in tested if task in row]
        (passed, total), (low, high) = results[-1], charts.wilson(*results[-1])
        what = f"pass@1 on held-out {'combinations' if task == 'tinypy' else task}{when}"
        was = f"{results[0][0] / results[0][1]:.0%}" if len(results) > 1 else None
        tiles.append(
            Tile(what, f"{passed / total:.0%}", was, f"{passed} of {total}; 95% interval {low:.0%} to {high:.0%}")
        )
    return tiles


def evaluations(run: Run) -> list[list[str]]:
    """A table of all evaluations, its head first."""
    rows = run.evaluations
    sources = dict.fromkeys(name for row in rows for name in row.get("bits_per_byte") or ())
    tasks = dict.fromkeys(name for row in rows for name in row.get("pass_at_1") or ())
    table = [["step", "tokens", *(f"{name}, bits" for name in sources), *(f"{name}, solved" for name in tasks)]]
    for row in rows:
        bits, solved = row.get("bits_per_byte") or {}, row.get("pass_at_1") or {}
        cells = [f"{bits[name]:.3f}" if name in bits else "" for name in sources]
        cells += [f"{solved[name]['passed']} of {solved[name]['total']}" if name in solved else "" for name in tasks]
        table.append([f"{row['step']:,}", human(row["tokens"]), *cells])
    return table


def costs(run: Run) -> list[Tile]:
    """Time and tokens so far. The clock of the records runs during training steps alone."""
    if not run.metrics:
        return []
    last = run.metrics[-1]
    speed = f"{human(last['tokens'] / last['seconds'])} tokens a second"
    return [
        Tile("of training on this machine", duration(last["seconds"]), detail=speed),
        Tile("training tokens", human(last["tokens"]), detail=f"{last['step']:,} steps"),
    ]


def state(run: Run) -> str | None:
    """A sentence about a run that is not at its end; None when it is, or its end is unknown."""
    if not run.metrics:
        return "Training has not begun."
    last = run.metrics[-1]
    target = (run.recipe.get("training") or {}).get("tokens")
    step_tokens = last["tokens"] - run.metrics[-2]["tokens"] if len(run.metrics) > 1 else 0
    if target is None or last["tokens"] + step_tokens > target:
        return None
    return f"Not at its end yet: {last['tokens'] / target:.0%} of {human(target)} tokens. All figures are so far."


def commands(run: Run) -> list[tuple[str, str]]:
    """What to run next: (what it does, the command)."""
    listed = []
    if run.checkpoint:
        checkpoint = shlex.quote(str(run.checkpoint))
        listed += [
            ("Continue a text", f'dsv3 generate {checkpoint} --prompt "def read_file("'),
            ("Write with the model in the terminal", f"dsv3 chat {checkpoint}"),
        ]
    if command := run.about.get("command"):
        words = set(command.split())
        resume = " --resume" if words & {"pretrain", "extend"} and "--resume" not in words else ""
        listed.append(("Go on after an interruption", command + resume))
    listed.append(("Train on your own text", "dsv3 quickstart --data PATH..."))
    return [*listed, ("Write this page again", f"dsv3 report {shlex.quote(str(run.path))}")]


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A recipe as TOML; keys without a value become comments, for TOML has none."""
    lines, below = [], []
    for key, value in table.items():
        name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping):
            below.append(f"\n[{prefix}{name}]\n{to_toml(value, f'{prefix}{name}.')}")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            below += [f"\n[[{prefix}{name}]]\n{to_toml(item, f'{prefix}{name}.')}" for item in value]
        else:
            lines.append(
                f"# {name} is not set\n" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
            )
    return "".join(lines + below)


def having(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows with a value under `key`."""
    return [row for row in rows if row.get(key)]
