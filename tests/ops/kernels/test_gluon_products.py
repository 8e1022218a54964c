"""Weight gradients in Gluon, emulated: which tile, tokens, scales and stage everybody is at."""

import pytest
import torch

from dsv3.ops.grouped_gemm_fp8 import wgrad_reference
from dsv3.ops.grouped_linear import weight_gradient_reference
from dsv3.ops.tiles import rows_reference
from tests.ops.kernels.emulation import Descriptor, Pointer, run

kernels = pytest.importorskip("dsv3.ops.kernels.grouped_wgrad_fp8_gluon")
in_bf16 = pytest.importorskip("dsv3.ops.kernels.grouped_wgrad_gluon")
E4M3_NAN = 0x7F


# More steps than stages, experts without tokens, tokens behind the last; tiles that end within a half, with one, within the first.
@pytest.mark.parametrize("counts", [[128, 0, 512], [0, 0], [768]])
@pytest.mark.parametrize(("down", "across", "programs", "group"), [(150, 300, 5, 8), (400, 640, 2, 2), (64, 96, 1, 8)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(counts, down, across, programs, group, accumulate):
    generator = torch.Generator().manual_seed(0)
    grad, x = (rows_reference(torch.randn(size, 768, generator=generator)) for size in (down, across))
    shape, used = (len(counts), down, across), sum(counts)
    before = torch.randn(shape, generator=generator) if accumulate else None
    expected = wgrad_reference(grad, x, torch.tensor(counts), None if before is None else before.clone())
    for side in (grad, x):
        side.values.view(torch.uint8)[:, used:] = E4M3_NAN
        side.scale[:, used // 128 :] = torch.nan
    out = torch.full(shape, torch.nan) if before is None else before
    run(
        kernels, "wgrad_kernel", programs,
        Descriptor(grad.values, [kernels.ROWS, 128]),
        Descriptor(x.values, [kernels.COLUMNS, 128]),
        Descriptor(grad.scale.t(), [1, kernels.ROWS]),
        Descriptor(x.scale.t(), [1, kernels.COLUMNS]),
        Pointer(counts),
        Descriptor(out, [1, 64, 128]),
        *shape,
        BLOCK_N=kernels.ROWS, BLOCK_K=kernels.COLUMNS, STAGES=kernels.STAGES, GROUP=group, ACCUMULATE=accumulate,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)


# More steps than stages, one token, groups that end within 16 tokens, with 16, with a step; what lies behind them is NaN.
@pytest.mark.parametrize("counts", [[70, 0, 1, 300], [0, 0], [256], [80, 64]])
@pytest.mark.parametrize(("down", "across", "programs", "group"), [(152, 304, 5, 8), (400, 640, 2, 2), (64, 96, 1, 8)])
def test_wgrad_in_bf16(counts, down, across, programs, group):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(400, size, generator=generator).bfloat16() for size in (down, across))
    shape, used = (len(counts), down, across), sum(counts)
    grad[used:], x[used:] = torch.nan, torch.nan
    out = torch.randn(shape, generator=generator)
    expected = weight_gradient_reference(grad.float(), x.float(), torch.tensor(counts), out.clone())
    run(
        in_bf16, "add_wgrad_kernel", programs,
        Descriptor(grad, [in_bf16.TOKENS, 64]), Descriptor(x, [in_bf16.TOKENS, in_bf16.COLUMNS]),
        Pointer(counts), Descriptor(out, [1, 64, 128]), *shape,
        BLOCK_N=in_bf16.ROWS, BLOCK_K=in_bf16.COLUMNS, BLOCK_T=in_bf16.TOKENS, STAGES=in_bf16.STAGES, GROUP=group,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)
