"""Everything, small, on this machine: the stages of pre-training, then a page that shows what came of it."""

from dsv3.stages.context import RunContext
from dsv3.stages.pretrain import pretraining_stages
from dsv3.stages.runner import Stage


def quickstart_stages(context: RunContext) -> list[Stage]:
    """From text to `out/report.html`."""
    page = context.out / "report.html"

    def draw() -> None:
        from dsv3.stages.report import write_report  # brings in Matplotlib, which other runs do not need

        write_report(context.out, page)

    return [*pretraining_stages(context), Stage("report", {}, page, draw, needs=("pretrain",))]
