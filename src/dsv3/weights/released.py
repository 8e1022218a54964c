"""A model in its released form, wherever it is stored: tensors by their released names, read one at a time.

Loading, importing and exporting use this form only, so that it does not matter whether the weights are in Hugging Face's
layout, in DeepSeek's, in a training checkpoint or in memory.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import dequantize, quantize, scale_shape
from dsv3.weights.checkpoint import EMA, MODEL
from dsv3.weights.names import KEPT_FLOAT32, SCALE, Part, is_block_scaled, released
from dsv3.weights.parts import Region, part_of
from dsv3.weights.safetensors import DTYPES, HEADER_NAMES, Layout, Stored, read_tensor
from dsv3.weights.tensor_directory import ChunkReader

FP8 = "F8_E4M3"


class Released(Protocol):
    """A model in the released form."""

    @property
    def where(self) -> str:
        """Where it is stored, for messages."""

    @property
    def config(self) -> ModelConfig:
        """The network's shape; what else its `config.json` holds is in `extra`."""

    @property
    def layout(self) -> Mapping[str, Layout]:
        """Every tensor, the scales of FP8 weights included, by its released name."""

    @property
    def fingerprint(self) -> str:
        """Changes when the stored values may have changed."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; may be called by several threads."""


def skeleton(config: ModelConfig) -> DeepSeekV3:
    """A model without values."""
    with torch.device("meta"):
        return DeepSeekV3(config)


def places_of(model: DeepSeekV3) -> dict[str, tuple[str, Part]]:
    """(our tensor, which part of it) for every released tensor of a model, copies of embedding and head included."""
    return {
        part.name: (ours, part)
        for ours, tensor in model.state_dict().items()
        for part in released(ours, tuple(tensor.shape), model.config)
    }


class ReleasedFiles:
    """Safetensors files in Hugging Face's layout or DeepSeek's, as their headers describe them."""

    def __init__(self, directory: Path, config: ModelConfig, stored: Mapping[str, Stored]):
        self.where, self.config, self.layout = str(directory), config, stored

    @property
    def fingerprint(self) -> str:
        """See `Released`: names, layouts, and the files' sizes and times."""
        return digest(self.layout, stamps({piece.file for each in self.layout.values() for piece in each.pieces}))

    def read(self, name: str) -> Tensor:
        """See `Released`."""
        return read_tensor(self.layout[name])


class ReleasedTensors:
    """Tensors of ours (name -> dtype, shape) under their released names. Raises `UserError` for dtypes that weights do not have."""

    def __init__(self, where: str, config: ModelConfig, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]):
        self.where, self.config = where, config
        self.places: dict[str, tuple[str, Part]] = {}
        layout = {}
        for ours, (dtype, shape) in tensors.items():
            if dtype not in HEADER_NAMES:
                raise UserError(f"{where}: {ours} is {dtype}, expected one of {', '.join(map(str, HEADER_NAMES))}")
            for part in released(ours, tuple(shape), config):
                self.places[part.name] = ours, part
                layout[part.name] = Layout(HEADER_NAMES[dtype], part.shape)
        # Scales right behind their weights, as they are written and read.
        weights = (name for name in layout if not name.endswith(SCALE))
        self.layout = {each: layout[each] for name in weights for each in (name, name + SCALE) if each in layout}


class ReleasedCheckpoint(ReleasedTensors):
    """The model of a training checkpoint, or with `EMA` the average of its weights; whatever else that holds is left alone.

    Raises `UserError` when the checkpoint holds none.
    """

    def __init__(self, directory: Path, config: ModelConfig, prefix: str = MODEL):
        self.reader, self.prefix = ChunkReader(directory), prefix
        found = {
            name.removeprefix(prefix): each for name, each in self.reader.layout.items() if name.startswith(prefix)
        }
        if prefix == EMA and not found:
            raise UserError(
                f"{directory} holds no average of the weights: its run had no training.ema_decay. Leave --ema out"
            )
        order = {ours: i for i, ours in enumerate(skeleton(config).state_dict())}
        names = sorted(found, key=lambda ours: order.get(ours.removesuffix(SCALE), len(order)))
        super().__init__(str(directory), config, {ours: found[ours] for ours in names})

    @property
    def fingerprint(self) -> str:
        """See `Released`: another one after every save."""
        return digest(self.layout, stamps(each for each in self.reader.directory.iterdir() if each.is_file()))

    def read(self, name: str) -> Tensor:
        """See `Released`."""
        ours, part = self.places[name]
        return self.reader.read(Region(self.prefix + ours, part.start, part.size)).view(part.shape)


class ReleasedModel(ReleasedTensors):
    """A model in memory; what is read shares its storage where that lies on the CPU."""

    def __init__(self, model: DeepSeekV3):
        self.state = model.state_dict()
        tensors = {ours: (tensor.dtype, tensor.shape) for ours, tensor in self.state.items()}
        super().__init__("the model", model.config, tensors)
        self.fingerprint = secrets.token_hex()

    def read(self, name: str) -> Tensor:
        """See `Released`."""
        ours, part = self.places[name]
        return part_of(self.state[ours], part.start, part.size).reshape(part.shape).detach().cpu()


class Converted:
    """Another released model, its weights in one dtype: FP32, BF16, or FP8 where the released FP8 checkpoints have it.

    FP8 blocks are multiplied by their scales; the routing bias stays FP32. To FP8, weights that are in FP8 already stay as
    they are, and others are rounded to BF16 where they do not become FP8.
    """

    def __init__(self, source: Released, dtype: torch.dtype, power_of_two: bool = False):
        self.source, self.dtype, self.power_of_two = source, dtype, power_of_two
        self.where, self.config = source.where, source.config
        self.scales: dict[str, Tensor] = {}
        self.layout: dict[str, Layout] = {}
        for name, each in source.layout.items():
            if name.endswith(SCALE):
                continue
            self.layout[name] = Layout(self.dtype_of(name, each), each.shape)
            if self.layout[name].dtype == FP8:
                self.layout[name + SCALE] = source.layout.get(name + SCALE, Layout("F32", scale_shape(each.shape)))

    def dtype_of(self, name: str, found: Layout) -> str:
        """What a tensor becomes, as headers name it."""
        if name.endswith(KEPT_FLOAT32):
            return "F32"
        if self.dtype != DTYPES[FP8]:
            return HEADER_NAMES[self.dtype]
        return FP8 if found.dtype == FP8 or is_block_scaled(name) else "BF16"

    @property
    def fingerprint(self) -> str:
        """See `Released`."""
        return digest(self.layout, [self.source.fingerprint, str(self.dtype), self.power_of_two])

    def read(self, name: str) -> Tensor:
        """See `Released`."""
        if name.endswith(SCALE):
            if name in self.source.layout:
                return self.source.read(name)
            if name not in self.scales:
                self.read(name.removesuffix(SCALE))
            return self.scales.pop(name)
        tensor, wanted = self.source.read(name), DTYPES[self.layout[name].dtype]
        if tensor.dtype == wanted:
            return tensor
        if tensor.dtype == DTYPES[FP8]:
            return dequantize(tensor, self.source.read(name + SCALE), wanted)
        if wanted != DTYPES[FP8]:
            return tensor.to(wanted)
        try:
            values, self.scales[name + SCALE] = quantize(tensor, self.power_of_two)
        except UserError as error:
            raise UserError(f"{self.where}: {name}: {error}") from None
        return values


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of files, in the order of names."""
    return [(file.name, (known := file.stat()).st_size, known.st_mtime_ns) for file in sorted(files)]


def digest(layout: Mapping[str, Layout], more: object) -> str:
    """One hash of names, dtypes and shapes, and of what else identifies the values."""
    described = [(name, each.dtype, each.shape) for name, each in layout.items()]
    return hashlib.sha256(repr((described, more)).encode()).hexdigest()
