"""A weight in the dtype of the activations."""

import torch
from torch import Tensor


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. Asking is cheaper than a `to` with nothing to do, which counts where tokens come one by one."""
    return weight if weight.dtype == dtype else weight.to(dtype)
