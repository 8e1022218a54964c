"""Reading a device's tensors without making the host wait: they are packed into one, which is copied while the device works on."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def moment(device: torch.device) -> torch.cuda.Event | None:
    """An event at this point of a GPU's work, to measure from; None for a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Transfer:
    """Named tensors on their way to the CPU in one copy, in FP64, which holds every figure and count exactly enough.

    They are read as NumPy arrays: small ones cost the host far less than tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], began: torch.cuda.Event | None = None):
        """`began` is the start of the step that made them."""
        # Those of one dtype together: a few launches, where one for each tensor would delay the next step.
        self.shapes = {name: tensors[name].shape for name in sorted(tensors, key=lambda name: str(tensors[name].dtype))}
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in self.shapes:
            by_dtype.setdefault(tensors[name].dtype, []).append(tensors[name].detach().reshape(-1))
        packed = torch.cat([torch.cat(each).double() for each in by_dtype.values()])
        self.began = began
        self.arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self.packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.packed.copy_(packed, non_blocking=True)
            self.arrived = moment(packed.device)
        else:
            self.packed = packed

    def read(self) -> dict[str, np.ndarray]:
        """The arrays; waits for them if they are not there yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values, found, start = self.packed.numpy(), {}, 0
        for name, shape in self.shapes.items():
            found[name] = values[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        return found

    def seconds(self) -> float | None:
        """The GPU's time from where the step began, once the tensors are read; None for a CPU."""
        if self.began is None or self.arrived is None:
            return None
        return self.began.elapsed_time(self.arrived) / 1000
