"""The kernels of rooms on a GPU, to the bit."""

import pytest
import torch

from dsv3.ops.rooms import assign_reference, assign_rooms, quantize_to_rooms, room_for
from dsv3.ops.swiglu import swiglu_tiles
from dsv3.ops.tiles import quantize_rows

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of sm_90 or later"
)


@pytest.mark.parametrize("tokens", [1, 33, 128])
@pytest.mark.parametrize(("experts", "k", "columns"), [(256, 8, 7168), (16, 2, 272)])
def test_rooms(tokens, experts, k, columns):
    expert = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).sort(1).values.cuda()
    weight, room = torch.rand(tokens, k, device="cuda"), room_for(tokens)
    assert assign_rooms.explain(expert, weight, experts, room)[0] == ("triton", None)
    row, weight_of_row, counts = assign_rooms(expert, weight, experts, room)
    expected = assign_reference(expert, weight, experts, room)
    assert torch.equal(row, expected[0])
    assert torch.equal(weight_of_row[row], weight)
    assert torch.equal(counts, expected[2])
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    x[0, 130:256] = 0
    assert quantize_to_rooms.explain(x, row, experts * room)[0] == ("triton", None)
    placed, tiles = quantize_to_rooms(x, row, experts * room), quantize_rows(x)
    for of_token in row.unbind(1):
        assert torch.equal(placed.values.view(torch.uint8)[of_token], tiles.values.view(torch.uint8))
        assert torch.equal(placed.scale[of_token], tiles.scale)


@pytest.mark.parametrize("room", [16, 48])
def test_swiglu_in_rooms(room):
    counts = torch.tensor([room, 0, 1, 7], device="cuda")
    used = torch.arange(room, device="cuda") < counts.unsqueeze(1)
    gate_up, weight = torch.randn(4 * room, 512, device="cuda").bfloat16(), torch.rand(4 * room, device="cuda")
    gate_up[~used.flatten()] = torch.nan
    assert swiglu_tiles.explain(gate_up, weight, counts_E=counts)[0] == ("triton", None)
    found, whole = swiglu_tiles(gate_up, weight, counts_E=counts), swiglu_tiles(gate_up, weight)
    rows = used.flatten()
    assert torch.equal(found.values.view(torch.uint8)[rows], whole.values.view(torch.uint8)[rows])
    assert torch.equal(found.scale[rows], whole.scale[rows])
