import pytest
import torch

from dsv3.bench import ops
from dsv3.bench.kernels.case import Case
from dsv3.cli import main


@pytest.fixture
def clock(monkeypatch):
    """Takes the microseconds that a side says it needs instead of measuring."""
    monkeypatch.setattr(ops, "timed", lambda work, calls: [work()] * calls)


def case(**changes):
    given = dict(op="o", shape="2x2", ours=lambda: 20.0, peer_name="p", peer=lambda: 10.0)
    return Case(**{**given, **changes})


def test_a_peer_is_compared_by_time(clock):
    row = ops.measure(case(flops=4e9, bytes=6e6, target=0.4), 4.0)
    assert (row.microseconds, row.peer_microseconds, row.of_the_peer) == (20.0, 10.0, 0.5)
    assert row.teraflops == pytest.approx(200)
    assert row.terabytes == pytest.approx(0.3)
    assert row.met
    assert not ops.measure(case(target=0.6), 4.0).met


def test_a_peer_that_does_other_work_is_compared_by_its_rate(clock):
    assert ops.measure(case(flops=4e9, peer_flops=16e9), 4.0).of_the_peer == 0.125


def test_the_copy_rate_is_compared_by_bytes(clock):
    row = ops.measure(case(peer_name="copy rate", peer=None, bytes=60e6, target=0.7), 4.0)
    assert row.terabytes == pytest.approx(3.0)
    assert row.of_the_peer == pytest.approx(0.75)
    assert row.met


@pytest.mark.parametrize(
    ("unit", "target", "met"),
    [
        ("us", 20, True),
        ("us", 19, False),
        ("TFLOP/s", 200, True),
        ("TFLOP/s", 201, False),
        ("TB/s", 0.3, True),
        ("TB/s", 0.31, False),
    ],
)
def test_targets_in_other_units(clock, unit, target, met):
    assert ops.measure(case(flops=4e9, bytes=6e6, unit=unit, target=target), 4.0).met is met


def test_a_peer_that_is_not_there_decides_nothing(clock):
    row = ops.measure(case(peer=None, target=0.9), 4.0)
    assert row.of_the_peer is None
    assert row.met is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main.run(["bench", "ops"]) == 2
    assert "found none: it needs one of compute capability 9.0" in capsys.readouterr().err


def test_an_unknown_family_is_refused_with_the_nearest(capsys):
    assert main.run(["bench", "ops", "--only", "routng"]) == 2
    assert "did you mean 'routing'" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "met"), [(0.5, True), (0.6, False)])
def test_a_share_of_the_peer_can_serve_instead(clock, share, met):
    row = ops.measure(case(flops=4e9, unit="TFLOP/s", target=1000, or_of_the_peer=share), 4.0)
    assert row.met is met
