"""A forward pass cut into segments, each a graph of its own, so that the backward pass can stop at the same places.

At a cut every tensor with a gradient goes through a `Port`. Its gradient arrives in an anchor, a tensor that takes no memory
until then, and nothing but the graphs keeps activations.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

T = TypeVar("T")


class Port(torch.autograd.Function):
    """A value after a cut."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor) -> Tensor:
        """The value itself; its gradient becomes the anchor's."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """See `forward`."""
        return grad, None


def port(value: Tensor) -> tuple[Tensor, Tensor]:
    """(the value, its anchor)."""
    anchor = value.new_empty(()).expand(value.shape).requires_grad_()
    return Port.apply(anchor, value.detach()), anchor


class Cut:
    """The tensors that passed one cut, and where their gradients go."""

    def __init__(self) -> None:
        self.edges: list[tuple[GradientEdge, Tensor]] = []
        self.passed: dict[int, tuple[Tensor, Tensor]] = {}

    def through(self, value: T) -> T:
        """The value on the other side of the cut, tensors in dataclasses, lists and tuples included."""
        found: Any = value
        if isinstance(value, Tensor):
            # Those without gradients too: counts and indices, which deferred weight gradients read long after.
            used_by_this_stream(value)
            if value.grad_fn is None:
                return value
            # By identity, keeping the tensor alive: one that occurs twice passes once.
            if id(value) not in self.passed:
                other, anchor = port(value)
                self.edges.append((get_gradient_edge(value), anchor))
                self.passed[id(value)] = value, other
            found = self.passed[id(value)][1]
        elif is_dataclass(value) and not isinstance(value, type):
            old = {each.name: getattr(value, each.name) for each in fields(value)}
            new = {name: self.through(each) for name, each in old.items()}
            if any(new[name] is not old[name] for name in old):
                found = replace(value, **new)
        elif isinstance(value, list | tuple):
            parts = [self.through(each) for each in value]
            if any(a is not b for a, b in zip(parts, value, strict=True)):
                found = (
                    value._make(parts) if hasattr(value, "_make") else type(value)(parts)
                )  # a NamedTuple, or a plain one
        return found

    def close(self) -> "Cut":
        """Drops the references to the tensors themselves."""
        self.passed.clear()
        return self

    def backward(self) -> None:
        """Continues the backward pass with the gradients that arrived."""
        pairs = [(edge, anchor.grad) for edge, anchor in self.edges if anchor.grad is not None]
        for _, grad in pairs:
            used_by_this_stream(grad)
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])


def used_by_this_stream(tensor: Tensor) -> None:
    """Keeps the allocator from reusing another stream's memory before this stream is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
