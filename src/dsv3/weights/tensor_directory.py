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
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dsv3.errors import UserError
from dsv3.weights.chunks import Region, chunk_item, part_of
from dsv3.weights.parts import Place, regions

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


class Reader(dcp.FileSystemReader):
    """Reads the metadata through `MetadataUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises `UserError` when it is absent, damaged, or more than a description of tensors."""
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            places = metadata.storage_data.values()
            outside = [each.relative_path for each in places if Path(each.relative_path).name != each.relative_path]
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: {self.path} is no checkpoint, or it was never completed") from None
        except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged, or not what a checkpoint holds: {error}. It was not loaded") from None
        if outside:
            raise UserError(f"{path} names the file {outside[0]}, which is outside the checkpoint. It was not loaded")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def load(self, index: MetadataIndex) -> Tensor:
        """One stored chunk as a tensor of its own: torch's `read_data` would copy it once more, to where it is told."""
        place = self.storage_data[index]
        with self.fs.create_stream(self.fs.concat_path(self.path, place.relative_path), "rb") as stream:
            tensor: Tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True)
            return tensor


class Writer(dcp.FileSystemWriter):
    """Leaves the path of the machine that wrote it out of the metadata."""

    def storage_meta(self) -> StorageMeta:
        """Nothing but the mark of this one save."""
        return StorageMeta(save_id=self.save_id)


def read_tensors(directory: Path, into: Mapping[str, Tensor], places: Mapping[str, Place] | None = None) -> None:
    """Fills the given tensors in place, cast to their dtype; the directory may hold more. See `read_layout` for checks.

    With `places`, tensors are parts of what is stored, however that was divided when it was written.
    """
    reader = ChunkReader(directory)
    for name, tensor in into.items():
        for region, values in regions(name, tensor, Place(tuple(tensor.shape)) if places is None else places[name]):
            values.copy_(reader.read(region))


def read_layout(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """dtype and shape of every tensor of the directory, by name. Raises `UserError` as `Reader` does."""
    entries = Reader(directory).read_metadata().state_dict_metadata
    return {
        name: (each.properties.dtype, each.size)
        for name, each in entries.items()
        if isinstance(each, TensorStorageMetadata)
    }


class ChunkReader:
    """Reads regions of a directory's tensors, and no more of the files than the chunks that hold them."""

    def __init__(self, directory: Path):
        check_files(directory)
        self.reader = Reader(directory)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        entries = self.metadata.state_dict_metadata
        self.tensors = {name: each for name, each in entries.items() if isinstance(each, TensorStorageMetadata)}
        self.layout = {name: (each.properties.dtype, each.size) for name, each in self.tensors.items()}
        self.exact = {
            Region(name, tuple(chunk.offsets), tuple(chunk.sizes)): chunk
            for name, each in self.tensors.items()
            for chunk in each.chunks
        }

    @property
    def identity(self) -> str:
        """Another after every save: the sizes, names and times of the files."""
        files = sorted(each for each in Path(self.reader.path).iterdir() if each.is_file())
        return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    def read(self, region: Region) -> Tensor:
        """The values of a region, from all chunks that hold some of it."""
        if (found := self.exact.get(region)) is not None:
            return self.load(region.name, found)
        out = torch.empty(region.size, dtype=self.layout[region.name][0])
        for chunk in self.tensors[region.name].chunks:
            both = [
                range(max(first, other), min(first + count, other + more))
                for first, count, other, more in zip(region.start, region.size, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(both):
                low, size = [each.start for each in both], [len(each) for each in both]
                part_of(out, minus(low, region.start), size).copy_(
                    part_of(self.load(region.name, chunk), minus(low, chunk.offsets), size)
                )
        return out

    def load(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """The values of one chunk."""
        try:
            return self.reader.load(MetadataIndex(name, chunk.offsets))
        except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
            raise UserError(f"{self.reader.path}: {name} cannot be read ({error}): the checkpoint is damaged") from None


def minus(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Element by element."""
    return [first - second for first, second in zip(a, b, strict=True)]


class ChunkWriter:
    """Writes a directory file by file, in any order and by several threads; each file holds some regions of tensors.

    `files` are the regions of each; together they must cover every tensor of `layout` once.
    """

    def __init__(
        self, directory: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], files: list[list[Region]]
    ):
        self.writer = Writer(directory)
        plans = [SavePlan([chunk_item(each, *layout[each.name]) for each in regions]) for regions in files]
        plans, self.metadata = create_default_global_save_plan(plans)
        self.plans = self.writer.prepare_global_plan([self.writer.prepare_local_plan(plan) for plan in plans])

    def file(self, number: int) -> str:
        """The name of one file."""
        return f"__{number}_0.distcp"

    def write(self, number: int, read: Callable[[Region], Tensor]) -> list[Any]:
        """Writes one file, asking for the values of its regions one by one, and says where they lie in it, as JSON can."""
        try:
            results = self.writer.write_data(self.plans[number], From(read)).wait()
        except RuntimeError as error:
            raise system_error(error) from None
        return [
            [each.index.fqn, each.index.offset, each.index.index, each.size_in_bytes, *place_of(each)]
            for each in results
        ]

    def finish(self, written: list[list[Any]]) -> None:
        """Makes the directory whole, from what all calls of `write` have said."""
        results = [
            WriteResult(MetadataIndex(name, offset, index), size, _StorageInfo(*place))
            for each in written
            for name, offset, index, size, *place in each
        ]
        self.writer.finish(self.metadata, [results])


def place_of(result: WriteResult) -> tuple[str, int, int]:
    """File, offset and length of what was written. Torch gives the class that says so no public name."""
    assert isinstance(result.storage_data, _StorageInfo)
    return result.storage_data.relative_path, result.storage_data.offset, result.storage_data.length


class From(DefaultSavePlanner):
    """Tells torch's writer where values come from: a function."""

    def __init__(self, read: Callable[[Region], Tensor]):
        super().__init__()
        self.values = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of one chunk."""
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        return self.values(Region(write_item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)))


def check_files(directory: Path) -> None:
    """Raises `UserError` when the metadata is unreadable, or a file that it names is absent or too short."""
    ends: dict[str, int] = {}
    for place in Reader(directory).read_metadata().storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else 0
        if size < end:
            raise UserError(f"{file} has {size:,} bytes, expected {end:,}: the checkpoint is incomplete")


def system_error(error: BaseException) -> BaseException:
    """The system's own error, where torch's writer hides one behind its; otherwise the error itself."""
    cause = error
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause if isinstance(cause, OSError) else error
