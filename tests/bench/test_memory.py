import pytest
import torch

from dsv3.bench.memory import CHOICES, Live, bench_memory
from dsv3.ops.attention import attention


def test_what_lives_is_counted_and_what_is_gone_is_not():
    with Live() as live:
        a = torch.zeros(1000)
        assert live.now == 4000
        b = a.view(10, 100) + 1
        assert live.now == 8000
        a.mul_(2)
        b[0].exp_()
        assert live.now == 8000  # views and changes in place hold nothing new
        del a
        assert live.now == 4000
    del b
    assert (live.now, live.most) == (0, 8000)


def test_every_choice_is_measured_and_saves_something(monkeypatch):
    monkeypatch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
    rows = bench_memory("debug", batch=2, length=128, precision="fp32", rounds=1)
    assert [row.recompute for row in rows] == list(CHOICES)
    usual, *others, all_of_them = rows
    for row in rows:
        assert 0 < row.kept <= row.peak
        assert row.seconds > 0
    assert all(row.kept < usual.kept for row in others)
    assert all_of_them.kept < min(row.kept for row in others)
    again = bench_memory("debug", batch=2, length=128, precision="fp32", rounds=1, choices=[()])
    assert again[0].kept == pytest.approx(usual.kept, rel=0.01)


def test_fp8_keeps_less_than_bf16(monkeypatch):
    monkeypatch.setattr(attention, "candidates", [each for each in attention.candidates if each.name == "sdpa"])
    kept = {
        precision: bench_memory("tiny", batch=2, length=128, precision=precision, rounds=1, choices=[()])[0].kept
        for precision in ("bf16", "fp8")
    }
    assert kept["fp8"] < 0.9 * kept["bf16"]
