"""How the report's drawings look: colours, axes, lines of many points, and the way from a matplotlib figure to inline SVG.

Text stays text and colours are CSS variables of the page, so one drawing serves the screen, the dark screen and paper.
Drawings are passed as functions that make the figure, because matplotlib reads the style while it makes one.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv3.errors import UserError
from dsv3.recipe.figures import human
from dsv3.stages.run_directory import Row

COLOURS = {
    "ink": ("#14181f", "#eceff4"),
    "quiet": ("#5b6472", "#a3acba"),
    "line": ("#d9dde3", "#363c46"),
    "blue": ("#2a78d6", "#4a90e2"),
    "orange": ("#e0701a", "#e58a3c"),
    "green": ("#1b9e6b", "#35ad7e"),
    "violet": ("#6a4fc4", "#9a86ea"),
    "red": ("#d8433f", "#e66b66"),
    "amber": ("#b58900", "#cfa32a"),
}
"""Name -> (light, dark). Drawings are made with the light one, which becomes `var(--name)`."""

SERIES = ("blue", "orange", "green", "violet", "red", "amber")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsv3",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": COLOURS["ink"][0],
    "axes.labelcolor": COLOURS["quiet"][0],
    "axes.edgecolor": COLOURS["line"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"][0],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["quiet"][0],
    "ytick.color": COLOURS["quiet"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
HUMAN = FuncFormatter(lambda value, _: human(value))
HALF, WHOLE = 7.2, 14.8  # Inches at 72 units: a figure in half, and in the whole, of the page's width.


def svg(draw: Callable[[], Figure], name: str, label: str) -> str:
    """The drawing as an `<svg>` for an HTML page: no prolog, names of its own, sized by CSS, colours as variables."""
    buffer = io.StringIO()
    without = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with matplotlib.rc_context(STYLE):
        draw().savefig(buffer, format="svg", transparent=True, metadata=without)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None  # Matplotlib always writes one.
    body = body.replace("xlink:href=", "href=").replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = body.replace('id="', f'id="{name}-')
    for variable, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{variable})")
    return f'<svg {view[0]} role="img" aria-label="{label}">{body}'


def check_drawable(path: Path) -> None:
    """Refuses a name that no drawing can have."""
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"cannot draw {path}: expected a name that ends in .svg or .png")


def save(draw: Callable[[], Figure], path: Path) -> None:
    """The drawing as a file of its own: `.svg` or `.png`. Raises `UserError` for another ending or an unwritable path."""
    check_drawable(path)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            draw().savefig(path, dpi=144, facecolor="white", metadata=metadata)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None


def over_tokens(height: float) -> tuple[Figure, Axes]:
    """A figure of half the page's width, over training tokens."""
    figure = Figure((HALF, height), layout="constrained")
    return figure, tokens_axis(figure.add_subplot())


def trace(axes: Axes, rows: Sequence[Row], values: np.ndarray, colour: str, label: str | None = None) -> None:
    """A line through the means of neighbouring steps, and a band from their least to their greatest value."""
    tokens, shade = binned(column(rows, "tokens"))[0], COLOURS[colour][0]
    mean, least, greatest = binned(finite(values))
    axes.fill_between(tokens, least, greatest, color=shade, alpha=0.22, linewidth=0)
    axes.plot(tokens, mean, color=shade, linewidth=1.5, label=label, marker="o" if len(tokens) < 3 else None)


def binned(values: np.ndarray, bins: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum `[at most bins]` of consecutive equal shares of values `[n]`."""
    starts = np.linspace(0, len(values), min(len(values), bins), endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(values)))
    return (
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def tokens_axis(axes: Axes) -> Axes:
    """Makes x the number of training tokens."""
    axes.xaxis.set_major_formatter(HUMAN)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("tokens")
    return axes


def colour_bar(
    figure: Figure, image: AxesImage, axes: Sequence[Axes], labels: Mapping[float, str], **place: Any
) -> None:
    """A colour bar with these labels at these values; filled as one image, because 256 shapes would show seams."""
    bar = figure.colorbar(image, ax=axes, ticks=list(labels), **place)
    bar.ax.set_yticklabels(list(labels.values()))
    assert bar.solids is not None  # Filled since it was made.
    bar.solids.set_rasterized(True)


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """One figure of every row `[rows]`."""
    return finite([row.get(key) for row in rows])


def finite(values: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """FP64 values, NaN (a gap in a drawing) where they are absent or not finite."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def shorten(name: str) -> str:
    """A user's name, short enough for a legend; lone surrogates, which no font has, become "?"."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    return name if len(name) <= 28 else name[:27] + "…"
