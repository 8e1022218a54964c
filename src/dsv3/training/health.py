"""Whether a run is well: losses and gradients that leave their usual range, and steps that had to be skipped."""

import math
import statistics
from collections import deque
from typing import Any

WINDOW = 128
"""Steps that a value is compared with."""
LEAST = 16
"""Steps before a comparison says anything."""
SPIKE = 6.0
"""Standard deviations from which on a value counts as a spike; of a normal distribution, one in a billion."""
COUNTED = 1000
"""Steps over which spikes are counted."""
SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


class Window:
    """The latest finite values of a figure."""

    def __init__(self, values: list[float] | None = None):
        self.values = deque(values or [], maxlen=WINDOW)

    def deviation(self, value: float) -> float | None:
        """How far a value lies above the window's median, in standard deviations estimated from the median absolute
        deviation, which a few spikes do not move; then it joins the window. None: too few values, or not finite.
        """
        if not math.isfinite(value):
            return None
        found = None
        if len(self.values) >= LEAST:
            middle = statistics.median(self.values)
            spread = SIGMA * statistics.median(abs(each - middle) for each in self.values)
            # Values that hardly differ would make any difference look large.
            found = (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
        self.values.append(value)
        return found


class Health:
    """Compares each step with those before it. `state` is all of its state, as JSON can hold it."""

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {}
        self.windows = {name: Window(state.get(name)) for name in ("loss", "grad_norm")}
        self.spikes: list[int] = state.get("spikes", [])
        self.skipped: int = state.get("skipped", 0)
        """Steps that were skipped, in all."""
        self.skipped_from: int | None = state.get("skipped_from")
        """The first of the steps in a row that were skipped up to now; None: the last one was not."""

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            **{name: list(window.values) for name, window in self.windows.items()},
            "spikes": self.spikes, "skipped": self.skipped, "skipped_from": self.skipped_from,
        }  # fmt: skip

    def step(self, step: int, loss: float, grad_norm: float, skipped: bool) -> dict[str, Any]:
        """The figures of one step: deviations of both values, the share of steps that were spikes, steps skipped so far."""
        deviations = {
            "loss_deviation": self.windows["loss"].deviation(loss),
            "grad_norm_deviation": self.windows["grad_norm"].deviation(grad_norm),
        }
        if skipped or any(each is not None and each > SPIKE for each in deviations.values()):
            self.spikes.append(step)
        self.spikes = [each for each in self.spikes if each > step - COUNTED]
        self.skipped += skipped
        self.skipped_from = (self.skipped_from or step) if skipped else None
        return {
            **deviations,
            "spike_score": len(self.spikes) / min(max(step, 1), COUNTED),
            "skipped_steps": self.skipped,
        }
