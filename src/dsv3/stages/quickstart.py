"""Everything, small, on this machine: the stages of pre-training, then a page that shows what came of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3.parallel.mesh import Mesh
from dsv3.recipe.schema import Recipe
from dsv3.stages.pretrain import pretraining_stages
from dsv3.stages.runner import Stage
from dsv3.training.trainer import Progress


def quickstart_stages(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    note: Callable[[str], None],
    allow: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> list[Stage]:
    """From text to `out/report.html`; `allow` as for `pretraining_stages`."""
    page = out / "report.html"

    def draw() -> None:
        from dsv3.stages.report import write_report  # brings in Matplotlib, which other runs do not need

        write_report(out, page)

    report = Stage("report", {}, page, draw)
    return [*pretraining_stages(recipe, out, progress, note, allow, mesh), report]
