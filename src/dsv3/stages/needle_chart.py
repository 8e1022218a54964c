"""The heat map of a needle in a haystack: share of found needles by length of the text and depth of the needle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3.stages.drawing import HALF, STYLE, save, svg

FOUND = LinearSegmentedColormap.from_list("found", ["#d8433f", "#f2d27a", "#1b9e6b"])
"""Never found, in half of the trials, always."""


def draw_needle(found: Mapping[str, Any], path: Path) -> None:
    """Writes the map as a file; `UserError` where its name ends in neither .svg nor .png, or it cannot be written."""
    with matplotlib.rc_context(STYLE):
        save(heat_map(found), path)


def needle_svg(found: Mapping[str, Any]) -> str:
    """The map for a page."""
    with matplotlib.rc_context(STYLE):
        return svg(heat_map(found), "needle", "Share of needles found by length of the text and depth of the needle")


def heat_map(found: Mapping[str, Any]) -> Figure:
    """Of `lengths`, `depths`, `samples` and `passed` `[length][depth]`, as `dsv3.evaluation.needle.Haystack` has them."""
    share = np.array(found["passed"], dtype=float).T / found["samples"]
    figure = Figure((HALF, 3.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, FOUND, vmin=0, vmax=1, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(found["lengths"])), [f"{length:,}" for length in found["lengths"]])
    axes.set_yticks(range(len(found["depths"])), [f"{depth:.0%}" for depth in found["depths"]])
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("depth of the needle")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0%", "50%", "100%"])
    assert bar.solids is not None  # Filled since it was made; as 256 shapes it would show seams.
    bar.solids.set_rasterized(True)
    return figure
