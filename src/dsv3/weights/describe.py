"""What a directory of weights holds, from its headers alone: `dsv3 info checkpoint`.

Loading refuses a directory in which something is missing; this reports what.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.ops.block_scaled import scale_shape
from dsv3.weights import deepseek
from dsv3.weights.checkpoint import MODEL
from dsv3.weights.loading import places_of, skeleton
from dsv3.weights.names import SCALE, is_block_scaled, is_mtp
from dsv3.weights.opening import is_published, open_weights
from dsv3.weights.released import FP8, ReleasedCheckpoint
from dsv3.weights.shards import HEADER_NAMES, INDEX, Layout, Stored, files_of, read_header, read_index


class Share(NamedTuple):
    """Some of the stored tensors, together. Scales of FP8 weights are tensors and bytes, but no parameters."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """What was found where, before it is compared with the config."""

    layout: str
    config: ModelConfig
    tensors: Mapping[str, Layout]
    """By their released names."""
    files: list[Path]
    tokenizer: Path
    announced: frozenset[str] = frozenset()
    """Names that an index promises."""
    beside: Mapping[str, Share] = field(default_factory=dict)
    """What a training checkpoint holds besides the model: the optimizer's state, ..."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Description:
    """A directory of weights."""

    path: Path
    layout: str
    """"Hugging Face", "DeepSeek inference" or "training checkpoint"."""
    config: ModelConfig
    """As the stored tensors mean it: of MTP depth 0 where no module is stored."""
    main: Share
    """The main model's tensors, as far as its config asks for them."""
    mtp: Share
    """The MTP modules' tensors, with the copies of embedding and head that are stored with them."""
    unexpected: Mapping[str, Layout]
    """Tensors that the config has no place for."""
    dtypes: Mapping[str, Share]
    """All tensors of the model by dtype, as safetensors headers name it."""
    beside: Mapping[str, Share]
    missing: list[str]
    misfits: list[str]
    """A sentence for every tensor of another shape, or of a dtype that weights do not have."""
    problems: list[str]
    """A sentence for every file that is missing or damaged, and for what else does not agree."""
    quantization: Mapping[str, Any] | None
    files: int
    file_bytes: int
    tokenizer: bool

    @property
    def total(self) -> Share:
        """All tensors of the model."""
        return Share(*map(sum, zip((0, 0, 0), *self.dtypes.values(), strict=True)))


def describe(path: Path) -> Description:
    """What is stored at a path, which `open_weights` would take; no tensor is read.

    Missing and damaged files, and tensors that are missing or do not fit, are part of the description. Raises `UserError`
    when there is no config, or no file that can be read.
    """
    in_files = is_published(path) and not deepseek.is_deepseek(path)
    found = survey_hugging_face(path) if in_files else survey_others(path)
    config, problems = found.config, list(found.problems)
    names = found.tensors.keys() | found.announced
    if config.num_nextn_predict_layers and not any(is_mtp(name, config) for name in names):
        problems.append(
            f"none of the {config.num_nextn_predict_layers} MTP modules that the config announces is stored"
        )
        config = config.replace(num_nextn_predict_layers=0)
    shapes, copies = expected_shapes(config, found.tensors)
    known = {name: each for name, each in found.tensors.items() if name in shapes}
    by_dtype: dict[str, dict[str, Layout]] = {}
    for name, each in found.tensors.items():
        by_dtype.setdefault(each.dtype, {})[name] = each
    present = [file for file in found.files if file.is_file()]
    return Description(
        path=path,
        layout=found.layout,
        config=config,
        main=share((name, each) for name, each in known.items() if not is_mtp(name, config)),
        mtp=share((name, each) for name, each in known.items() if is_mtp(name, config)),
        unexpected={name: each for name, each in found.tensors.items() if name not in shapes},
        dtypes={dtype: share(by_dtype[dtype].items()) for dtype in sorted(by_dtype)},
        beside=found.beside,
        missing=[name for name in shapes if name not in found.tensors and name not in copies],
        misfits=[sentence for name, each in known.items() if (sentence := misfit(name, each, shapes[name]))],
        problems=problems,
        quantization=quantization(config, found.tensors),
        files=len(present),
        file_bytes=sum(file.stat().st_size for file in present),
        tokenizer=(found.tokenizer / "tokenizer.json").is_file(),
    )


def survey_hugging_face(directory: Path) -> Contents:
    """Every file that can be read, whatever the others are like."""
    config = ModelConfig.from_hf(directory)
    placed = read_index(directory / INDEX) if (directory / INDEX).exists() else None
    files = files_of(directory, placed)
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for file in files:
        if not file.is_file():
            problems.append(f"{file.name} is missing")
            continue
        try:
            held = read_header(file)
        except UserError as error:
            problems.append(str(error))
            continue
        twice = sorted(held.keys() & tensors.keys())
        problems += [f"{name} is in {tensors[name].file.name} and in {file.name}" for name in twice]
        tensors.update(held)
    if not tensors:
        raise UserError(f"{directory} has no file with weights that can be read: {'; '.join(problems[:3])}")
    for name, each in tensors.items():
        if placed is not None and placed.get(name) != each.file.name:
            problems.append(f"{name} is in {each.file.name}, but {INDEX} places it in {placed.get(name)}")
    return Contents("Hugging Face", config, tensors, files, directory, frozenset(placed or ()), problems=problems)


def survey_others(path: Path) -> Contents:
    """A training checkpoint or DeepSeek's layout: whole, or refused as when loading."""
    source, tokenizer = open_weights(path)
    if not isinstance(source, ReleasedCheckpoint):
        return Contents("DeepSeek inference", source.config, source.layout, deepseek.rank_files(path), tokenizer)
    directory = Path(source.where)
    beside: dict[str, list[tuple[str, Layout]]] = {}
    for name, (dtype, shape) in source.reader.layout.items():
        if not name.startswith(MODEL):
            layout = Layout(HEADER_NAMES.get(dtype, str(dtype).removeprefix("torch.")), tuple(shape))
            beside.setdefault(name.partition(".")[0], []).append((name, layout))
    # Embedding and head are stored once there, whatever the released form repeats.
    tensors = {name: each for name, each in source.layout.items() if not source.places[name][1].copy}
    return Contents(
        "training checkpoint", source.config, tensors, sorted(directory.glob("*.distcp")), tokenizer,
        beside={part: share(held) for part, held in beside.items()},
    )  # fmt: skip


def expected_shapes(config: ModelConfig, stored: Mapping[str, Layout]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The shape of every tensor that the config asks for, and the names of copies, which may be left out.

    FP8 weights have scales; those are weights that are stored in FP8 and, under a `quantization_config`, those that the
    released checkpoints keep so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    copies: set[str] = set()
    for name, place in places_of(skeleton(config)).items():
        shapes[name] = place.part.shape
        if place.part.copy:
            copies.add(name)
        quantised = name not in stored and "quantization_config" in config.extra and is_block_scaled(name)
        if quantised or (name in stored and stored[name].dtype == FP8):
            shapes[name + SCALE] = scale_shape(place.part.shape)
    return shapes, copies


def misfit(name: str, found: Layout, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that has a place."""
    legal = ("F32", "F8_E8M0") if name.endswith(SCALE) else ("F32", "BF16", FP8)
    if found.shape != shape:
        return f"{name} has shape {list(found.shape)}, expected {list(shape)}"
    return None if found.dtype in legal else f"{name} is {found.dtype}, expected {' or '.join(legal)}"


def quantization(config: ModelConfig, stored: Mapping[str, Layout]) -> dict[str, Any] | None:
    """How weights are quantised, as far as config and headers say; None: they are not."""
    said = config.extra.get("quantization_config")
    count = sum(each.dtype == FP8 for each in stored.values())
    if not said and not count:
        return None
    values = said if isinstance(said, Mapping) else {}
    eight_bit_scales = any(each.dtype == "F8_E8M0" for each in stored.values())
    return {
        "method": values.get("quant_method"),
        "format": values.get("fmt", "e4m3" if count else None),
        "block": values.get("weight_block_size"),
        "scale_format": "ue8m0" if eight_bit_scales else values.get("scale_fmt", "float32"),
        "tensors": count,
    }


def share(tensors: Iterable[tuple[str, Layout]]) -> Share:
    """The sums over some tensors."""
    count = parameters = size = 0
    for name, each in tensors:
        elements = math.prod(each.shape)
        count += 1
        parameters += 0 if name.endswith(SCALE) else elements
        size += elements * bits(each.dtype) // 8
    return Share(count, parameters, size)


def bits(dtype: str) -> int:
    """Of one element; a dtype's name has them first, whoever named it: F8_E4M3, BF16, int64; bool has eight."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8
