"""One row of `dsv3 bench ops`: an operation at one shape, and the peer or limit it is measured against in the same run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Work = Callable[[], object]
"""One call, on tensors that were made before."""
Unit = Literal["of the peer", "TB/s", "TFLOP/s", "us"]
"""`of the peer`: the peer's time over ours, or our share of the copy rate. Only `us` is better when lower."""


@dataclass(frozen=True)
class Case:
    """What to time."""

    op: str
    shape: str
    ours: Work
    peer_name: str
    """The peer, or "copy rate": then `bytes` over the time is compared with what a copy of 1 GB reaches in the run."""
    peer: Work | None = None
    """None for "copy rate", and for a peer that is not installed."""
    bytes: float | None = None
    """Read and written at least, for operations that memory limits."""
    flops: float | None = None
    """For operations that arithmetic limits: a multiply-add is two."""
    peer_flops: float | None = None
    """Of the peer's work where it differs from ours: then rates are compared, not times."""
    target: float | None = None
    """The figure to reach, in `unit`."""
    unit: Unit = "of the peer"
    or_of_the_peer: float | None = None
    """For targets in other units: also met at this share of the peer."""
