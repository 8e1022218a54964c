"""Whether Triton kernels can serve."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor


def no_triton(*tensors: Tensor) -> str | None:
    """The reason why a kernel cannot compute these tensors; None when it can."""
    if not all(each.is_cuda for each in tensors):
        return "needs tensors on a GPU"
    return no_kernels(tensors[0].device)


@cache
def no_kernels(device: torch.device) -> str | None:
    """The reason why this GPU runs none of the kernels: they are written for E4M3 and bulk copies, sm_90's."""
    if find_spec("triton") is None:
        return "needs the package triton, which comes with torch's builds for CUDA"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a GPU of compute capability 9.0 or later"
    return None


@cache
def no_gluon(device: torch.device) -> str | None:
    """The reason why what is written in Gluon does not run: it changes with every release."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a GPU of compute capability 9.0"
    installed = str(import_module("triton").__version__)
    return None if installed.startswith("3.6.") else f"is written for triton 3.6, not {installed}"
