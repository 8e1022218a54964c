"""In which order a pair of passes gives its work to the device; what they compute is tested on ranks (tests/distributed)."""

from dsv3.parallel.pipeline.executor import Run
from dsv3.parallel.pipeline.instructions import Backward, Forward, Overlapped


class Recorded(Run):
    """A pair whose passes have so many blocks, and whose work notes its name alone."""

    def __init__(self, ahead, back):
        self.ahead, self.back, self.done = ahead, back, []

    def works(self, kind, blocks):
        names = [f"{kind} {k // 2}" if k % 2 == 0 else f"{kind} sends {k // 2}" for k in range(2 * blocks + 1)]
        return [lambda name=name: self.done.append(name) for name in names]

    def start(self, chunk):
        return self

    def forwards(self):
        return self.works("forward", self.ahead)

    def turn(self, chunk):
        return self.works("backward", self.back)

    def deferring(self, *work):
        for each in work:
            each()
        return [lambda: self.done.append("weights")]

    def forwarded(self, chunk):
        pass

    returned = forwarded


def order(ahead, back):
    run = Recorded(ahead, back)
    run.overlap(Overlapped(Forward(1, 1), Backward(1, 0)))
    return run.done


def test_the_device_has_a_backward_computation_before_the_host_waits_for_the_forward_passs_counts():
    assert order(2, 2) == [
        "backward 0", "backward sends 0", "weights", "forward 0", "backward 1", "forward sends 0",
        "backward sends 1", "weights", "forward 1", "backward 2", "forward sends 1", "weights", "forward 2",
    ]  # fmt: skip


def test_passes_of_different_lengths_leave_nothing_out():
    for ahead, back in ((1, 3), (3, 1), (0, 2), (2, 0), (0, 0)):
        found = [each for each in order(ahead, back) if each != "weights"]
        assert sorted(found) == sorted(
            [f"{kind} {k}" for kind, blocks in (("forward", ahead), ("backward", back)) for k in range(blocks + 1)]
            + [f"{kind} sends {k}" for kind, blocks in (("forward", ahead), ("backward", back)) for k in range(blocks)]
        )
