"""The kernel that writes tokens into pages, interpreted in float32, against its twin: bit by bit."""

import pytest
import torch

from dsv3.ops.latent_pages import PAGE, packed_size, reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("latent", "rotated"), [(128, 16), (384, 10)])
def test_tokens_are_written_as_the_twin_writes_them(packed, latent, rotated):
    from dsv3.ops.kernels.latent_pages import store

    size = packed_size(latent, rotated) if packed else latent + rotated
    before = torch.randint(0, 255, (3, PAGE, size)).to(torch.uint8 if packed else torch.float32)
    # The interpreter does not round: E4M3 numbers times powers of two, and numbers of BF16.
    values = (
        torch.randint(-256, 256, (9, latent)).float().to(torch.float8_e4m3fn).float()
        * 2.0 ** torch.arange(-4, 5)[:, None]
    )
    values[3] = 0
    key = torch.randn(9, rotated).to(torch.bfloat16).float()
    slots = torch.randperm(3 * PAGE)[:9]
    slots[4] = -1
    found, expected = before.clone(), before.clone()
    store(found, slots, values, key)
    reference(expected, slots, values, key)
    assert torch.equal(found, expected)
    assert (expected != before).any(-1).sum() == 8
