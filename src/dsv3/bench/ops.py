"""`dsv3 bench ops`: every operation beside the peer or the limit it is measured against, in one run on one GPU."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dsv3.bench.kernels import attention, decode, products, quantise, routing
from dsv3.bench.kernels.case import Case, Work
from dsv3.bench.measure import Progress, gpu, track

FAMILIES: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "quantise": quantise.cases, "routing": routing.cases, "products": products.cases, "attention": attention.cases,
    "decode": decode.cases,
}  # fmt: skip
COPIED = 2**30
"""Bytes of the copy that gives the copy rate: each is read once and written once."""
FLUSHED = 2**29
"""Bytes written before each call: they evict its inputs from caches, and keep the GPU busy while the host launches it."""
WARM_UP = 3
ROUNDS = 3
MILLISECONDS_A_TURN = 8.0
"""How long one side is measured in a round; at least `FEWEST` calls."""
FEWEST = 5


@dataclass(frozen=True)
class Measured:
    """One row."""

    op: str
    shape: str
    microseconds: float
    terabytes: float | None
    """A second."""
    teraflops: float | None
    """A second."""
    peer: str
    peer_microseconds: float | None
    """None where the peer is the copy rate, or is not installed."""
    of_the_peer: float | None
    """The peer's time over ours, our rate over the peer's where they do other work, or our share of the copy rate."""
    target: float | None
    unit: str
    or_of_the_peer: float | None = None

    @property
    def reached(self) -> float | None:
        """The figure that the target is about."""
        rates = {"of the peer": self.of_the_peer, "TB/s": self.terabytes, "TFLOP/s": self.teraflops}
        return self.microseconds if self.unit == "us" else rates[self.unit]

    @property
    def met(self) -> bool | None:
        """Whether the target is; None without one, or with nothing to compare."""
        if self.target is None or self.reached is None:
            return None
        if self.or_of_the_peer is not None and self.of_the_peer is not None and self.of_the_peer >= self.or_of_the_peer:
            return True
        return self.reached <= self.target if self.unit == "us" else self.reached >= self.target


def bench_ops(families: Sequence[str], progress: Progress = lambda **_: None) -> tuple[float, list[Measured]]:
    """(copy rate in TB/s, one row a case) of the named families of `FAMILIES`."""
    device = gpu("dsv3 bench ops")
    copy_rate, rows = measured_copy_rate(device), list[Measured]()
    for family in track(families, "bench ops", progress):
        rows += [measure(case, copy_rate) for case in FAMILIES[family](device)]
    return copy_rate, rows


def measured_copy_rate(device: torch.device) -> float:
    """TB/s."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / times([lambda: target.copy_(source)])[0] / 1e6


def warm(families: Sequence[str], progress: Progress = lambda **_: None) -> int:
    """Runs every case once, so that its kernels are compiled and in Triton's cache on the disk; how many there were."""
    device, count = gpu("dsv3 bench ops"), 0
    for family in track(families, "compiling", progress):
        for case in FAMILIES[family](device):
            case.ours()
            count += 1
    torch.cuda.synchronize()
    return count


def measure(case: Case, copy_rate: float) -> Measured:
    """One row: ours and the peer in turns."""
    ours, *peers = times([case.ours] if case.peer is None else [case.ours, case.peer])
    terabytes = None if case.bytes is None else case.bytes / ours / 1e6
    share = peers[0] / ours if peers else None
    if share is not None and case.flops is not None and case.peer_flops is not None:
        share *= case.flops / case.peer_flops
    if case.peer_name == "copy rate" and terabytes is not None:
        share = terabytes / copy_rate
    return Measured(
        case.op, case.shape, ours, terabytes, None if case.flops is None else case.flops / ours / 1e6,
        case.peer_name, peers[0] if peers else None, share, case.target, case.unit, case.or_of_the_peer,
    )  # fmt: skip


def times(works: Sequence[Work]) -> list[float]:
    """Median microseconds of each on the GPU, sides in turns, every call with cold caches."""
    for work in works:
        for _ in range(WARM_UP):
            work()
    calls = [max(FEWEST, int(MILLISECONDS_A_TURN * 1000 / max(timed(work, 2)[1], 1.0))) for work in works]
    found: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for number, work in enumerate(works):
            found[number] += timed(work, min(calls[number], 50))
    return [statistics.median(each) for each in found]


def timed(work: Work, calls: int) -> list[float]:
    """Microseconds of each call."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [1000 * begin.elapsed_time(end) for begin, end in events]
