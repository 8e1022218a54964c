"""The paged latent cache: for each token and layer the normed latent and the rotated key (576 values for DeepSeek-V3).

Pages are those of `dsv3.ops.latent_pages`; the scheduler's block numbers are page numbers, the same for all layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.model.attention import Absorbed, Expanded
from dsv3.model.config import ModelConfig
from dsv3.ops.latent_pages import PAGE, packed_size, store_latents


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer; uint8 is the packed form."""
    if dtype == torch.uint8:
        return packed_size(config.kv_lora_rank, config.qk_rope_head_dim)
    return (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class PagedCache:
    """What `dsv3.model.attention.Cache` asks for."""

    def __init__(
        self, config: ModelConfig, layers: Sequence[str], num_blocks: int, dtype: torch.dtype, device: torch.device
    ):
        shape = num_blocks, PAGE, token_bytes(config, dtype) // dtype.itemsize
        self.held = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.parts: Sequence[Expanded | Absorbed] = []
        self.slots_F = torch.empty(0, dtype=torch.int64)

    def begin(self, parts: Sequence[Expanded | Absorbed], slots_F: Tensor) -> None:
        """Announces a pass: how its tokens attend, and where each is kept (block * 64 + place; negative: nowhere)."""
        self.parts, self.slots_F = parts, slots_F

    def store(self, block: str, latent_FC: Tensor, key_FR: Tensor) -> None:
        """See `dsv3.model.attention.Cache`."""
        store_latents(self.held[block], self.slots_F, latent_FC, key_FR)

    def pages(self, block: str) -> Tensor:
        """See `dsv3.model.attention.Cache`."""
        return self.held[block]

    def read(self, layer: str, blocks: Sequence[int]) -> Tensor:
        """A copy of some blocks of one layer, as they are stored: [blocks, 64, elements]."""
        return self.held[layer][torch.tensor(blocks, device=self.held[layer].device)]

    def write(self, layer: str, blocks: Sequence[int], content: Tensor) -> None:
        """The inverse of `read`, also from another cache of the same layout."""
        held = self.held[layer]
        held[torch.tensor(blocks, device=held.device)] = content.to(held.device)
