import pytest
import torch

from dsv3.bench.kernels import products

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (lambda: products.dense(CPU, "any", 136, 640), (products.DENSE_ROWS, 136)),
        (lambda: products.dense_wgrad(CPU, 136, 24), (136, 24)),
        (lambda: products.grouped(CPU, "reference", 2, 8, 136, 256), (16, 136)),
        (lambda: products.masked(CPU, 2, 3, 8, 136, 256), (2, 8, 136)),
        (lambda: products.grouped_wgrad(CPU, "reference", 2, 128, 24, 16), (2, 24, 16)),
        (lambda: products.added_wgrad(CPU, 2, 5, 24, 16), (2, 24, 16)),
    ],
)
def test_what_is_timed_is_the_product(case, shape):
    made = case()
    assert made.ours().shape == shape
    assert made.flops > 0
