"""The kernels of FP8 products, interpreted, with FP32 in place of E4M3: indices, masks, padding, who computes what."""

import pytest
import torch

from dsv3.ops.gemm_fp8 import columns_reference, columns_triton, prepared_scale, triton
from dsv3.ops.gemm_fp8 import reference as gemm_reference
from dsv3.ops.grouped_gemm_fp8 import masked_reference, reference, wgrad_reference
from dsv3.ops.kernels.product import Config
from dsv3.ops.tiles import Tiles
from tests.ops.products import wide_blocks, wide_tiles

contiguous = pytest.importorskip("dsv3.ops.kernels.grouped_gemm_fp8").contiguous
masked = pytest.importorskip("dsv3.ops.kernels.grouped_gemm_fp8_masked").masked
wgrad = pytest.importorskip("dsv3.ops.kernels.grouped_wgrad_fp8").wgrad
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; see tests/gpu"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
WIDE = torch.float32


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [[130, 0, 100, 1], [0, 0, 0, 0], [0, 257, 0, 0], [64, 64, 64, 65]])
@pytest.mark.parametrize("config", [Config(64, 64, 4, 2, 2), Config(128, 128, 8, 3, 8)])
def test_contiguous(counts, config):
    x, (weight, scale) = wide_tiles(257, 140), wide_blocks(4, 200, 140)
    counts = torch.tensor(counts, dtype=torch.int32)
    x.values[int(counts.sum()) :] = torch.nan
    x.scale[int(counts.sum()) :] = torch.nan
    found = contiguous(x, weight, scale, counts, WIDE, config=config)
    close(found, reference(x, weight, scale, counts, WIDE))


def test_contiguous_on_one_multiprocessor_and_with_a_prepared_scale():
    x, (weight, scale) = wide_tiles(50, 272), wide_blocks(2, 136, 272)
    counts = torch.tensor([20, 30])
    expected = reference(x, weight, scale, counts, WIDE)
    close(contiguous(x, weight, prepared_scale(scale), counts, WIDE, num_sms=1), expected)


@pytest.mark.parametrize("rows", [0, 1, 130])
def test_one_group_is_the_dense_product(rows):
    x, (weight, scale) = wide_tiles(rows, 132), wide_blocks(30, 132)
    close(triton(x, weight, scale, WIDE), gemm_reference(x, weight, scale, WIDE))


def test_a_product_added_to_a_sum_is_that_sum():
    """Given back as another view of it, it would be added to it once more (`precision.deferred`)."""
    grad, x = wide_tiles(30, 200), wide_tiles(40, 200)
    total = torch.ones(30, 40)
    assert columns_triton(grad, x, out=total) is total
    close(total, 1 + columns_reference(grad, x))


@pytest.mark.parametrize(("room", "counts"), [(1, [1, 0, 1]), (20, [20, 3, 0]), (130, [130, 64, 65])])
def test_masked(room, counts):
    x, (weight, scale) = wide_tiles(3 * room, 140), wide_blocks(3, 200, 140)
    for e, count in enumerate(counts):
        x.values[e * room + count : (e + 1) * room] = torch.nan
        x.scale[e * room + count : (e + 1) * room] = torch.nan
    counts = torch.tensor(counts)
    found = masked(x, weight, scale, counts, room, WIDE)
    expected = masked_reference(x, weight, scale, counts, room, WIDE)
    for e, count in enumerate(counts.tolist()):
        close(found[e, :count], expected[e, :count])


@pytest.mark.parametrize("counts", [[128, 0, 256], [0, 0, 0], [384, 0, 0]])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(counts, accumulate):
    grad, x = wide_tiles(150, 384, 0), wide_tiles(200, 384, 1)
    counts = torch.tensor(counts)
    poisoned = [Tiles(side.values.clone(), side.scale.clone()) for side in (grad, x)]
    for side in poisoned:
        side.values[:, int(counts.sum()) :] = torch.nan
    out = torch.randn(3, 150, 200, generator=torch.Generator().manual_seed(2)) if accumulate else None
    expected = wgrad_reference(grad, x, counts, None if out is None else out.clone())
    close(wgrad(*poisoned, counts, out), expected)


def test_wgrad_of_no_tokens():
    grad, x = wide_tiles(8, 0), wide_tiles(16, 0)
    assert torch.equal(wgrad(grad, x, torch.tensor([0, 0])), torch.zeros(2, 8, 16))


def test_one_group_is_the_dense_product_of_columns():
    a, b = wide_tiles(20, 300, 0), wide_tiles(140, 300, 1)
    close(columns_triton(a, b), columns_reference(a, b))
