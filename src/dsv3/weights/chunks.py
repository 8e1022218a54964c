"""Parts of tensors that a checkpoint stores by themselves: stacks of experts lie there expert by expert."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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


def chunk_item(region: Region, dtype: torch.dtype, shape: Sequence[int]) -> WriteItem:
    """The entry of a plan that stores a region of a tensor of this dtype and shape."""
    offsets = torch.Size(region.start)
    return WriteItem(
        MetadataIndex(region.name, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(region.size)), TensorProperties(dtype=dtype), torch.Size(shape)
        ),
    )
