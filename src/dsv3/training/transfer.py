"""Tensors of a device read on the host without making it wait: packed into one, copied beside the work that follows."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Transfer:
    """Named tensors on their way to the CPU, in one copy; FP64, which holds every figure and count exactly enough."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.shapes = {name: each.shape for name, each in tensors.items()}
        packed = torch.cat([each.detach().double().flatten() for each in tensors.values()])
        self.arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self.packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self.packed.copy_(packed, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.packed = packed

    def read(self) -> dict[str, Tensor]:
        """The tensors, FP64; waits for them if they are not there yet."""
        if self.arrived is not None:
            self.arrived.synchronize()
        pieces = self.packed.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
