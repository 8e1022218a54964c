"""The kernels of twelve bits, interpreted: half precision and integers are exact there, so they must equal the twin."""

import pytest
import torch

from dsv3.ops.e5m6 import pack_reference, unpack_reference
from tests.ops.poisoned import inside

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels import e5m6 as kernels

SHAPES = [(1, 8), (3, 120), (17, 128), (33, 304), (5, 264)]


def matrix(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, shape[0]).unsqueeze(1)
    return inside(x)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack(shape):
    x = matrix(shape)
    found, expected = kernels.pack(x), pack_reference(x)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.scale, expected.scale)
    assert found.scale.stride() == expected.scale.stride()
    assert found.columns == expected.columns


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack(shape):
    tiles = pack_reference(matrix(shape))
    assert torch.equal(kernels.unpack(tiles, torch.float32), unpack_reference(tiles, torch.float32))


def test_what_is_not_finite():
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = torch.inf, torch.nan
    found = kernels.pack(x)
    assert torch.equal(found.packed, pack_reference(x).packed)
    back = kernels.unpack(found, torch.float32)
    assert back[0, :128].isnan().all()
    assert back[1, 128:].isnan().all()
    assert (back[0, 128:] == 1).all()
