"""Stages of a job of many ranks: the first rank runs all, and the others join it in those that are `together`."""

from collections.abc import Sequence
from dataclasses import replace

from dsv3.errors import RunError, UserError
from dsv3.parallel.mesh import Mesh
from dsv3.stages.context import RunContext
from dsv3.stages.runner import Stage, run_stages


def run_together(stages: Sequence[Stage], context: RunContext, *, replace_changed: bool) -> None:
    """`run_stages` on every rank of the mesh: a stage that is `together` runs on all, any other on the first rank, whose errors
    all ranks raise."""
    mesh = context.mesh
    if not mesh.first:
        follow(stages, mesh)
        return
    apart = True

    def joined(stage: Stage) -> Stage:
        def run() -> None:
            nonlocal apart
            mesh.world.objects(stage.name)
            apart = False
            stage.run()
            apart = True

        return replace(stage, run=run) if stage.together else stage

    try:
        together = [joined(stage) for stage in stages]
        run_stages(together, context.out, context.note, replace=replace_changed, allow=context.allow)
    except (UserError, RunError, OSError) as error:
        if apart:  # else the others are in the stage as well, and have failed with it or wait in vain
            mesh.world.objects(error)
        raise
    mesh.world.objects(None)


def follow(stages: Sequence[Stage], mesh: Mesh) -> None:
    """Runs the stages that the first rank announces, until it sends None (the end) or an error."""
    by_name = {stage.name: stage for stage in stages}
    mesh.activity.begin("waiting for rank 0")
    while (said := mesh.world.objects(None)[0]) is not None:
        if not isinstance(said, str):
            raise said
        by_name[said].run()
        mesh.activity.begin("waiting for rank 0")
