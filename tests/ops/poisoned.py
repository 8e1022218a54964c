"""What lies beside a tensor must not be read."""

import torch


def inside(x):
    """x as a part of a tensor that holds NaN elsewhere, in every dimension but the first of four."""
    poisoned = x.new_full((*x.shape[:-3], *(size + 3 for size in x.shape[-3:-1]), x.shape[-1] + 16), torch.nan)
    view = poisoned[tuple(slice(size) for size in x.shape)]
    return view.copy_(x)
