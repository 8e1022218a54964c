"""The kernel's BF16 moments and FP32 weights against the reference twin on the GPU."""

import pytest
import torch

from dsv3.ops import adamw as operation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETTING = (3e-3, (0.9, 0.95), 1e-8, 0.1)


@pytest.mark.parametrize("shape", [(1,), (1000, 300), (3, 5000, 129)])
def test_kernel(shape: tuple[int, ...]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight, grad, first, second = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
    tensors = weight, grad * 1e-3, (first * 1e-4).bfloat16(), (second.square() * 1e-7).bfloat16()
    twin = tuple(each.clone() for each in tensors)
    for number in range(1, 4):
        scalars = [torch.tensor(each, device="cuda") for each in (float(number), 1.0, 2.5)]
        operation.adamw(*tensors, *scalars, *SETTING)
        operation.reference(*twin, *scalars, *SETTING)
    assert operation.triton_serves(*tensors, *scalars, *SETTING) is None
    torch.testing.assert_close(tensors[0], twin[0], rtol=1e-4, atol=2e-5)
    for found, expected in zip(tensors[2:], twin[2:], strict=True):
        # One step of BF16 where the sums are rounded differently, of the largest where they cancel out.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-9 * float(expected.abs().max()))


def test_nothing_changes_where_a_step_is_not_kept() -> None:
    tensors = [torch.randn(300, device="cuda").to(dtype) for dtype in [torch.float32] * 2 + [torch.bfloat16] * 2]
    tensors[1][5] = torch.nan
    before = [each.clone() for each in tensors]
    zero = torch.zeros((), device="cuda")
    operation.adamw(*tensors, zero, zero, zero, *SETTING)
    assert all(torch.equal(tensors[i], before[i]) for i in (0, 2, 3))
