"""What goes wrong on one rank."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dsv3.errors import RunError, UserError
from dsv3.parallel.launch import check_same
from dsv3.parallel.mesh import make_mesh
from dsv3.parallel.watchdog import watching, whereabouts
from dsv3.recipe.parallel import ParallelSection
from dsv3.recipe.schema import Recipe
from tests.distributed.training import CONTENT


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
    mesh, said = make_mesh(ParallelSection(data=2), 2), []
    store = dist.FileStore(meeting, 2)
    mesh.activity.begin("step 7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsv3.parallel.watchdog.log.warning", lambda form, *values: said.append(form % values))
        with watching(mesh, timedelta(seconds=1), store):
            if mesh.world.rank == 1:
                time.sleep(2)
            mesh.data.sum_(torch.ones(1))
    return said, whereabouts(store, 2)


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
