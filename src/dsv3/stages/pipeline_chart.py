"""A pipeline schedule as a picture: a row a rank, time to the right, a box a pass, coloured by what it computes."""

from collections.abc import Iterator

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3.parallel.pipeline.instructions import Backward, Chunk, Forward, InputGradient, Overlapped, WeightGradient
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.simulator import Span, Timeline
from dsv3.stages.drawing import COLOURS, WHOLE

KINDS: dict[type[Chunk], tuple[str, str]] = {
    Forward: ("blue", "forward"),
    Backward: ("green", "backward"),
    InputGradient: ("amber", "backward, input alone"),
    WeightGradient: ("violet", "backward, weights alone"),
}
SECOND = 0.55
"""How much of its colour a rank's second stage has."""
NARROW = 0.006
"""Share of the picture's width below which a box gets no number."""


def draw_schedule(schedule: Schedule, timeline: Timeline) -> Figure:
    """Boxes carry the micro-batch's number; those of an overlapped pair lie above each other, the forward pass on top."""
    figure = Figure((WHOLE, 1.3 + 0.42 * schedule.ranks), layout="constrained")
    axes = figure.add_subplot()
    boxes: dict[tuple[type[Chunk], bool], list[list[tuple[float, float]]]] = {}
    for rank, spans in enumerate(timeline.spans):
        lowest = schedule.placement[rank][0]
        for span in spans:
            for each, low, high in parts(span):
                top, bottom = rank - 0.45 + 0.9 * low, rank - 0.45 + 0.9 * high
                second = each.stage != lowest
                corners = [(span.start, top), (span.end, top), (span.end, bottom), (span.start, bottom)]
                boxes.setdefault((type(each), second), []).append(corners)
                if span.end - span.start > NARROW * timeline.total:
                    size, colour = 8 if high - low == 1 else 6, COLOURS["ink"][0] if second else "white"
                    middle = (span.start + span.end) / 2, (top + bottom) / 2
                    axes.text(
                        *middle, str(each.micro_batch), ha="center", va="center_baseline", size=size, color=colour
                    )
    for (kind, second), polygons in boxes.items():
        colour = shade(KINDS[kind][0], second)
        axes.add_collection(PolyCollection(polygons, facecolors=colour, edgecolors="white", linewidths=0.5))
    axes.set_xlim(0, timeline.total)
    axes.set_ylim(schedule.ranks - 0.4, -0.6)
    axes.set_yticks(range(schedule.ranks))
    axes.set_ylabel("rank")
    axes.set_xlabel("time")
    axes.grid(False)
    twice = any(second for _, second in boxes)
    axes.legend(
        handles=[
            Patch(color=shade(colour, second), label=f"{text}, second stage" if second else text)
            for second in (False, True)[: 1 + twice]
            for kind, (colour, text) in KINDS.items()
            if (kind, second) in boxes
        ],
        ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
    )  # fmt: skip
    return figure


def parts(span: Span) -> Iterator[tuple[Chunk, float, float]]:
    """The passes of an instruction with their part of its row's height."""
    if isinstance(span.instruction, Overlapped):
        yield span.instruction.forward, 0.0, 0.5
        yield span.instruction.backward, 0.5, 1.0
    else:
        yield span.instruction, 0.0, 1.0


def shade(name: str, second: bool) -> str:
    """A colour, or its paler form, as `#rrggbb`."""
    code = COLOURS[name][0]
    mixed = (int(code[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - each) * (SECOND if second else 1)):02x}" for each in mixed)
