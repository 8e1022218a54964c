"""What the kernels of FP8 products share."""

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """How the output of a product is cut into tiles, and with what each is computed."""

    rows: int
    columns: int
    """At most 128 where the weight has one scale a block: a tile then meets one scale a step."""
    warps: int
    stages: int
    group: int = 1
    """Tiles of rows that are done for one tile of columns before the next: they share operands in the L2 cache."""


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: as many persistent programs fill it. Interpreted, a few show whether they share the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
