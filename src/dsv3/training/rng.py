"""The state of every random generator that a run may use, as JSON can hold it."""

import base64
import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Python's generator, NumPy's global one, torch's on the CPU and, for a GPU, the one there."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": packed(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = packed(torch.cuda.get_rng_state(device))
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave; a run that moves to another kind of device keeps the fresh generator there."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(unpacked(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(unpacked(state["cuda"]), device)


def packed(state: torch.Tensor) -> str:
    """uint8 [N] as text."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def unpacked(text: str) -> torch.Tensor:
    """`packed` undone."""
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
