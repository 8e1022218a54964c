"""Zeros behind the last group, interpreted."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are interpreted where there is no GPU", allow_module_level=True)

from dsv3.ops.kernels.tail import clear_behind


@pytest.mark.parametrize("counts", [[0, 0, 0], [60, 0, 4], [3], [64, 65, 1], [200]])
@pytest.mark.parametrize("columns", [1, 300])
def test_rows_of_no_expert_are_cleared(counts, columns):
    out = torch.full((200, columns), torch.nan)
    used = sum(counts)
    out[:used] = torch.randn(used, columns, generator=torch.Generator().manual_seed(0))
    kept = out[:used].clone()
    assert clear_behind(out, torch.tensor(counts)) is out
    assert torch.equal(out[:used], kept)
    assert torch.equal(out[used:], torch.zeros(200 - used, columns))
