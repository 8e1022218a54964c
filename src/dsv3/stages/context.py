"""What all stages of a run are made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv3.parallel.mesh import Mesh
from dsv3.recipe.schema import Recipe
from dsv3.training.trainer import Progress


@dataclass(frozen=True)
class RunContext:
    """A recipe, the directory it runs in, and where progress is reported."""

    recipe: Recipe
    out: Path
    progress: Progress = lambda **_: None
    note: Callable[[str], None] = lambda _: None
    allow: Sequence[str] = ()
    """Keys of the recipe that may differ from those of a run that is continued; see `recipe/changes.py`."""
    mesh: Mesh = field(default_factory=Mesh)
