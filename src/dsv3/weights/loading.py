"""A released model into modules: what must be there, what it becomes, and which part of it a rank needs."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Experts
from dsv3.model.linear import Linear
from dsv3.model.transformer import DeepSeekV3
from dsv3.weights.fit import checked, file_of
from dsv3.weights.names import KEPT_FLOAT32, released
from dsv3.weights.parts import STACK, part_of
from dsv3.weights.released import FP8, Converted, Released, places_of, skeleton
from dsv3.weights.safetensors import DTYPES

log = logging.getLogger(__name__)


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
    in_fp8 = {name for name, each in source.layout.items() if each.dtype == FP8}
    stored = {ours for name, (ours, _) in places_of(model).items() if name in in_fp8}
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


def dtype_of(ours: str, tensor: Tensor, source: Released, config: ModelConfig) -> torch.dtype:
    """The one dtype in which all parts of one of our tensors are stored; that of the routing bias is FP32."""
    if ours.endswith(KEPT_FLOAT32):
        return torch.float32
    parts = [part.name for part in released(ours, tuple(tensor.shape), config) if not part.copy]
    first = source.layout[parts[0]].dtype
    for name in parts:
        if source.layout[name].dtype != first:
            raise UserError(
                f"{file_of(name, source)}: tensor {name} is {source.layout[name].dtype}, but "
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
                where = file_of(copy.name, source)
                log.warning("%s: %s differs from %s, which is used instead", where, copy.name, ours)
