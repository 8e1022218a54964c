"""Tensors in a `torch.distributed.checkpoint` directory, and nothing but tensors: what is pickled in it is read with care."""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dsv3.errors import RunError, UserError

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


class Writer(dcp.FileSystemWriter):
    """Leaves the path of the machine that wrote it out of the metadata."""

    def storage_meta(self) -> StorageMeta:
        """Nothing but the mark of this one save."""
        return StorageMeta(save_id=self.save_id)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes all tensors into an empty directory and waits until they are on the disk; `RunError` when they do not fit."""
    with single_process():
        try:
            dcp.save(dict(tensors), storage_writer=Writer(directory))
        except CheckpointException as error:
            cause = first_cause(error)
            if not isinstance(cause, Exception):
                raise cause from None
            raise RunError(f"could not write the tensors of {directory}: {cause}") from cause


def read_tensors(directory: Path, into: Mapping[str, Tensor]) -> None:
    """Fills the given tensors in place, cast to their dtype; the directory may hold more. See `read_layout` for checks."""
    # torch 2.11 goes on without metadata when reading it fails, and then knows nothing of the reason.
    Reader(directory).read_metadata()
    with single_process():
        try:
            dcp.load(dict(into), storage_reader=Reader(directory))
        except CheckpointException as error:
            cause = first_cause(error)
            if isinstance(cause, UserError) or not isinstance(cause, Exception):
                raise cause from None
            raise UserError(
                f"the tensors of {directory} cannot be read ({cause}): the checkpoint is damaged"
            ) from cause


def read_layout(directory: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """dtype and shape of every tensor of the directory, by name. Raises `UserError` as `Reader` does."""
    entries = Reader(directory).read_metadata().state_dict_metadata
    return {
        name: (each.properties.dtype, each.size)
        for name, each in entries.items()
        if isinstance(each, TensorStorageMetadata)
    }


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


def first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank that failed: the system's own error, where torch's writer hides one behind its."""
    shown = cause = next(each for each, _ in error.failures.values())
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause if isinstance(cause, OSError) else shown


@contextmanager
def single_process() -> Iterator[None]:
    """Without a process group one process saves and loads alone, which is meant and needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
