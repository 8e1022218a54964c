import pytest
import torch

from dsv3.bench.kernels import quantise


def test_every_case_runs_at_a_small_size(monkeypatch):
    for name, size in {"TOKENS": 4, "HIDDEN": 128, "ROWS": 6, "EXPERT": 64}.items():
        monkeypatch.setattr(quantise, name, size)
    cases = []
    for case in quantise.cases(torch.device("cpu")):
        assert case.ours() is not None
        cases.append(case)
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    assert {case.peer_name for case in cases} == {"copy rate"}
    targets = {case.op: case.target for case in cases}
    assert [targets[op] for op in ("quantize_rows", "quantize_both", "rms_norm_tiles", "swiglu_tiles")] == [
        0.90,
        0.78,
        0.83,
        0.87,
    ]
    assert cases[0].bytes == pytest.approx((2 + 1 + 4 / 128) * 4 * 128)
