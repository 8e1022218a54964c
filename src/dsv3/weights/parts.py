"""Parts of tensors: experts in their stack, which are stored one by one, and the rows of a tensor that one rank holds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

STACK = 3
"""Dimensions of a stack of experts; no other tensor has as many."""


class Region(NamedTuple):
    """A part of a tensor: `size` elements from `start` on in every dimension."""

    name: str
    start: tuple[int, ...]
    size: tuple[int, ...]


def part_of(tensor: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """A view of a region."""
    return tensor[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]


class Place(NamedTuple):
    """Where a shard lies in the full tensor that a checkpoint holds. Rows are counted over all dimensions but the last."""

    shape: tuple[int, ...]
    """Of the full tensor."""
    first: int = 0
    """The row of the full tensor that is the shard's first."""
    written: bool = True
    """Whether this rank writes it: others may hold the same rows."""


def undivided(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """The places of tensors that are not sharded."""
    return {name: Place(tuple(each.shape)) for name, each in tensors.items()}


def regions(name: str, tensor: Tensor, place: Place) -> Iterator[tuple[Region, Tensor]]:
    """The boxes of the full tensor that a shard's rows cover, each within one matrix of a stack, and views of their values."""
    if len(place.shape) < 2 or 0 in place.shape:
        if tensor.numel() or 0 in place.shape:
            yield Region(name, (place.first,) * len(place.shape), tuple(tensor.shape)), tensor
        return
    values, matrix = tensor.view(-1, tensor.shape[-1]), place.shape[-2]
    row, end = place.first, place.first + len(values)
    while row < end:
        number, inside = divmod(row, matrix)
        count = min(matrix - inside, end - row)
        stack = () if len(place.shape) == 2 else (number,)
        box = Region(name, (*stack, inside, 0), (*(1 for _ in stack), count, place.shape[-1]))
        yield box, values[row - place.first :][:count].view(box.size)
        row += count


def all_regions(tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[Region, Tensor]:
    """What this rank writes of the tensors that have a place, with its values."""
    return {
        region: values
        for name, place in places.items()
        if place.written
        for region, values in regions(name, tensors[name], place)
    }
