"""Parts of tensors that a checkpoint stores by themselves: stacks of experts lie there expert by expert."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

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


class ExpertByExpert(DefaultSavePlanner):
    """Stores a stack of matrices as one chunk a matrix, so that reading one expert reads no other."""

    def create_local_plan(self) -> SavePlan:
        """The default plan with whole stacks replaced by their chunks."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[chunk for item in plan.items for chunk in chunks_of(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one chunk."""
        assert write_item.tensor_data is not None
        chunk, whole = write_item.tensor_data.chunk, self.state_dict[write_item.index.fqn]
        return part_of(whole.detach(), chunk.offsets, chunk.sizes)


def chunks_of(item: WriteItem) -> list[WriteItem]:
    """A whole stack's chunks; anything else as it is."""
    data = item.tensor_data
    if data is None or len(data.size) != STACK or tuple(data.chunk.sizes) != tuple(data.size):
        return [item]
    name, (experts, *matrix) = item.index.fqn, data.size
    # The scales' names and those of an optimizer's moments are made from the weight's.
    rows = matrix[0] // 2 if "gate_up_proj" in name.rpartition(".")[2] else matrix[0]
    starts = [(e, row, 0) for e in range(experts) for row in range(0, matrix[0], rows)]
    return [chunk_item(Region(name, start, (1, rows, matrix[1])), data.properties.dtype, data.size) for start in starts]


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
