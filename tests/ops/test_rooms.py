import pytest
import torch

from dsv3.ops.permute import count_by_expert
from dsv3.ops.rooms import assign_rooms, quantize_to_rooms, room_for
from dsv3.ops.swiglu import swiglu_tiles
from dsv3.ops.tiles import dequantize_rows, quantize_rows

CHOICES = {
    "any": lambda: torch.stack([torch.randperm(9)[:3] for _ in range(13)]),
    "one token": lambda: torch.tensor([[7, 0, 3]]),
    "all on the same": lambda: torch.tensor([[5, 1, 8]] * 16),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_token_has_a_row_with_each_of_its_experts(choice):
    expert = CHOICES[choice]()
    weight, x, room = torch.rand(expert.shape), torch.randn(len(expert), 260), room_for(len(expert))
    assert room >= len(expert)
    assert room % 16 == 0
    row, weight_of_row, counts = assign_rooms(expert, weight, 9, room)
    assert torch.equal(row // room, expert)
    assert torch.equal(counts, count_by_expert(expert.flatten(), 9))
    for e in range(9):
        # In the order of tokens, from the room's first row on.
        assert (
            sorted(row[expert == e].tolist()) == row[expert == e].tolist() == [e * room + n for n in range(counts[e])]
        )
    assert torch.equal(weight_of_row[row], weight)
    placed, tiles = quantize_to_rooms(x, row, 9 * room), quantize_rows(x)
    assert placed.scale.stride() == (1, 9 * room)
    for k in range(3):
        assert torch.equal(placed.values.view(torch.uint8)[row[:, k]], tiles.values.view(torch.uint8))
        assert torch.equal(placed.scale[row[:, k]], tiles.scale)


def test_swiglu_in_rooms_is_that_of_the_rows_in_use():
    gate_up, weight, counts = torch.randn(3 * 16, 300), torch.rand(3 * 16), torch.tensor([5, 0, 16])
    whole, found = (dequantize_rows(swiglu_tiles(gate_up, weight, counts_E=each)) for each in (None, counts))
    for e, count in enumerate(counts.tolist()):
        assert torch.equal(found[16 * e : 16 * e + count], whole[16 * e : 16 * e + count])
