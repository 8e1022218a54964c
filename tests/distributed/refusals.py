"""What goes wrong on one rank."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dsv3.errors import RunError, UserError
from dsv3.model.config import ModelConfig
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.launch import check_same
from dsv3.parallel.mesh import make_mesh
from dsv3.parallel.pipeline.executor import Executor
from dsv3.parallel.pipeline.layout import balanced_layout
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.parallel.watchdog import watching, whereabouts
from dsv3.recipe.parallel import ParallelSection
from dsv3.recipe.schema import Recipe
from dsv3.weights.tensor_directory import ChunkWriter
from tests.distributed.training import CONTENT, evaluate, make


def other_recipes():
    """The message where the second rank has another learning rate."""
    mesh = make_mesh(ParallelSection(data=2), 2)
    recipe = Recipe.from_dict(CONTENT, ["schedule.learning_rate=0.1"] if mesh.world.rank else [])
    with pytest.raises(UserError) as caught:
        check_same(mesh, recipe)
    check_same(mesh, Recipe.from_dict(CONTENT))
    return str(caught.value)


def hang(meeting):
    """What the first rank warns of while the second is late."""
    mesh = make_mesh(ParallelSection(data=2), 2)
    return warned(mesh, meeting, lambda: mesh.data.sum_(torch.ones(1)))


def warned(mesh, meeting, work):
    """(the warnings of this rank, where all are at the end) while the second comes two seconds late to the work of step 7."""
    store, said = dist.FileStore(meeting, 2), []
    mesh.activity.begin("step 7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.parallel.watchdog.log.warning", lambda form, *values: said.append(form % values))
        with watching(mesh, timedelta(seconds=1), store):
            if mesh.world.rank == 1:
                time.sleep(2)
            work()
    return said, whereabouts(store, 2)


def wait_in_a_pipeline(meeting):
    """What the first rank warns of while the second is late for its part of a batch."""
    mesh, config = make_mesh(ParallelSection(pipeline=2), 2), ModelConfig.preset("debug")
    executor = Executor(DeepSeekV3(config).initialize(), balanced_layout([1.0] * 3, 2, 0.0, 0.0, 1), mesh.pipeline)
    rows = MicroBatch.of(config, torch.zeros(1, 9, dtype=torch.long))

    def work():
        executor.run(make_schedule("one_f_one_b", 2, 3), [rows] * 3)

    return warned(mesh, meeting, work)


def die_while_saving(shards, directory, overrides):
    """The second rank's end is the middle of its third checkpoint."""
    trainer, write, calls = make(shards, directory, overrides, 2, evaluate=evaluate), ChunkWriter.write, []

    def written(*arguments):
        calls.append(arguments)
        if trainer.mesh.world.rank == 1 and len(calls) == 3:
            os._exit(1)
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkWriter, "write", written)
        trainer.run()


def lose():
    """What a rank says whose partner has gone."""
    mesh = make_mesh(ParallelSection(data=2), 2)
    mesh.activity.begin("step 3")
    if mesh.world.rank == 1:
        dist.destroy_process_group()
        return ""
    time.sleep(0.5)
    with pytest.raises(RunError) as caught:
        mesh.data.sum_(torch.ones(1))
    return str(caught.value)
