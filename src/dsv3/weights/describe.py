"""What a directory of weights holds, from its headers alone: `dsv3 info checkpoint`.

Loading refuses a directory in which something is missing; this reports what.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.weights import deepseek
from dsv3.weights.checkpoint import MODEL
from dsv3.weights.fit import Fit, fit
from dsv3.weights.names import SCALE, is_mtp
from dsv3.weights.opening import is_published, open_weights
from dsv3.weights.released import FP8, ReleasedCheckpoint
from dsv3.weights.safetensors import HEADER_NAMES, Layout, survey


class Share(NamedTuple):
    """Some of the stored tensors, together. Scales of FP8 weights are tensors and bytes, but no parameters."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """A directory of weights."""

    path: Path
    layout: str
    """"Hugging Face", "DeepSeek inference" or "training checkpoint"."""
    fit: Fit
    """How the tensors fit the config."""
    tensors: Mapping[str, Layout]
    """By their released names."""
    files: list[Path]
    """Those that are there."""
    tokenizer: bool
    beside: Mapping[str, Share] = field(default_factory=dict)
    """What a training checkpoint holds besides the model: the optimizer's state, ..."""
    problems: list[str] = field(default_factory=list)
    """A sentence for every file that is missing or damaged, and for what else does not agree."""

    @property
    def config(self) -> ModelConfig:
        """As the stored tensors mean it."""
        return self.fit.config

    @property
    def main(self) -> Share:
        """The main model's tensors, as far as its config asks for them."""
        return share(each for each in self.fitting() if not is_mtp(each[0], self.config))

    @property
    def mtp(self) -> Share:
        """The MTP modules' tensors, with the copies of embedding and head that are stored with them."""
        return share(each for each in self.fitting() if is_mtp(each[0], self.config))

    @property
    def dtypes(self) -> dict[str, Share]:
        """All tensors of the model by dtype, as safetensors headers name it."""
        names = sorted({each.dtype for each in self.tensors.values()})
        return {dtype: share(each for each in self.tensors.items() if each[1].dtype == dtype) for dtype in names}

    @property
    def total(self) -> Share:
        """All tensors of the model."""
        return share(self.tensors.items())

    @property
    def file_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How weights are quantised, as far as config and headers say; None: they are not."""
        said = self.config.extra.get("quantization_config")
        count = sum(each.dtype == FP8 for each in self.tensors.values())
        if not said and not count:
            return None
        values = said if isinstance(said, Mapping) else {}
        eight_bit_scales = any(each.dtype == "F8_E8M0" for each in self.tensors.values())
        return {
            "method": values.get("quant_method"),
            "format": values.get("fmt", "e4m3" if count else None),
            "block": values.get("weight_block_size"),
            "scale_format": "ue8m0" if eight_bit_scales else values.get("scale_fmt", "float32"),
            "tensors": count,
        }

    def fitting(self) -> Iterable[tuple[str, Layout]]:
        """The tensors that have a place."""
        unexpected = set(self.fit.unexpected)
        return ((name, each) for name, each in self.tensors.items() if name not in unexpected)


def describe(path: Path) -> Description:
    """What is stored at a path, which `open_weights` would take; no tensor is read.

    Missing and damaged files, and tensors that are missing or do not fit, are part of the description. Raises `UserError`
    when there is no config, or no file that can be read, and for a checkpoint or DeepSeek's layout as when loading.
    """
    if is_published(path) and not deepseek.is_deepseek(path):
        return describe_hugging_face(path)
    source, tokenizer = open_weights(path)
    has_tokenizer = (tokenizer / "tokenizer.json").is_file()
    if not isinstance(source, ReleasedCheckpoint):
        found, files = fit(source.config, source.layout), deepseek.rank_files(path)
        return Description(path, "DeepSeek inference", found, source.layout, files, has_tokenizer)
    beside: dict[str, list[tuple[str, Layout]]] = {}
    for name, (dtype, shape) in source.reader.layout.items():
        if not name.startswith(MODEL):
            layout = Layout(HEADER_NAMES.get(dtype, str(dtype).removeprefix("torch.")), tuple(shape))
            beside.setdefault(name.partition(".")[0], []).append((name, layout))
    # Embedding and head are stored once there, whatever the released form repeats.
    tensors = {name: each for name, each in source.layout.items() if not source.places[name][1].copy}
    return Description(
        path, "training checkpoint", fit(source.config, tensors), tensors, sorted(Path(source.where).glob("*.distcp")),
        has_tokenizer, {part: share(held) for part, held in beside.items()},
    )  # fmt: skip


def describe_hugging_face(directory: Path) -> Description:
    """Every file that can be read, whatever the others are like."""
    config, found = ModelConfig.from_hf(directory), survey(directory)
    if not found.tensors:
        raise UserError(f"{directory} has no file with weights that can be read: {'; '.join(found.problems[:3])}")
    fitting, depth = fit(config, found.tensors, found.announced), config.num_nextn_predict_layers
    if fitting.config.num_nextn_predict_layers < depth:
        found.problems.append(f"none of the {depth} MTP modules that the config announces is stored")
    return Description(
        directory, "Hugging Face", fitting, found.tensors, [file for file in found.files if file.is_file()],
        (directory / "tokenizer.json").is_file(), problems=found.problems,
    )  # fmt: skip


def share(tensors: Iterable[tuple[str, Layout]]) -> Share:
    """The sums over some tensors."""
    held = list(tensors)
    parameters = sum(math.prod(each.shape) for name, each in held if not name.endswith(SCALE))
    return Share(len(held), parameters, sum(each.bytes for _, each in held))
