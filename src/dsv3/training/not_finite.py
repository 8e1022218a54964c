"""Which tensor of which layer is the first that is not finite: a skipped step is computed again with hooks that look."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from dsv3.model.feed_forward import Experts, Routing
from dsv3.model.transformer import DeepSeekV3


@dataclass(frozen=True)
class NotFinite:
    """A tensor that holds infinities or NaN."""

    what: str
    """A weight by its name, the output of a module by the module's name, a gradient by its tensor's name, or a loss."""
    micro_batch: int = 0
    """The pass it was found in, from 0."""
    place: tuple[int, int] | None = None
    """(row of the micro-batch, position) of the first such element, where the tensor is [B, T, ...]."""


class Finder:
    """Hooks on all modules that note the first output, or gradient of an output, that is not finite."""

    def __init__(self, model: DeepSeekV3):
        self.model, self.passes, self.in_backward = model, 0, False
        self.found: NotFinite | None = None
        self.handles = [model.layers[0].register_forward_pre_hook(self.begin)]
        self.handles += [
            module.register_forward_hook(partial(self.after, name))
            for name, module in model.named_modules()
            if module is not model.embed_tokens
        ]

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """A micro-batch enters the first layer."""
        self.passes += 1
        self.look("the output of embed_tokens", False, inputs[0])

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A module has an output; the modules inside it came before."""
        first = output[0] if isinstance(output, tuple) else output
        tensor: Tensor = first.weight if isinstance(first, Routing) else first
        # Experts' outputs for rows after their groups are never read, and may be anything.
        rows = int(inputs[1].sum()) if isinstance(module, Experts) else len(tensor)
        self.look(f"the output of {name}", False, tensor[:rows])
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self.look(f"the gradient of the output of {name}", True, grad[:rows]))

    def look(self, what: str, in_backward: bool, tensor: Tensor) -> None:
        """Notes it, if it is the first."""
        if self.found is None and not bool(tensor.isfinite().all()):
            place = None
            if tensor.dim() > 2:
                row, position, *_ = tensor.isfinite().logical_not().nonzero()[0].tolist()
                place = row, position
            self.in_backward, self.found = in_backward, NotFinite(what, self.passes - 1, place)


def first_not_finite(model: DeepSeekV3, gradients: Callable[[], Tensor]) -> NotFinite | None:
    """The first that is not finite, in the order of computation: a weight; the output of a module, after those of the modules
    inside it; a loss; the gradient of an output, from the last backwards; a weight's gradient.

    `gradients` computes a batch's gradients anew and returns its losses, the main one, the balance loss and MTP's. They are
    cleared at the end. Waits for the device at every tensor. None: everything is finite.
    """
    for name, weight in model.state_dict().items():
        if not bool(weight.isfinite().all()):
            return NotFinite(name)
    finder = Finder(model)
    try:
        losses = gradients()
    finally:
        for handle in finder.handles:
            handle.remove()
    wrong = [
        f"the gradient of {name}"
        for name, each in model.named_parameters()
        if each.grad is not None and not bool(each.grad.isfinite().all())
    ]
    model.zero_grad(set_to_none=True)
    if finder.found is not None and not finder.in_backward:
        return finder.found
    for number in (~losses.isfinite()).nonzero().flatten().tolist():
        return NotFinite(["the loss", "the balance loss"][number] if number < 2 else f"the loss of mtp.{number - 2}")
    if finder.found is not None:
        return finder.found
    return NotFinite(wrong[-1]) if wrong else None
