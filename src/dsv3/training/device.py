"""The device of a run: its name, its peak speed, the memory that the run took."""

import resource

import torch
from torch import Tensor

PEAK_BF16 = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip
"""Dense BF16 FLOP/s on the manufacturer's data sheets, by part of the name. Utilisation is against this in every precision,
as in the published figures."""

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""The dtype of activations by `training.precision`; in FP8 some layers quantise them."""


def peak_flops(name: str) -> float | None:
    """FLOP/s of the device of this name; None for one that the table does not hold, CPUs among them."""
    known = [part for part in PEAK_BF16 if part in name]
    return PEAK_BF16[max(known, key=len)] if known else None


def device_name(device: torch.device) -> str:
    """From its driver; `CPU` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on the GPU have taken, or on the CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; copied to a GPU from pinned memory, without waiting."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
