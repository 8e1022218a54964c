"""Tensors in a `torch.distributed.checkpoint` directory, and nothing but tensors: what is pickled in it is read with care.

A tensor is stored whole or as chunks, each of which can be read by itself; stacks of experts are stored expert by expert.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsv3.disk import sync
from dsv3.errors import UserError
from dsv3.weights.parts import Place, Region, part_of, regions, undivided

METADATA = ".metadata"
KNOWN = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip
"""All that the metadata of tensors is made of. The class of pickled objects, `BytesStorageMetadata`, is not among it."""


class MetadataUnpickler(pickle.Unpickler):
    """Makes objects of the `KNOWN` classes; any other name is an error, so that nothing else can run."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of this name, if it is known."""
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


class ChunkReader(dcp.FileSystemReader):
    """Reads regions of a directory's tensors, and no more of the files than the chunks that hold them.

    Raises `UserError` when the metadata is absent, damaged, or more than a description of tensors, or a file that it names is
    absent or too short.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.directory = directory
        metadata = self.read_metadata()
        self.storage_data: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.check_files()
        entries = metadata.state_dict_metadata
        self.tensors = {name: each for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
        self.layout = {name: (each.properties.dtype, each.size) for name, each in self.tensors.items()}
        """dtype and shape of every tensor, by name."""
        self.chunks = {
            Region(name, tuple(chunk.offsets), tuple(chunk.sizes))
            for name, each in self.tensors.items()
            for chunk in each.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Loads `.metadata` through `MetadataUnpickler`."""
        path = self.directory / METADATA
        try:
            with path.open("rb") as file:
                metadata: Metadata = MetadataUnpickler(file).load()
            files = [place.relative_path for place in metadata.storage_data.values()]
            outside = [file for file in files if Path(file).name != file]
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist: {self.directory} is no checkpoint, or it was never completed"
            ) from None
        except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged, or not what a checkpoint holds: {error}. It was not loaded") from None
        if outside:
            raise UserError(f"{path} names the file {outside[0]}, which is outside the checkpoint. It was not loaded")
        return metadata

    def check_files(self) -> None:
        """Raises `UserError` when a file is absent or too short."""
        ends: dict[str, int] = {}
        for place in self.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.directory / name
            size = file.stat().st_size if file.is_file() else 0
            if size < end:
                raise UserError(f"{file} has {size:,} bytes, expected {end:,}: the checkpoint is incomplete")

    def fill(self, into: Mapping[str, Tensor], places: Mapping[str, Place] | None = None) -> None:
        """Fills these tensors, or shards of them, in place and cast to their dtype, however they were sharded when written."""
        places = places or undivided(into)
        for name, tensor in into.items():
            for region, values in regions(name, tensor, places[name]):
                values.copy_(self.read(region))

    def read(self, region: Region) -> Tensor:
        """The values of a region, from all chunks that hold some of it."""
        if region in self.chunks:
            return self.load(MetadataIndex(region.name, region.start))
        wanted = ChunkStorageMetadata(torch.Size(region.start), torch.Size(region.size))
        out = torch.empty(region.size, dtype=self.layout[region.name][0])
        for item in create_read_items_for_chunk_list(region.name, self.tensors[region.name], [wanted]):
            chunk = self.load(item.storage_index)
            part_of(out, item.dest_offsets, item.lengths).copy_(part_of(chunk, item.storage_offsets, item.lengths))
        return out

    def load(self, index: MetadataIndex) -> Tensor:
        """One stored chunk as a tensor of its own: torch's `read_data` would copy it once more, to where it is told."""
        place = self.storage_data[index]
        try:
            with (self.directory / place.relative_path).open("rb") as stream:
                tensor: Tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True)
                return tensor
        except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
            raise UserError(
                f"{self.directory}: {index.fqn} cannot be read ({error}): the checkpoint is damaged"
            ) from None


class ChunkWriter:
    """Writes a directory file by file, in any order and by several threads; each file holds some regions of tensors.

    `files` are the regions of each; together they must cover every tensor of `layout` once.
    """

    def __init__(
        self, directory: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], files: list[list[Region]]
    ):
        self.directory, self.layout, self.files = directory, layout, files

    def file(self, number: int) -> str:
        """The name of one file."""
        return f"__{number}_0.distcp"

    def write(self, number: int, read: Callable[[Region], Tensor]) -> list[tuple[int, int]]:
        """Writes one file, asking for the values of its regions one by one; (offset, bytes) of each in the file."""
        written, path = [], self.directory / self.file(number)
        with path.open("wb") as stream:
            for region in self.files[number]:
                start, values = stream.tell(), read(region).detach().cpu()
                # Of a view, torch would save all that it is a view of.
                own = values.untyped_storage().nbytes() == values.nbytes
                try:
                    torch.save(values if own else values.clone(), stream)
                except RuntimeError as error:
                    raise system_error(error) from None
                written.append((start, stream.tell() - start))
        sync(path)
        return written

    def finish(self, written: Sequence[Sequence[Sequence[int]]]) -> None:
        """Makes the directory whole, from what `write` returned for each file, in their order."""
        entries = {
            name: TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), [])
            for name, (dtype, shape) in self.layout.items()
        }
        places = {}
        for number, regions_of_file in enumerate(self.files):
            for region, (start, count) in zip(regions_of_file, written[number], strict=True):
                chunk = ChunkStorageMetadata(torch.Size(region.start), torch.Size(region.size))
                entries[region.name].chunks.append(chunk)
                places[MetadataIndex(region.name, region.start)] = _StorageInfo(self.file(number), start, count)
        (self.directory / METADATA).write_bytes(pickle.dumps(Metadata(dict(entries), storage_data=places)))


def system_error(error: BaseException) -> BaseException:
    """The system's own error, where torch's writer hides one behind its; otherwise the error itself."""
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause if isinstance(cause, OSError) else error
