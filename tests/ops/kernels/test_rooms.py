"""The kernels of rooms, and SwiGLU in them, interpreted in float32."""

import pytest
import torch

from dsv3.ops.rooms import assign_reference, room_for
from dsv3.ops.swiglu import activation, rows_reference
from dsv3.ops.tiles import dequantize_reference, empty_tiles
from tests.ops.kernels.test_tiles import matrix, same, unrounded
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import rooms as kernels
from dsv3.ops.kernels import swiglu
from dsv3.ops.tiles import Tiles


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (1, 8, 40), (33, 3, 7), (128, 2, 256)])
def test_places_are_the_references(tokens, k, experts):
    expert = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    weight, room = torch.rand(tokens, k), room_for(tokens)
    row, weight_of_row, counts = kernels.assign(expert, weight, experts, room)
    expected = assign_reference(expert, weight, experts, room)
    assert torch.equal(row, expected[0])
    assert torch.equal(weight_of_row[row], weight)
    assert torch.equal(counts, expected[2])
    assert (row.dtype, counts.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("config", [(8, 4), (2, 1)])
@pytest.mark.parametrize("shape", [(1, 128), (17, 1300), (5, 260)])
def test_rows_are_quantised_and_written_to_all_their_places(shape, config):
    x, experts = matrix(shape), 6
    expert = torch.stack([torch.randperm(experts)[:3] for _ in range(len(x))])
    room = room_for(len(x))
    row = assign_reference(expert, torch.ones(expert.shape), experts, room)[0]
    found = kernels.quantize(inside(x), row, experts * room, torch.float32, config)
    for k in range(3):
        placed = empty_tiles(*shape, x.device).scale.copy_(found.scale[row[:, k]])
        same(Tiles(found.values[row[:, k]], placed), unrounded(x))


@pytest.mark.parametrize("counts", [[5, 0, 16], [0, 0, 1], [32, 17, 15]])
def test_swiglu_touches_the_rows_in_use_alone(counts):
    room, columns = 32 if max(counts) > 16 else 16, 130
    gate_up, weight = torch.randn(3 * room, 2 * columns) * 4, torch.rand(3 * room)
    used = torch.cat([torch.arange(room) < count for count in counts])
    gate_up[~used], weight[~used] = torch.nan, torch.nan
    tiles = empty_tiles(3 * room, columns, gate_up.device, torch.float32)
    tiles.values.fill_(7.0)
    tiles.scale.fill_(7.0)
    swiglu.quantise(inside(gate_up), weight, tiles, False, torch.tensor(counts))
    expected = activation(gate_up[used], weight[used])
    found = Tiles(tiles.values[used], tiles.scale[used])
    torch.testing.assert_close(found.scale, rows_reference(expected).scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(dequantize_reference(found, torch.float32), expected, rtol=1e-5, atol=1e-30)
    assert (tiles.values[~used] == 7).all()
    assert (tiles.scale[~used] == 7).all()
