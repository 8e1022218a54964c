"""Services that a recipe may send its figures to: Weights & Biases, trackio. Neither is part of dsv3."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dsv3.errors import UserError
from dsv3.recipe.schema import LoggingSection


def check_sinks(section: LoggingSection) -> None:
    """Raises `UserError` for a service whose package is not installed."""
    for package in section.sinks:
        if find_spec(package) is None:
            raise UserError(
                f"logging.sinks names {package!r}, which is not installed: pip install {package}, or take it off the list; "
                "metrics.jsonl and TensorBoard are written in any case"
            )


def open_sinks(section: LoggingSection, name: str, recipe: dict[str, Any]) -> list[Any]:
    """Begins a run at every service that the recipe asks for; their modules, which all have `log(figures, step=)` and `finish()`."""
    sinks: list[Any] = [import_module(package) for package in section.sinks]
    for sink in sinks:
        sink.init(project=section.project, name=name, config=recipe)
    return sinks
