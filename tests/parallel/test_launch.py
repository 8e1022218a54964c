"""What a process of a job is refused before it meets the others."""

import pytest
import torch
import torch.distributed as dist

from dsv3.errors import UserError
from dsv3.parallel.launch import launched
from dsv3.recipe.schema import Recipe

CONTENT = {
    "model": {"preset": "debug"},
    "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": 32},
    "schedule": {"learning_rate": 1e-3, "batch_size": 16},
    "training": {"tokens": 1000},
    "parallel": {"data": 16},
}


@pytest.mark.parametrize(
    ("started", "per_node", "nccl", "said"),
    [
        (16, 8, False, "built without NCCL.*install one with it, or training.device=cpu"),
        (
            16,
            16,
            True,
            "16 processes on a machine of 8 GPUs: one each, with --nproc-per-node 8, or training.device=cpu",
        ),
        (12, 6, True, "the recipe is for .*1 x 16 = 16 processes, and torchrun started 12.*parallel.data=12"),
        (1, 1, True, "16 processes, and this is one: start it with torchrun --nproc-per-node 16"),
    ],
)
def test_a_job_that_cannot_be(monkeypatch, started, per_node, nccl, said):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_node))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    with pytest.raises(UserError, match=said), launched(Recipe.from_dict(CONTENT)):
        pass
    assert not dist.is_initialized()
