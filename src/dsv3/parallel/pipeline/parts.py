"""A rank's part of a network, and the whole of it on every rank of a pipeline, for evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dsv3.model.block import Block, Pass
from dsv3.model.feed_forward import Routing
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group

Holders = Mapping[str, tuple[int, ...]]
"""The ranks of a pipeline that hold each part, by its name (`Layout.holders`)."""


def part_of(name: str) -> str:
    """The part that a parameter, or a buffer, belongs to."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("layers", "mtp") else first


def hold(model: DeepSeekV3, parts: set[str]) -> DeepSeekV3:
    """The model without the blocks, embedding, final norm and head that are not among these parts (named as in `Layout.parts`).

    The rest keeps its names: whatever walks `model.blocks()` or the parameters sees what this rank holds.
    """
    for owner, prefix in ((model, ""), (model.layers, "layers."), (model.mtp, "mtp.")):
        assert isinstance(owner, nn.Module)
        for name in [name for name, _ in owner.named_children()]:
            if f"{prefix}{name}" not in parts and (prefix or name not in ("layers", "mtp")):
                delattr(owner, name)
    return model


class Relay(nn.Module):
    """A block's place in the whole network, on every rank: the rank that holds the block computes it and sends the result."""

    def __init__(self, block: Block, own: Block | None, source: int, group: Group):
        """`block` is a skeleton; `own` the block itself, on `source` alone."""
        super().__init__()
        self.name, self.gate = block.name, None if block.moe is None else block.moe.gate.config
        self.own = (own,)  # in a tuple, it stays the training's module and is none of this one
        self.source, self.group = source, group

    dispatcher = None
    """Not the local one: passes with collectives must not be recorded (`inference.recording`)."""

    @property
    def moe(self) -> "Relay":
        """Itself, for the `dispatcher`."""
        return self

    def forward(self, x: Tensor, shared: Pass) -> tuple[Tensor, Routing | None]:
        """See `Block`; without gradients and balance loss."""
        (own,) = self.own
        if own is not None:
            made, routing = own(x, shared)
        else:
            made, routing = torch.empty_like(x), None
            if self.gate is not None:
                rows = torch.empty(x[..., 0].numel(), self.gate.num_experts_per_tok, device=x.device)
                routing = Routing(rows.long(), rows, self.gate.n_routed_experts, None, None)
        for tensor in (made, *(() if routing is None else (routing.expert, routing.weight))):
            self.group.copy_from(tensor, self.source)
        return made, routing


def spread(model: DeepSeekV3, skeleton: DeepSeekV3, holders: Holders, group: Group) -> DeepSeekV3:
    """The whole network on every rank of a pipeline, which must all call this, and then use it together and in the same way.

    `model` is the rank's part of it, `skeleton` the whole on the meta device. Blocks stay where they are; the rest is copied.
    """
    own = {block.name: block for block in model.blocks()}

    def relay(block: Block, part: str) -> Relay:
        source = holders[part][0]
        return Relay(block, own[block.name] if group.rank == source else None, source, group)

    assert isinstance(skeleton.layers, nn.Module)
    for i, block in enumerate(skeleton.layers):
        skeleton.layers.register_module(str(i), relay(block, f"layers.{i}"))
    for k, module in enumerate(skeleton.mtp):
        module.register_module("block", relay(module.block, f"mtp.{k}"))
    whole, held = skeleton.to_empty(device=next(model.parameters()).device), model.state_dict()
    for name, tensor in whole.state_dict().items():
        source = holders[part_of(name)][0]
        group.copy_from(tensor.copy_(held[name]) if group.rank == source else tensor, source)
    return whole
