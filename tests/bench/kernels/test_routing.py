"""The benchmark's cases at sizes for a CPU: each side does its work."""

import pytest
import torch

from dsv3.bench.kernels import routing


@pytest.fixture(autouse=True)
def small(monkeypatch):
    pytest.importorskip("triton")
    for name, size in (("TOKENS", 8), ("ROUTED_TOKENS", 4), ("CHOSEN", 2), ("EXPERTS", 16), ("HIDDEN", 32), ("VOCABULARY", 40)):  # fmt: skip
        monkeypatch.setattr(routing, name, size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("family", [routing.router, routing.sort, routing.permutation])
def test_every_case_runs(family):
    names = []
    for case in family(torch.device("cpu")):
        case.ours()
        if case.peer is not None:
            case.peer()
        names.append((case.op, case.shape))
    assert len(set(names)) == len(names) > 1


def test_bytes_are_those_of_each_tensor_once():
    bytes_of = {case.op: case.bytes for case in routing.permutation(torch.device("cpu"))}
    token, row = 8 * 32 * 2, 16 * 32 * 2
    assert bytes_of == {"permute": token + row, "unpermute": token + row}
