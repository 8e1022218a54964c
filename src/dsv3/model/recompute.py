"""Recomputation in backward (report, section 3.2.3) of cheap functions of tensors that are kept anyway.

Whatever saves a function's output saves a note of how it was made instead; the first to need it in backward recomputes it, once
for all. Losses and gradients stay the same to the bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks


class Call:
    """A function and what it was called with."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence["Tensor | Note"], needs_grad: Sequence[bool]):
        self.function, self.inputs, self.needs_grad = function, inputs, needs_grad
        self.made: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def run(self, given: Iterable[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """(inputs, outputs) with the graph between them."""
        inputs = [each.detach().requires_grad_(needed) for each, needed in zip(given, self.needs_grad, strict=True)]
        with torch.enable_grad():
            outputs = self.function(*inputs)
        return inputs, outputs if isinstance(outputs, tuple) else (outputs,)

    def again(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The same, computed once until its gradients are taken."""
        if self.made is None:
            self.made = self.run(unpack(each) for each in self.inputs)
        return self.made

    def gradients(self, outputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of the inputs from those of the outputs."""
        inputs, made = self.again()
        self.made = None
        pairs = [(each, grad) for each, grad in zip(made, outputs, strict=True) if grad is not None]
        wanted = [each for each in inputs if each.requires_grad]
        # A weight's gradient may be left for later (precision/deferred.py).
        found = iter(
            torch.autograd.grad([each for each, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        )
        return [next(found) if each.requires_grad else None for each in inputs]


class Note:
    """Saved in place of a tensor: which output of a call it is, or which part of one."""

    def __init__(self, call: Call, number: int, tensor: Tensor):
        self.call, self.number = call, number
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor, recomputed."""
        return self.call.again()[1][self.number].detach().as_strided(*self.place)


class Again(torch.autograd.Function):
    """Calls a function of tensors, and saves only these."""

    @staticmethod
    def forward(ctx: Any, recomputation: "Recomputation", function: Callable[..., Any], *inputs: Tensor) -> Any:
        """The function's output or outputs."""
        ctx.call = Call(function, [recomputation.pack(each) for each in inputs], ctx.needs_input_grad[2:])
        _, outputs = ctx.call.run(inputs)
        found = tuple(each.detach() for each in outputs)
        for number, each in enumerate(found):
            recomputation.outputs[each.untyped_storage()] = ctx.call, number, each.dtype
        return found if len(found) > 1 else found[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Through the recomputed graph."""
        return None, None, *ctx.call.gradients(grads)


class Recomputation:
    """Within `watching` it calls functions so that backward recomputes their outputs; elsewhere it just calls them."""

    def __init__(self) -> None:
        # Keyed by storage, because what is saved is often a view; weakly, because another tensor may take its place.
        self.outputs: WeakKeyDictionary[UntypedStorage, tuple[Call, int, torch.dtype]] = WeakKeyDictionary()
        self.active = False

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """`function(*inputs)`, which must return a tensor or a tuple of them, and depend on the inputs alone."""
        if not (self.active and torch.is_grad_enabled()):
            return function(*inputs)
        return Again.apply(self, function, *inputs)

    @contextmanager
    def watching(self, part: bool = False) -> Iterator[None]:
        """A context for a forward pass, or for each `part` of one that is run in parts."""
        self.active = True
        try:
            with saved_tensors_hooks(self.pack, unpack):
                yield
        finally:
            self.active = False
            if not part:
                self.outputs.clear()

    def pack(self, tensor: Tensor) -> "Tensor | Note":
        """What is saved of a tensor."""
        found = self.outputs.get(tensor.untyped_storage())
        if found is None or found[2] != tensor.dtype:
            return tensor
        return Note(*found[:2], tensor)


def unpack(kept: "Tensor | Note") -> Tensor:
    """The tensor that was packed."""
    return kept.tensor() if isinstance(kept, Note) else kept
