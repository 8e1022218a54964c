import pytest
import torch

from dsv3.errors import UserError
from dsv3.parallel.mesh import Mesh, make_mesh
from dsv3.recipe.parallel import ParallelSection

NAMES = ("world", "pipeline", "data", "expert", "expert_data", "node", "rail")


def groups(section, ranks_per_node):
    mesh = make_mesh(section, ranks_per_node)
    sums = {name: float(getattr(mesh, name).sum_(torch.tensor(float(2**mesh.world.rank)))) for name in NAMES}
    return {name: getattr(mesh, name).ranks for name in NAMES}, sums


def test_every_rank_is_in_the_groups_of_its_row_column_and_node(eight_ranks):
    found = eight_ranks.run(groups, ParallelSection(pipeline=2, data=4, expert=2), 2)
    of_six, _ = found[6]
    assert of_six == {
        "world": tuple(range(8)), "pipeline": (2, 6), "data": (4, 5, 6, 7), "expert": (6, 7), "expert_data": (4, 6),
        "node": (6, 7), "rail": (6,),
    }  # fmt: skip
    for ranks, sums in found:
        assert sums == {name: float(sum(2**each for each in ranks[name])) for name in NAMES}


def test_experts_over_several_nodes_meet_on_rails(eight_ranks):
    found = eight_ranks.run(groups, ParallelSection(data=8, expert=8), 2)
    assert found[5][0]["node"] == (4, 5)
    assert found[5][0]["rail"] == (1, 3, 5, 7)


def fail_on_first(section):
    mesh = make_mesh(section, 8)

    def work():
        assert mesh.first
        raise UserError("no such recipe")

    with pytest.raises(UserError, match="no such recipe"):
        mesh.on_first(work)
    return mesh.on_first(lambda: "done")


def test_what_fails_on_the_first_rank_fails_on_all(two_ranks):
    assert two_ranks.run(fail_on_first, ParallelSection(data=2)) == ["done", "done"]


def test_alone_every_operation_is_nothing():
    mesh, x = Mesh(), torch.arange(3.0)
    assert mesh.data.sum_(x) is x
    assert torch.equal(mesh.data.gather(x), x[None])
    assert torch.equal(mesh.data.scatter_sum(x[None]), x)
    assert mesh.expert.exchange(x, [3], [3]) is x
    assert mesh.first
