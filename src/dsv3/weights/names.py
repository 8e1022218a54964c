"""Our names and the released ones: the only mapping between them, over names and shapes, without torch.

The released checkpoint (README_WEIGHTS of DeepSeek-V3) stores every expert's three matrices alone, where ours are stacked,
and MTP module k as layer `num_hidden_layers + k`, with copies of the embedding and the head that it shares.
"""

import re
from dataclasses import dataclass

from dsv3.model.config import ModelConfig

KEPT_FLOAT32 = "e_score_correction_bias"
"""The routing bias is FP32 whatever the rest is: steps of 0.001 are lost in BF16."""


@dataclass(frozen=True)
class Part:
    """One tensor of a released checkpoint, and which part of one of ours it is."""

    name: str
    """The released name."""
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]
    """Where it lies in our tensor: `ours[index]`; () is the whole."""
    copy: bool = False
    """True for the embedding and the head stored again with each MTP module."""


def released(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[Part]:
    """The released tensors that our tensor `name` of this shape is stored as; copies come last."""
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    if name == "embed_tokens.weight":
        copies = [f"model.layers.{first + k}.embed_tokens.weight" for k in range(depth)]
        return [Part(f"model.{name}", shape, ()), *(Part(copy, shape, (), copy=True) for copy in copies)]
    if name == "lm_head.weight":
        copies = [f"model.layers.{first + k}.shared_head.head.weight" for k in range(depth)]
        return [Part(name, shape, ()), *(Part(copy, shape, (), copy=True) for copy in copies)]
    if mtp := re.fullmatch(r"mtp\.(\d+)\.(?:block\.)?(.+)", name):
        name = f"layers.{first + int(mtp[1])}.{mtp[2]}"
    name = f"model.{name}"
    if name.endswith(".experts.gate_up_proj"):
        experts, both, hidden = shape
        stem, half = name.removesuffix("gate_up_proj"), both // 2
        places = {"gate_proj": slice(0, half), "up_proj": slice(half, both)}
        return [
            Part(f"{stem}{expert}.{projection}.weight", (half, hidden), (expert, rows))
            for expert in range(experts)
            for projection, rows in places.items()
        ]
    if name.endswith(".experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return [Part(f"{stem}{expert}.down_proj.weight", shape[1:], (expert,)) for expert in range(shape[0])]
    return [Part(name, shape, ())]


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a released name belongs to one of the config's MTP modules."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    first = config.num_hidden_layers
    return layer is not None and first <= int(layer[1]) < first + config.num_nextn_predict_layers
