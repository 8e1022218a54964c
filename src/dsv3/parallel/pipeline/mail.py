"""Activations and gradients between the ranks of a pipeline: sent and received in groups, waited for where they are needed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dsv3.errors import RunError
from dsv3.parallel.pipeline.instructions import Message, Send, What

Key = tuple[What, int, int]
"""What it is, the stage it is for, and the micro-batch."""


class Mail:
    """One rank's post. A tensor is put there by the stage that made it, and taken by the one it is for."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.here: dict[Key, tuple[Tensor, list[Any]]] = {}
        """With what must be waited for first."""
        self.leaving: list[tuple[Tensor, list[Any]]] = []

    def put(self, key: Key, tensor: Tensor) -> None:
        """A tensor made here, for a stage here or elsewhere."""
        self.here[key] = tensor.contiguous(), []

    def take(self, key: Key) -> Tensor:
        """What is for a stage here; a rank waits for it as long as the process group allows, a GPU's host does not wait."""
        tensor, works = self.here.pop(key)
        wait(works, f"{key[0]} of micro-batch {key[2]} for stage {key[1]}")
        return tensor

    def exchange(self, messages: Sequence[Message], empty: Callable[[Message], Tensor]) -> None:
        """Begins to send and to receive, all at once; `empty` makes room for a message."""
        self.leaving = [(tensor, works) for tensor, works in self.leaving if not all(w.is_completed() for w in works)]
        operations, sent, received = [], [], {}
        for each in messages:
            key: Key = (each.what, each.stage, each.micro_batch)
            if isinstance(each, Send):
                sent.append(self.here.pop(key)[0])
            else:
                received[key] = empty(each)
            call = dist.isend if isinstance(each, Send) else dist.irecv
            tensor = sent[-1] if isinstance(each, Send) else received[key]
            operations.append(dist.P2POp(call, tensor, group=self.group, group_peer=each.peer))
        works = dist.batch_isend_irecv(operations)
        self.leaving += [(tensor, works) for tensor in sent]
        self.here |= {key: (tensor, works) for key, tensor in received.items()}

    def finish(self) -> None:
        """Waits until all that was sent has left."""
        for _, works in self.leaving:
            wait(works, "what was sent")
        self.leaving = []

    def swap(self, tensors: Sequence[Tensor], peer: int) -> list[Tensor]:
        """What another rank has in the place of each of these."""
        others = [tensor.new_empty(tensor.shape) for tensor in tensors]
        calls = [(dist.isend, each) for each in tensors] + [(dist.irecv, each) for each in others]
        operations = [dist.P2POp(call, each, group=self.group, group_peer=peer) for call, each in calls]
        wait(dist.batch_isend_irecv(operations), f"gradients of what rank {peer} of the pipeline holds too")
        return others


def wait(works: list[Any], what: str) -> None:
    """Waits once: gloo would never come back from a second time. `RunError` where the other rank has gone."""
    try:
        while works:
            works.pop().wait()
    except RuntimeError as error:
        raise RunError(
            f"waited in vain for {what}: {str(error).splitlines()[0]}. Another rank ended or hangs; its own message says why"
        ) from error
