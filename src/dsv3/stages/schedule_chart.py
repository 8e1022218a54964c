"""The schedules of a recipe as a picture: learning rate, batch size, MTP weight and bias update speed over tokens."""

import numpy as np
from matplotlib.figure import Figure

from dsv3.recipe.points import borders, point_at
from dsv3.recipe.schedule import Schedules
from dsv3.stages.drawing import COLOURS, HUMAN, WHOLE, tokens_axis

TITLES = {
    "learning_rate": "learning rate",
    "batch_size": "batch, sequences",
    "mtp_weight": "weight of the MTP loss",
    "bias_update_speed": "bias update speed",
}
COLUMNS = 400


def draw_schedules(schedules: Schedules, total: int) -> Figure:
    """A panel a schedule, over the whole training."""
    figure = Figure((WHOLE, 5.4), layout="constrained")
    for number, (name, title) in enumerate(TITLES.items(), 1):
        axes = tokens_axis(figure.add_subplot(2, 2, number))
        # Just before and at every border too, so that a jump is drawn upright.
        edges = [end for at in borders(getattr(schedules, name), schedules) for end in (at - 1, at) if at < total]
        tokens = np.unique([*np.linspace(0, total - 1, COLUMNS).astype(np.int64), *edges])
        values = [getattr(point_at(schedules, int(at)), name) for at in tokens]
        axes.plot(tokens, values, color=COLOURS["blue"][0], linewidth=1.5)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(HUMAN)
    return figure
