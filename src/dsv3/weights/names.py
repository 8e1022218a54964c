"""Our names and the released ones: the only mapping between them, over names and shapes, without torch.

The released checkpoint (README_WEIGHTS of DeepSeek-V3) stores every expert's three matrices alone, where ours are stacked,
and MTP module k as layer `num_hidden_layers + k`, with copies of the embedding and the head that it shares.
"""

import re
from dataclasses import dataclass

from dsv3.model.config import ModelConfig

KEPT_FLOAT32 = "e_score_correction_bias"
"""The routing bias is FP32 whatever the rest is: steps of 0.001 are lost in BF16."""
SCALE = "_scale_inv"
"""What the name of an FP8 weight's scales ends with, behind the weight's own name."""
SHARED = {
    "embed_tokens.weight": ("model.embed_tokens.weight", "embed_tokens.weight"),
    "lm_head.weight": ("lm_head.weight", "shared_head.head.weight"),
}
"""What MTP modules share with the main model: its released name, and that of the copy in a module's layer."""


@dataclass(frozen=True)
class Part:
    """One tensor of a released checkpoint, and which part of one of ours it is."""

    name: str
    """The released name."""
    shape: tuple[int, ...]
    start: tuple[int, ...]
    """Where its first element lies in ours, which may be a stack of such tensors."""
    copy: bool = False
    """True for the embedding and the head stored again with each MTP module."""

    @property
    def size(self) -> tuple[int, ...]:
        """Its shape with a 1 in front where ours is a stack."""
        return (*[1] * (len(self.start) - len(self.shape)), *self.shape)


def released(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[Part]:
    """The released tensors that our tensor `name` of this shape is stored as; copies come last."""
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    origin = (0,) * len(shape)
    if name in SHARED:
        original, copy = SHARED[name]
        copies = [Part(f"model.layers.{first + k}.{copy}", shape, origin, copy=True) for k in range(depth)]
        return [Part(original, shape, origin), *copies]
    if mtp := re.fullmatch(r"mtp\.(\d+)\.(?:block\.)?(.+)", name):
        name = f"layers.{first + int(mtp[1])}.{mtp[2]}"
    name = f"model.{name}"
    scale = SCALE if name.endswith(SCALE) else ""
    stem, experts, stack = name.removesuffix(scale).rpartition(".experts.")
    if stack == "gate_up_proj":
        half = shape[1] // 2
        return [
            Part(f"{stem}{experts}{e}.{projection}.weight{scale}", (half, shape[2]), (e, row, 0))
            for e in range(shape[0])
            for projection, row in (("gate_proj", 0), ("up_proj", half))
        ]
    if stack == "down_proj":
        return [Part(f"{stem}{experts}{e}.down_proj.weight{scale}", shape[1:], (e, 0, 0)) for e in range(shape[0])]
    return [Part(name, shape, origin)]


def is_block_scaled(name: str) -> bool:
    """Whether the released FP8 checkpoints keep this released weight in FP8 blocks: the linear layers of attention and
    feed-forward. Embedding, head, norms, router and MTP's `eh_proj` stay high."""
    return name.endswith(("_proj.weight", "_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a released name belongs to one of the config's MTP modules."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    first = config.num_hidden_layers
    return layer is not None and first <= int(layer[1]) < first + config.num_nextn_predict_layers
