"""A rank's part of a network: what it builds, and how the whole comes together on the pipeline's first rank."""

from collections.abc import Mapping

from torch import nn

from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group

Holders = Mapping[str, tuple[int, ...]]
"""The ranks of a pipeline that hold each part, by its name (`Layout.holders`)."""


def part_of(name: str) -> str:
    """The part that a parameter, or a buffer, belongs to."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first in ("layers", "mtp") else first


def hold(model: DeepSeekV3, parts: set[str]) -> DeepSeekV3:
    """The model without what is not among these parts (names as of `Layout.parts`): blocks, embedding, final norm, head.

    What is left keeps its names, so that whatever walks `model.blocks()` or the parameters meets what is here and no more.
    """
    for owner, prefix in ((model, ""), (model.layers, "layers."), (model.mtp, "mtp.")):
        assert isinstance(owner, nn.Module)
        for name in [name for name, _ in owner.named_children()]:
            if f"{prefix}{name}" not in parts and (prefix or name not in ("layers", "mtp")):
                delattr(owner, name)
    return model


def bring_together(model: DeepSeekV3, whole: DeepSeekV3 | None, holders: Holders, group: Group) -> None:
    """Copies the weights and biases of all parts into `whole`, which the first rank of a pipeline has; every rank calls it."""
    own = model.state_dict()
    target = own if whole is None else whole.state_dict()
    for part, (first, *_) in holders.items():
        names = [name for name in target if part_of(name) == part]
        for name in names:
            what = f"bringing {name} to the first rank"
            if group.rank == first == 0:
                target[name].copy_(own[name])
            elif group.rank == 0:
                group.wait(group.post([], [(target[name], first)]), what)
            elif group.rank == first:
                group.wait(group.post([(own[name], 0)], []), what)
