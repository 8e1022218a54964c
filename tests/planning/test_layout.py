import pytest

from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cast import gradient_dtype
from dsv3.parallel.dispatch import ExpertParallel
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.planning.layout import holdings
from dsv3.recipe.schema import Recipe
from dsv3.training.device import COMPUTE_DTYPES
from dsv3.training.optimizer import Optimizer

CONTENT = {
    "model": {"preset": "debug"},
    "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": 32},
    "schedule": {"learning_rate": 1e-3, "batch_size": 8},
    "training": {"tokens": 1000},
}


def test_layers_are_written_as_runs():
    recipe = Recipe.from_dict(
        CONTENT | {"model": {"preset": "tiny", "num_hidden_layers": 8}},
        ["parallel.pipeline=2", "training.micro_batch_size=1", "parallel.schedule=dual_pipe_v"],
    )
    first, second = holdings(recipe)
    assert (first.ranks, second.ranks) == (range(0, 1), range(1, 2))
    assert [first.layers, second.layers] == ["0-2 7 mtp.0", "3-6"]


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize(("precision", "kind"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")])
def test_the_table_is_what_a_rank_holds(data, expert, precision, kind):
    overrides = [f"parallel.data={data}", f"parallel.expert={expert}", "optimizer.moments=bf16"]
    overrides += [f"training.precision={precision}", f"optimizer.kind={kind}"]
    recipe = Recipe.from_dict(CONTENT, overrides)
    expected = holdings(recipe)
    assert sorted(rank for each in expected for rank in each.ranks) == list(range(data))
    for rank, holding in ((rank, each) for each in expected for rank in each.ranks):
        mesh = Mesh(
            data=Group("data", tuple(range(data)), rank),
            expert=Group("expert", tuple(range(expert)), rank % expert),
            expert_data=Group("expert_data", tuple(range(data // expert)), rank // expert),
        )
        model = DeepSeekV3(recipe.model.config(), COMPUTE_DTYPES[precision], ExpertParallel(mesh))
        assert sum(each.numel() for each in model.parameters()) == holding.parameters
        assert {tuple(held) for held in model.held_experts().values()} == {tuple(holding.experts)}
        optimizer = Optimizer(model, recipe.optimizer, mesh=mesh)
        if kind == "adamw":
            moments = sum(each.nbytes for each in optimizer.tensors().values() if each.dim())
            assert moments == pytest.approx(holding.moments, rel=0.05)
        masters = sum(optimizer.shares.own[name].nbytes for name in optimizer.shares.narrow)
        assert sum(each.nbytes for each in model.parameters()) == holding.weights - 4 * holding.masters
        assert masters == pytest.approx(4 * holding.masters, rel=0.1)
        gradients = sum(gradient_dtype(each).itemsize * each.numel() for each in model.parameters())
        assert gradients == holding.gradients
