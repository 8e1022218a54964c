"""The device that a user names."""

import torch

from dsv3.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU. A GPU has its index: torch asks for it in some places.

    Raises `UserError` for a name that is none of cpu, cuda, cuda:N and auto, and for a GPU that is not here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: expected 'auto', 'cpu', 'cuda' or one GPU of several such as 'cuda:1'")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r}: torch finds no GPU here; use 'auto' or 'cpu'")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device {name!r}: torch finds {count} GPU{'s' * (count > 1)} here, counted from 'cuda:0'")
    return torch.device("cuda", index)
