"""Stored tensors against the network that their config describes: which are missing, unexpected, or of the wrong shape."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsv3.errors import UserError, nearest
from dsv3.model.config import ModelConfig
from dsv3.ops.block_scaled import BLOCK, scale_shape
from dsv3.weights.names import SCALE, is_block_scaled, is_mtp
from dsv3.weights.released import FP8, Released, places_of, skeleton
from dsv3.weights.safetensors import Layout

log = logging.getLogger(__name__)
NAMED = 1000
"""Names among which the nearest one is looked for."""


@dataclass(frozen=True)
class Fit:
    """How tensors fit a config."""

    config: ModelConfig
    """As the tensors mean it: of MTP depth 0 where no module is stored."""
    needed: int
    """Tensors that must be there: copies of embedding and head need not."""
    missing: list[str]
    unexpected: list[str]
    misfits: dict[str, str]
    """A sentence for every tensor of another shape, or of a dtype that weights do not have."""


def fit(config: ModelConfig, stored: Mapping[str, Layout], announced: Iterable[str] = ()) -> Fit:
    """Compares; `announced` are names that an index lists, stored or not.

    FP8 weights need scales: weights that are stored in FP8 and, under a `quantization_config`, those that the released
    checkpoints have in FP8.
    """
    if not any(is_mtp(name, config) for name in (*stored, *announced)):
        config = config.replace(num_nextn_predict_layers=0)
    shapes: dict[str, tuple[int, ...]] = {}
    needed = []
    for name, (_, part) in places_of(skeleton(config)).items():
        shape = shapes[name] = part.shape
        if not part.copy:
            needed.append(name)
        absent = name not in stored and "quantization_config" in config.extra and is_block_scaled(name)
        if absent or (name in stored and stored[name].dtype == FP8 and len(shape) == 2):
            shapes[name + SCALE] = scale_shape(shape)
            needed.append(name + SCALE)
    missing = [name for name in needed if name not in stored]
    unexpected = [name for name in stored if name not in shapes]
    said = {name: misfit(name, each, shapes[name]) for name, each in stored.items() if name in shapes}
    return Fit(config, len(needed), missing, unexpected, {name: each for name, each in said.items() if each})


def misfit(name: str, found: Layout, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that has a place."""
    legal = ("F32", "F8_E8M0") if name.endswith(SCALE) else ("F32", "BF16", FP8)[: 2 + (len(shape) > 1)]
    if found.shape != shape:
        return f"{name} has shape {list(found.shape)}, expected {list(shape)}"
    return None if found.dtype in legal else f"{name} is {found.dtype}, expected {' or '.join(legal)}"


def checked(source: Released) -> ModelConfig:
    """The config that the tensors fit, which has no MTP modules where none of theirs is stored.

    Raises `UserError` naming file or directory, tensor, found and expected, when one is missing, unexpected, of another
    shape or of a dtype that weights do not have; no tensor is read.
    """
    refuse_other_blocks(source)
    found, stored, depth = fit(source.config, source.layout), source.layout, source.config.num_nextn_predict_layers
    if found.config.num_nextn_predict_layers < depth:
        said = "%s announces %d MTP modules and holds none of their tensors: loading without MTP"
        log.warning(said, source.where, depth)
    if found.missing:
        raise UserError(
            f"{source.where} lacks {len(found.missing)} of the {found.needed} tensors that its config asks for: "
            f"{', '.join(found.missing[:3])}{', ...' if len(found.missing) > 3 else ''}. "
            "Was a shard left out, or is the config another model's?"
        )
    for name in found.unexpected:
        places = places_of(skeleton(found.config))
        hint = nearest(name, places) if len(places) < NAMED else "expected those of a deepseek_v3 model"
        raise UserError(
            f"{file_of(name, source)}: unexpected tensor {name} of shape {list(stored[name].shape)}, which its config has no "
            f"place for; {hint}"
        )
    for name, said in found.misfits.items():
        raise UserError(f"{file_of(name, source)}: tensor {said}")
    return found.config


def file_of(name: str, source: Released) -> str:
    """Where a tensor is stored, for messages."""
    return str(getattr(source.layout[name], "file", source.where))


def refuse_other_blocks(source: Released) -> None:
    """`quantization_config` must be the released one: FP8, E4M3, blocks of 128 x 128."""
    found = source.config.extra.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise UserError(f"{source.where}: quantization_config = {found!r}, expected an object of fields and values")
    legal = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([BLOCK, BLOCK], (BLOCK, BLOCK))}
    for key, values in legal.items():
        if found.get(key) not in values:
            raise UserError(
                f"{source.where}: quantization_config has {key} = {found.get(key)!r}, expected {values[0]!r}: of quantised "
                "weights, those in FP8 with 128 x 128 blocks are read"
            )
