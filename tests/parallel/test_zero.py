"""Shares without processes: what one rank of several would have."""

import torch

from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.zero import Shares, as_rows
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
