"""A released model into modules: what must be there, what it becomes, and which part of it a rank needs."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.errors import UserError, nearest
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Experts
from dsv3.model.linear import Linear
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.block_scaled import BLOCK, scale_shape
from dsv3.weights.chunks import STACK, part_of
from dsv3.weights.names import KEPT_FLOAT32, SCALE, Part, is_block_scaled, is_mtp, released
from dsv3.weights.released import FP8, Converted, Released, skeleton
from dsv3.weights.shards import DTYPES, Layout

log = logging.getLogger(__name__)
NAMED = 1000
"""Names among which the nearest one is looked for."""


@dataclass(frozen=True)
class Place:
    """Where a released tensor belongs."""

    ours: str
    part: Part


def places_of(model: DeepSeekV3) -> dict[str, Place]:
    """The place of every released tensor of a model, copies of embedding and head included."""
    return {
        part.name: Place(ours, part)
        for ours, tensor in model.state_dict().items()
        for part in released(ours, tuple(tensor.shape), model.config)
    }


def published(config: ModelConfig) -> dict[str, Layout]:
    """Every tensor of a released FP8 checkpoint of this config, as DeepSeek published its own (README_WEIGHTS)."""
    found: dict[str, Layout] = {}
    for name, place in places_of(skeleton(config)).items():
        dtype = FP8 if is_block_scaled(name) else "F32" if name.endswith(KEPT_FLOAT32) else "BF16"
        found[name] = Layout(dtype, place.part.shape)
        if dtype == FP8:
            found[name + SCALE] = Layout("F32", scale_shape(place.part.shape))
    return found


def checked(source: Released) -> ModelConfig:
    """The config that the tensors fit, which has no MTP modules where none of theirs is stored.

    Raises `UserError` naming file or directory, tensor, found and expected, when one is missing, unexpected, of another
    shape or of a dtype that weights do not have; no tensor is read.
    """
    config, stored = source.config, source.layout
    refuse_other_blocks(source)
    if config.num_nextn_predict_layers and not any(is_mtp(name, config) for name in stored):
        log.warning(
            "%s announces %d MTP modules and holds none of their tensors: loading without MTP",
            source.where,
            config.num_nextn_predict_layers,
        )
        config = config.replace(num_nextn_predict_layers=0)
    expected: dict[str, tuple[int, ...]] = {}
    needed = []
    for name, place in places_of(skeleton(config)).items():
        expected[name] = place.part.shape
        if not place.part.copy:
            needed.append(name)
        if is_fp8(name, source) and len(place.part.shape) == 2:
            expected[name + SCALE] = scale_shape(place.part.shape)
            needed.append(name + SCALE)
    missing = [name for name in needed if name not in stored]
    if missing:
        raise UserError(
            f"{source.where} lacks {len(missing)} of the {len(needed)} tensors that its config asks for: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. "
            "Was a shard left out, or is the config another model's?"
        )
    for name, each in stored.items():
        where = getattr(each, "file", source.where)
        if name not in expected:
            hint = nearest(name, expected) if len(expected) < NAMED else "expected those of a deepseek_v3 model"
            raise UserError(
                f"{where}: unexpected tensor {name} of shape {list(each.shape)}, which its config has no place for; {hint}"
            )
        if each.shape != expected[name]:
            raise UserError(
                f"{where}: tensor {name} has shape {list(each.shape)}, but its config asks for {list(expected[name])}"
            )
        high = ("F32", "BF16") if len(each.shape) < 2 else ("F32", "BF16", FP8)
        legal = ("F32", "F8_E8M0") if name.endswith(SCALE) else high
        if each.dtype not in legal:
            raise UserError(f"{where}: tensor {name} is {each.dtype}, expected {' or '.join(legal)}")
    return config


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


def load(source: Released, dtype: torch.dtype | None, device: torch.device | str | None) -> DeepSeekV3:
    """The model, its tensors read one by one into its own, so that memory holds it once.

    `dtype` is what weights become; None: what they are, FP8 included, which then stays untrained. The routing bias is FP32
    always. `device`: None is the CPU. Raises `UserError` as `checked` does, and where what is stored cannot be kept as it is.
    """
    config = checked(source)
    wanted = source if dtype is None else Converted(source, dtype)
    model = skeleton_for(wanted, config)
    tensors = {
        ours: torch.empty(tensor.shape, dtype=dtype_of(ours, tensor, wanted, config), device=device or "cpu")
        for ours, tensor in model.state_dict().items()
    }
    fill(tensors, wanted, config)
    model.load_state_dict(tensors, assign=True)
    compare_copies(source, config)
    return model


def skeleton_for(source: Released, config: ModelConfig) -> DeepSeekV3:
    """A model without values, with room for FP8 where weights are stored in it: in attention, feed-forward and experts."""
    model = skeleton(config)
    stored = {place.ours for name, place in places_of(model).items() if is_fp8(name, source)}
    inside = {module for block in model.blocks() for module in block.modules() if isinstance(module, Linear | Experts)}
    for name, module in model.named_modules():
        weights = {f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)}
        if not weights & stored:
            continue
        if module not in inside or not weights <= stored:
            raise UserError(
                f"{source.where} stores {min(weights & stored)} in FP8, which is kept only in the linear layers of attention "
                "and feed-forward, and in all matrices of the experts or none: name a dtype that weights should become"
            )
        assert isinstance(module, Linear | Experts)
        module.keep_in_fp8()
    return model


def is_fp8(name: str, source: Released) -> bool:
    """Whether a released tensor is stored, and in FP8."""
    return name in source.layout and source.layout[name].dtype == FP8


def dtype_of(ours: str, tensor: Tensor, source: Released, config: ModelConfig) -> torch.dtype:
    """The one dtype in which all parts of one of our tensors are stored; that of the routing bias is FP32."""
    if ours.endswith(KEPT_FLOAT32):
        return torch.float32
    parts = [part.name for part in released(ours, tuple(tensor.shape), config) if not part.copy]
    first = source.layout[parts[0]].dtype
    for name in parts:
        if source.layout[name].dtype != first:
            raise UserError(
                f"{getattr(source.layout[name], 'file', source.where)}: tensor {name} is {source.layout[name].dtype}, but "
                f"{parts[0]} is {first}, and all experts of a layer are kept in one dtype: name the one they should become"
            )
    return DTYPES[first]


def fill(tensors: Mapping[str, Tensor], source: Released, config: ModelConfig, experts: range | None = None) -> None:
    """Reads what belongs into these tensors of ours (by name, cast to their dtype), and nothing else.

    A rank that holds some of the layers names those; one that holds some of the experts gives stacks of these alone.
    """
    every = range(config.n_routed_experts)
    for ours, tensor in tensors.items():
        stack = tensor.dim() == STACK
        held = (experts or every) if stack else every
        shape = (len(every), *tensor.shape[1:]) if stack else tuple(tensor.shape)
        for part in released(ours, shape, config):
            if part.copy or (stack and part.start[0] not in held):
                continue
            start = (part.start[0] - held.start, *part.start[1:]) if stack else part.start
            part_of(tensor, start, part.size).copy_(source.read(part.name).view(part.size))


def compare_copies(source: Released, config: ModelConfig) -> None:
    """One log line for each stored copy of embedding or head that differs from the original, which is used instead."""
    for ours in ("embed_tokens.weight", "lm_head.weight"):
        original, *copies = released(ours, (config.vocab_size, config.hidden_size), config)
        for copy in copies:
            if copy.name in source.layout and not torch.equal(source.read(copy.name), source.read(original.name)):
                where = getattr(source.layout[copy.name], "file", source.where)
                log.warning("%s: %s differs from %s, which is used instead", where, copy.name, ours)
