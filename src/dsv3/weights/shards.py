"""A directory of safetensors files in Hugging Face's layout: `model.safetensors`, or several shards and their index."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3.errors import RunError, UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
"""Of the names that safetensors headers use, those that are read and written."""


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and which part it is of the tensor that is meant."""

    file: Path
    name: str
    """Its name in the file."""
    index: tuple[slice, ...] = ()
    """`whole[index]`; () is the whole."""


@dataclass(frozen=True)
class Stored:
    """What the headers of a directory's files say of one tensor."""

    dtype: str
    """The header's name for it: "F32", "BF16", "F8_E4M3", ..."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """One in Hugging Face's layout; one a rank where a tensor is split among ranks."""

    @property
    def file(self) -> Path:
        """Where it lies, or begins."""
        return self.pieces[0].file


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; `load` gives it when its turn comes, contiguous and on the CPU."""

    name: str
    bytes: int
    load: Callable[[], Tensor]


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory by its name; no tensor is read.

    Raises `UserError` when there are only pickles, a file is missing, truncated or no safetensors file, two files hold
    the same tensor, or index and files disagree.
    """
    placed = read_index(directory / INDEX) if (directory / INDEX).exists() else None
    if placed is None and not (directory / SINGLE).exists():
        raise UserError(no_weights(directory))
    found: dict[str, Stored] = {}
    for file in sorted(set(placed.values())) if placed is not None else [SINGLE]:
        for name, stored in read_header(directory / file).items():
            if name in found:
                raise UserError(
                    f"tensor {name} is in {found[name].file} and in {stored.file}; expected it in one of them"
                )
            if placed is not None and placed.get(name) != file:
                raise UserError(
                    f"{stored.file} holds tensor {name}, but {directory / INDEX} places it in {placed.get(name)}"
                )
            found[name] = stored
    for name in placed or {}:
        if name not in found and placed is not None:
            raise UserError(
                f"{directory / INDEX} places tensor {name} in {placed[name]}, but {directory / placed[name]} lacks it"
            )
    return found


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor; a file must lie in the index's own directory."""
    try:
        placed = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no index of safetensors files ({error!r}): expected JSON with a weight_map"
        ) from None
    if not isinstance(placed, dict):
        raise UserError(f"{path}: weight_map is a {type(placed).__name__}, expected an object of names and files")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path} places tensor {name} in {file!r}: expected a .safetensors file beside the index")
        if not (path.parent / file).is_file():
            raise UserError(
                f"{path} places tensor {name} in {file}, which does not exist: the directory is incomplete, fetch the file again"
            )
    return placed


def read_header(file: Path) -> dict[str, Stored]:
    """What one file holds; opening it also checks that the header is sound and the data complete."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Stored(part.get_dtype(), tuple(part.get_shape()), (Piece(file, name),))
                for name, part in parts.items()
            }
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(
            f"{file} ({size:,} bytes) is truncated or no safetensors file ({error}): fetch or write it again"
        ) from None


def no_weights(directory: Path) -> str:
    """Why a directory cannot be loaded, and what to do."""
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds weights as pickles ({', '.join(pickles[:3])}), which can run any code and are never loaded: "
            "convert them where you trust them, with transformers' from_pretrained and save_pretrained, to safetensors"
        )
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    found = f"has {', '.join(shards[:3])} but no index" if shards else "holds no weights"
    return f"{directory} {found}: expected {SINGLE}, or shards with {INDEX}"


def read_tensors(stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, those of the same files together; one of a single piece is mapped from its file, so copy
    what you keep."""
    groups: dict[tuple[Path, ...], list[str]] = {}
    for name, each in stored.items():
        groups.setdefault(tuple(dict.fromkeys(piece.file for piece in each.pieces)), []).append(name)
    for files, names in groups.items():
        with ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            for name in names:
                pieces = [(piece, opened[piece.file].get_tensor(piece.name)) for piece in stored[name].pieces]
                yield name, pieces[0][1] if pieces[0][0].index == () else joined(stored[name].shape, pieces)


def joined(shape: tuple[int, ...], pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    """The whole tensor that pieces cover."""
    whole = torch.empty(shape, dtype=pieces[0][1].dtype)
    for piece, part in pieces:
        whole[piece.index] = part
    return whole


def write_shards(directory: Path, tensors: list[Planned], texts: dict[str, str], max_shard_bytes: int) -> None:
    """Writes tensors as `model.safetensors`, or as shards of at most `max_shard_bytes` with their index, and the texts.

    Everything is written beside first and moved in when it is complete, texts last; weights that were there are replaced,
    other files stay. Raises `RunError` when the disk is full, and leaves what was there.
    """
    shards = split(tensors, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    if len(shards) > 1:
        placed = {each.name: file for file, shard in zip(names, shards, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(each.bytes for each in tensors)}, "weight_map": placed}
        texts = {INDEX: json.dumps(index, indent=2) + "\n", **texts}
    partial = directory / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, shard in zip(names, shards, strict=True):
            save_file({each.name: each.load() for each in shard}, partial / file, metadata={"format": "pt"})
            sync(partial / file)
        for file, text in texts.items():
            (partial / file).write_text(text)
            sync(partial / file)
        for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
            old.unlink(missing_ok=True)
        for file in [*names, *texts]:
            (partial / file).rename(directory / file)
        sync(directory)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"could not write {directory} ({error}): what was there is unchanged. Make room, or name another directory"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def split(tensors: list[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Tensors in order, as many a shard as fit; one that is larger than a shard gets its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for each in tensors:
        if shards[-1] and size + each.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.bytes
    return shards


def sync(path: Path) -> None:
    """Waits until a file, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
