"""Shares without processes: what one rank of several would have."""

import pytest
import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cast import gradient_dtype
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.zero import Shares, as_rows
from dsv3.precision.deferred import WeightGradients
from dsv3.weights.parts import Place, regions


def test_shares_of_all_ranks_are_the_parameter_in_order_and_views_of_it():
    model = DeepSeekV3(ModelConfig.preset("debug")).initialize()
    ranks = []
    for rank in range(3):
        mesh = Mesh(data=Group("data", (0, 1, 2), rank), expert_data=Group("expert_data", (0, 1, 2), rank))
        ranks.append(Shares(model, mesh))
    for name, parameter in model.named_parameters():
        found = torch.cat([each.own[name].detach() for each in ranks])
        assert torch.equal(found, as_rows(parameter.detach()))
        starts = [each.place(name).first for each in ranks]
        assert starts == sorted(starts)
    ranks[1].own["lm_head.weight"].data.zero_()
    rows = len(model.lm_head.weight)
    assert not model.lm_head.weight[-(-rows // 3)].any()


def narrowed(rank, model):
    mesh = Mesh(data=Group("data", (0, 1, 2), rank), expert_data=Group("expert_data", (0, 1, 2), rank))
    return Shares(model, mesh)


def test_matrices_are_in_bf16_and_their_masters_in_shares():
    config = ModelConfig.preset("debug", num_nextn_predict_layers=1)
    wide, models = DeepSeekV3(config).initialize(), [DeepSeekV3(config, torch.bfloat16).initialize() for _ in range(3)]
    ranks = [narrowed(rank, model) for rank, model in enumerate(models)]
    whole = dict(wide.named_parameters())
    for name, parameter in models[0].named_parameters():
        found = torch.cat(
            [each.masters(each.parameters)[name].detach() for each in ranks][: 3 if name in ranks[0].narrow else 1]
        )
        assert torch.equal(as_rows(found), as_rows(whole[name].detach()))
        assert torch.equal(parameter, whole[name].to(parameter.dtype))
        in_fp32 = parameter.dim() == 1 or name.endswith("mlp.gate.weight")
        assert (parameter.dtype, gradient_dtype(parameter)) == (
            torch.float32 if in_fp32 else torch.bfloat16,
            torch.float32,
        )
    master = ranks[1].own["lm_head.weight"]
    assert master.untyped_storage().nbytes() == 4 * master.numel()


def test_other_values_reach_the_master_and_the_weight():
    model = DeepSeekV3(ModelConfig.preset("debug"), torch.bfloat16).initialize()
    shares, name = narrowed(1, model), "layers.1.mlp.experts.down_proj"
    whole = torch.randn(model.get_parameter(name).shape)
    shares.put(name, whole)
    assert torch.equal(model.get_parameter(name), whole.bfloat16())
    place = shares.place(name)
    assert place.shape == whole.shape
    assert torch.equal(shares.own[name], as_rows(whole)[place.first :][: len(shares.own[name])])


def test_what_is_not_shared_stays_in_fp32():
    config = ModelConfig.preset("debug")
    alone = DeepSeekV3(config, torch.bfloat16).initialize()
    assert not Shares(alone, Mesh()).narrow
    with_experts_apart = DeepSeekV3(config, torch.bfloat16).initialize()
    shares = Shares(with_experts_apart, Mesh(data=Group("data", (0, 1), 0)))
    assert shares.narrow
    assert not any(".mlp.experts." in name for name in shares.narrow)
    assert not narrowed(0, DeepSeekV3(config, torch.float32).initialize()).narrow
    for model in (alone, with_experts_apart):
        assert all(each.dtype == torch.float32 for each in model.held_experts())


@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_are_those_of_fp32_weights(deferred):
    """Of two micro-batches, tokens that are there often included."""
    config = ModelConfig.preset("debug", num_nextn_predict_layers=1)
    models = [DeepSeekV3(config, torch.bfloat16).initialize("fan_in") for _ in range(2)]
    narrowed(0, models[0])
    tokens = torch.arange(132).view(2, 66) % 7
    for model in models:
        if deferred:
            model.defer_weight_gradients(WeightGradients())
        for rows in tokens:
            model.loss(rows[None], mtp_weight=0.3, balance_alpha=0.01).total.backward()
    narrow, wide = (dict(each.named_parameters()) for each in models)
    for name, parameter in wide.items():
        assert narrow[name].grad.dtype == torch.float32
        assert torch.equal(narrow[name].grad, parameter.grad), name


def test_rows_of_a_stack_are_boxes_within_its_matrices():
    whole = torch.arange(4 * 5 * 3).view(4, 5, 3)
    rows, place = whole.view(20, 3)[3:17], Place((4, 5, 3), 3)
    found = list(regions("x", rows, place))
    assert [region.start for region, _ in found] == [(0, 3, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert [region.size for region, _ in found] == [(1, 2, 3), (1, 5, 3), (1, 5, 3), (1, 2, 3)]
    for (_, (e, row, _), (_, count, _)), values in found:
        assert torch.equal(values[0], whole[e, row : row + count])


def test_a_gain_a_scalar_and_nothing():
    assert [region for region, _ in regions("g", torch.ones(2), Place((5,), 3))] == [("g", (3,), (2,))]
    assert [region for region, _ in regions("s", torch.ones(()), Place(()))] == [("s", (), ())]
    assert list(regions("n", torch.ones(0), Place((5,), 5))) == []
