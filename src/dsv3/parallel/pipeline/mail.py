"""Activations and gradients between the ranks of a pipeline: sent and received in groups, waited for where they are needed."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.instructions import Message, Send, What

Key = tuple[What, int, int]
"""What it is, the stage it is for, and the micro-batch."""


class Mail:
    """One rank's messages. A tensor is put here by the stage that made it, and taken by the stage it is for."""

    def __init__(self, group: Group):
        self.group = group
        self.here: dict[Key, tuple[Tensor, list[Any]]] = {}
        """Tensors, with the works to wait for before they are read."""
        self.leaving: list[tuple[Tensor, list[Any]]] = []

    def put(self, key: Key, tensor: Tensor) -> None:
        """A tensor made here, for a stage here or elsewhere."""
        self.here[key] = tensor.contiguous(), []

    def take(self, key: Key) -> Tensor:
        """A tensor for a stage here. On the CPU this waits for it, up to the process group's timeout; a GPU's host does not wait."""
        tensor, works = self.here.pop(key)
        self.group.wait(works, f"waiting for the {key[0]} of micro-batch {key[2]}")
        return tensor

    def exchange(self, messages: Sequence[Message], empty: Callable[[Message], Tensor]) -> None:
        """Starts sending and receiving, all at once; `empty` makes the buffer for a message."""
        self.leaving = [(tensor, works) for tensor, works in self.leaving if not all(w.is_completed() for w in works)]
        sent, received, arriving = [], [], {}
        for each in messages:
            key: Key = (each.what, each.stage, each.micro_batch)
            if isinstance(each, Send):
                sent.append((self.here.pop(key)[0], each.peer))
            else:
                arriving[key] = empty(each)
                received.append((arriving[key], each.peer))
        works = self.group.post(sent, received)
        self.leaving += [(tensor, works) for tensor, _ in sent]
        self.here |= {key: (tensor, works) for key, tensor in arriving.items()}

    def finish(self) -> None:
        """Waits until everything is sent."""
        for _, works in self.leaving:
            self.group.wait(works, "waiting for what was sent to leave")
        self.leaving = []
