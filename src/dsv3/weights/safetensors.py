"""A directory of safetensors files in Hugging Face's layout: `model.safetensors`, or several shards and their index."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Of the names that safetensors headers use, those of weights and of their scales."""
HEADER_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """What a tensor is, apart from its values."""

    dtype: str
    """The name in safetensors headers: "F32", "BF16", "F8_E4M3", ..."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values. A dtype's name tells the bits of an element, torch's names too: F8_E4M3, BF16, int64; bool has eight."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and which part it is of the tensor that is meant."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    index: tuple[slice, ...] = ()
    """`whole[index]`; () is the whole."""


@dataclass(frozen=True)
class Stored(Layout):
    """What the headers of a directory's files say of one tensor."""

    pieces: tuple[Piece, ...]
    """One in Hugging Face's layout; one a rank where a tensor is split among ranks."""

    @property
    def file(self) -> Path:
        """Where it lies, or begins."""
        return self.pieces[0].file


@dataclass(frozen=True)
class Survey:
    """What a directory holds, as far as its files can be read."""

    files: list[Path]
    """Those that there should be."""
    tensors: dict[str, Stored]
    announced: frozenset[str]
    """Names that the index promises."""
    problems: list[str]
    """A sentence for every file that is missing or damaged, and for every tensor that files and index disagree about."""


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory by its name; no tensor is read.

    Raises `UserError` when there are only pickles, a file is missing, truncated or no safetensors file, two files hold
    the same tensor, or index and files disagree.
    """
    found = survey(directory)
    if found.problems:
        raise UserError(found.problems[0])
    return found.tensors


def survey(directory: Path) -> Survey:
    """The same with a list of all that is wrong. Raises `UserError` where there is no file to look for."""
    index = directory / INDEX
    placed = read_index(index) if index.exists() else {}
    if not placed and not (directory / SINGLE).exists():
        raise UserError(no_weights(directory))
    files = [directory / file for file in sorted(set(placed.values())) or [SINGLE]]
    tensors: dict[str, Stored] = {}
    problems, whole = [], set()
    for file in files:
        if not file.is_file():
            name = next(name for name, each in placed.items() if each == file.name)
            problems.append(
                f"{index} places tensor {name} in {file.name}, which does not exist: the directory is incomplete, fetch the "
                "file again"
            )
            continue
        try:
            held = read_header(file)
        except UserError as error:
            problems.append(str(error))
            continue
        whole.add(file.name)
        for name in held:
            if name in tensors:
                problems.append(f"tensor {name} is in {tensors[name].file} and in {file}; expected it in one of them")
            elif placed and placed.get(name) != file.name:
                problems.append(f"{file} holds tensor {name}, but {index} places it in {placed.get(name)}")
        tensors |= held
    for name, place in placed.items():
        if name not in tensors and place in whole:
            problems.append(f"{index} places tensor {name} in {place}, but {directory / place} lacks it")
    return Survey(files, tensors, frozenset(placed), problems)


def read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by a name in the index's own directory; whether it is there is not looked at."""
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
    return placed


def refuse_escape(file: Path) -> None:
    """Refuses a link that leads out of its directory, other than into the blobs of a hub's cache, whose snapshots are links."""
    directory, target = file.parent.resolve(), file.resolve()
    blobs = directory.parent.parent / "blobs"
    if not (target.is_relative_to(directory) or (directory.parent.name == "snapshots" and target.parent == blobs)):
        raise UserError(f"{file} is a link to {target}, outside its directory: expected the file itself")


def read_header(file: Path) -> dict[str, Stored]:
    """What one file holds; opening it also checks that the header is sound and the data complete."""
    refuse_escape(file)
    try:
        with safe_open(file, framework="pt"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(length))
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(
            f"{file} ({size:,} bytes) is truncated or no safetensors file ({error}): fetch or write it again"
        ) from None
    entries.pop("__metadata__", None)
    found = {}
    for name, each in entries.items():
        shape = tuple(each["shape"])
        piece = Piece(file, name, shape, 8 + length + each["data_offsets"][0])
        found[name] = Stored(each["dtype"], shape, (piece,))
    return found


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


def read_tensor(stored: Stored) -> Tensor:
    """One tensor, copied from its file or files. Nothing is mapped: mapped files would count as memory of the process."""
    parts = [read_piece(piece, DTYPES[stored.dtype]) for piece in stored.pieces]
    if stored.pieces[0].index == ():
        return parts[0]
    whole = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    for piece, part in zip(stored.pieces, parts, strict=True):
        whole[piece.index] = part
    return whole


def read_piece(piece: Piece, dtype: torch.dtype) -> Tensor:
    """A tensor of a file."""
    tensor = torch.empty(piece.shape, dtype=dtype)
    with piece.file.open("rb") as file:
        file.seek(piece.offset)
        count = file.readinto(tensor.flatten().view(torch.uint8).numpy().data)
    if count != tensor.nbytes:
        raise UserError(f"{piece.file} ended within tensor {piece.name}: has it been changed since it was opened?")
    return tensor
