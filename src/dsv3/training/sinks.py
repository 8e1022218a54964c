"""Services that a recipe may send its figures to: Weights & Biases, trackio. Neither is part of dsv3."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dsv3.errors import UserError
from dsv3.recipe.schema import LoggingSection


class Sink:
    """A run at one service; both have the same four calls."""

    def __init__(self, package: str, project: str, name: str, recipe: dict[str, Any]):
        self.module = import_module(package)
        self.module.init(project=project, name=name, config=recipe)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Sends the figures of a step."""
        self.module.log(figures, step=step)

    def close(self) -> None:
        """Sends what is left."""
        self.module.finish()


def check_sinks(section: LoggingSection) -> None:
    """Raises `UserError` for a service whose package is not installed."""
    for package in section.sinks:
        if find_spec(package) is None:
            raise UserError(
                f"logging.sinks names {package!r}, which is not installed: pip install {package}, or take it off the list; "
                "metrics.jsonl and TensorBoard are written in any case"
            )


def open_sinks(section: LoggingSection, name: str, recipe: dict[str, Any]) -> list[Sink]:
    """A run at every service that the recipe asks for."""
    return [Sink(package, section.project, name, recipe) for package in section.sinks]
