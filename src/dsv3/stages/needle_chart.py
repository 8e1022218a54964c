"""The heat map of a needle in a haystack: share of found needles by length of the text and depth of the needle."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3.stages.drawing import HALF, colour_bar

FOUND = LinearSegmentedColormap.from_list("found", ["#d8433f", "#f2d27a", "#1b9e6b"])
"""Never found, in half of the trials, always."""


def heat_map(evaluations: Sequence[Mapping[str, Any]]) -> Figure:
    """Of the last evaluation's `needle`: the fields of `dsv3.evaluation.needle.Haystack`."""
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
