"""The figures of the report page: functions of the rows of a run's records. Absent values are gaps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3.stages.drawing import (
    COLOURS,
    HALF,
    HUMAN,
    SERIES,
    WHOLE,
    colour_bar,
    column,
    finite,
    over_tokens,
    shorten,
    tokens_axis,
    trace,
)
from dsv3.stages.run_directory import Row

BLUE, RED = (0.10, 0.40, 0.80), (0.85, 0.20, 0.18)
LOAD = LinearSegmentedColormap.from_list(
    "load", [(0.0, (*BLUE, 1.0)), (0.5, (*BLUE, 0.0)), (0.5, (*RED, 0.0)), (1.0, (*RED, 1.0))]
)
"""Below the mean blue, above it red, at the mean transparent: the page's own background, light or dark."""

FOUND = LinearSegmentedColormap.from_list("found", ["#d8433f", "#f2d27a", "#1b9e6b"])
"""Never found, in half of the trials, always."""


def loss(rows: Sequence[Row]) -> Figure:
    """Training loss of the main model and of each MTP module, nats a token, over tokens."""
    figure, axes = over_tokens(3.6)
    trace(axes, rows, column(rows, "loss"), "blue", "main model")
    depth = max((len(row.get("mtp_losses") or ()) for row in rows), default=0)
    for k in range(depth):
        values = np.array([(row.get("mtp_losses") or [np.nan] * depth)[k] for row in rows], dtype=float)
        trace(axes, rows, values, SERIES[1 + k % (len(SERIES) - 1)], f"MTP module {k}")
    axes.set_ylabel("nats a token")
    axes.legend()
    return figure


def bits_per_byte(rows: Sequence[Row]) -> Figure:
    """Held-out bits per byte of every source over tokens; each end is labelled with its value."""
    figure, axes = over_tokens(3.6)
    names = list(dict.fromkeys(name for row in rows for name in row["bits_per_byte"]))
    for number, name in enumerate(names):
        points = [(row["tokens"], row["bits_per_byte"][name]) for row in rows if name in row["bits_per_byte"]]
        colour = COLOURS[SERIES[number % len(SERIES)]][0]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=shorten(name))
        axes.annotate(f"{points[-1][1]:.2f}", points[-1], (6, 0), textcoords="offset points", va="center")
    axes.margins(x=0.08, y=0.12)
    axes.set_ylabel("bits per byte")
    axes.legend()
    return figure


def pass_at_1(rows: Sequence[Row]) -> Figure:
    """Share of tasks solved at the first try, percent, over tokens, with its 95% Wilson interval."""
    figure, axes = over_tokens(3.0)
    for number, task in enumerate(dict.fromkeys(task for row in rows for task in row["pass_at_1"])):
        scores = [(row["tokens"], row["pass_at_1"][task]) for row in rows if task in row["pass_at_1"]]
        tokens = np.array([at for at, _ in scores], dtype=float)
        share = np.array([100 * score["passed"] / score["total"] for _, score in scores])
        low, high = 100 * np.array([wilson(score["passed"], score["total"]) for _, score in scores]).T
        axes.errorbar(
            tokens, share, np.stack([share - low, high - share]), color=COLOURS[SERIES[number % len(SERIES)]][0],
            marker="o", markersize=5, capsize=4, elinewidth=1.2, label=shorten(task),
        )  # fmt: skip
    axes.set_ylim(-4, 104)
    axes.margins(x=0.08)
    axes.set_ylabel("tasks solved, %")
    axes.legend()
    return figure


def expert_load(rows: Sequence[Row]) -> Figure:
    """One column a MoE block: a map of load over experts and tokens, and MaxVio below it. Needs a row with `load`."""
    recorded = [row for row in rows if row.get("load")]
    blocks = list(recorded[-1]["load"])
    columns = min(len(blocks), 6)
    bands = -(-len(blocks) // columns)
    figure = Figure((WHOLE, 3.9 * bands), layout="constrained")
    grid = figure.add_gridspec(2 * bands, columns, height_ratios=[2.2, 1] * bands)
    ceiling = np.nanmax([np.nanmax(nested(rows, "max_vio", block), initial=0.1) for block in blocks])
    for number, block in enumerate(blocks):
        band, at = divmod(number, columns)
        above = figure.add_subplot(grid[2 * band, at])
        image, extent = load_map(recorded, block)
        drawn = above.imshow(
            image, LOAD, vmin=0, vmax=2, aspect="auto", interpolation="none", origin="lower", extent=extent
        )
        above.set_title(f"layer {block}" if block.isdigit() else shorten(block))
        above.grid(False)
        above.tick_params(labelbottom=False)
        above.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        for side in ("top", "right"):
            above.spines[side].set_visible(True)
        below = tokens_axis(figure.add_subplot(grid[2 * band + 1, at], sharex=above))
        trace(below, rows, nested(rows, "max_vio", block), "violet")
        below.set_ylim(0, 1.05 * ceiling)
        if at == 0:
            above.set_ylabel("expert")
            below.set_ylabel("MaxVio")
    colour_bar(figure, drawn, figure.axes[::2], {0: "0", 1: "mean", 2: "2 × mean"}, shrink=0.6, aspect=30, pad=0.01)
    return figure


def needles(evaluations: Sequence[Row]) -> Figure:
    """Share of the needles found by length of the text and depth of the needle, of the last evaluation (`evaluation/needle.py`)."""
    found = evaluations[-1]["needle"]
    share = np.array(found["passed"], dtype=float).T / found["samples"]
    figure = Figure((HALF, 3.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, FOUND, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(found["lengths"])), [f"{length:,}" for length in found["lengths"]])
    axes.set_yticks(range(len(found["depths"])), [f"{depth:.0%}" for depth in found["depths"]])
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("depth of the needle")
    axes.grid(False)
    colour_bar(figure, image, [axes], {0: "0%", 0.5: "50%", 1: "100%"})
    return figure


def optimisation(rows: Sequence[Row]) -> Figure:
    """Four small panels over tokens: learning rate, gradient norm, mean bias magnitude, tokens per second."""
    magnitude = [list((row.get("bias_magnitude") or {}).values()) for row in rows]
    panels = {
        "learning rate": column(rows, "learning_rate"),
        "gradient norm before clipping": column(rows, "grad_norm"),
        "selection bias, mean magnitude": np.array([np.mean(values) if values else np.nan for values in magnitude]),
        "tokens per second": column(rows, "tokens_per_second"),
    }
    figure = Figure((WHOLE, 2.3), layout="constrained")
    for number, (title, values) in enumerate(panels.items(), 1):
        axes = tokens_axis(figure.add_subplot(1, len(panels), number))
        trace(axes, rows, values, "blue")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(HUMAN)
    return figure


def wilson(passed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval (1927) of a binomial share: both p with `(passed/total - p)^2 = z^2 p (1 - p) / total`."""
    share, weight = passed / total, z * z / total
    centre, spread = share + weight / 2, np.sqrt(weight * (share * (1 - share) + weight / 4))
    # At shares of 0 and 1 the ends touch the share; rounding must not carry them past it.
    return float(min((centre - spread) / (1 + weight), share)), float(max((centre + spread) / (1 + weight), share))


def load_map(
    rows: Sequence[Row], block: str, columns: int = 160
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Load over its mean `[experts, times]`, times evenly spaced in tokens, each the nearest row's; and imshow's extent."""
    rows = [row for row in rows if block in row["load"]]
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    load = np.array([row["load"][block] for row in rows], dtype=float)
    edges = np.linspace(tokens[0], max(tokens[-1], tokens[0] + 1), min(len(rows), columns) + 1)
    nearest = np.abs((edges[:-1] + edges[1:])[:, None] / 2 - tokens[None]).argmin(1)
    experts = load.shape[1]
    return load[nearest].T * experts, (edges[0], edges[-1], -0.5, experts - 0.5)


def nested(rows: Sequence[Row], key: str, block: str) -> np.ndarray:
    """One block's figure of every row `[rows]`."""
    return finite([(row.get(key) or {}).get(block) for row in rows])
