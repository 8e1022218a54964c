"""The paged latent cache: for each token and layer the normed latent and the rotated key (576 values for DeepSeek-V3).

Pages are those of `dsv3.ops.latent_pages`; the scheduler's block numbers are page numbers, the same for all layers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv3.inference.batch import Batch
from dsv3.model.attention import Absorbed, Expanded
from dsv3.model.config import ModelConfig
from dsv3.ops.latent_pages import PAGE, packed_size, store_latents
from dsv3.ops.paged_attention import causal_bias, side_by_side


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer; uint8 is the packed form."""
    if dtype == torch.uint8:
        return packed_size(config.kv_lora_rank, config.qk_rope_head_dim)
    return (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class PagedCache:
    """What `dsv3.model.attention.Cache` asks for.

    Of a batch that decodes, and goes on as it is, the pages also lie side by side in a second place, so that a pass on the CPU
    has nothing to gather: it stores its tokens in both. The last page of each is nobody's: padding is kept in its last slot.
    """

    def __init__(
        self, config: ModelConfig, layers: Sequence[str], num_blocks: int, dtype: torch.dtype, device: torch.device
    ):
        shape = num_blocks + 1, PAGE, token_bytes(config, dtype) // dtype.itemsize
        self.heads, self.dtype = config.num_attention_heads, dtype
        self.held = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        self.beside: dict[str, Tensor] = {}
        self.beside_of: dict[str, tuple[int, list[int]]] = {}
        """By layer: pages of each sequence, and the sequences."""
        self.parts: Sequence[Expanded | Absorbed] = []
        self.slots_F = torch.empty(0, dtype=torch.int64)
        self.places: tuple[Tensor, Tensor] | None = None
        """(sequence [F], position [F]) of this pass's tokens in `beside`, if it reads from there."""

    def lay_side_by_side(self, layers: Sequence[str], batch: Batch) -> bool:
        """Whether some layers' pages of a uniform batch lie side by side: they are gathered if the last pass was over others."""
        part, held = batch.only, self.held[layers[0]]
        count, width = part.table.shape
        if held.is_cuda or not held.is_floating_point() or (count + 1) * width > len(held):
            for layer in layers:  # the pass stores in pages alone, and replayed it would not tell
                self.beside_of.pop(layer, None)
            return False
        sequences = width, [work.sequence for work in batch.works]
        for layer in layers:
            if self.beside_of.get(layer) != sequences:
                self.beside.setdefault(layer, torch.empty_like(held))
                self.entries(layer, width)[:count] = side_by_side(self.held[layer], part.table, part.lengths).mT
                self.beside_of[layer] = sequences
        return True

    def entries(self, layer: str, width: int) -> Tensor:
        """[sequences, L, S] of `beside`, for so many pages each: the product with queries reads the slots of an element."""
        pages = self.beside[layer]
        count = len(pages) // width
        return pages[: count * width].view(count, pages.shape[2], width * PAGE)

    def begin(self, batch: Batch) -> None:
        """Announces a pass. A slot is block * 64 + place; negative: nowhere."""
        self.parts, self.slots_F, self.places = batch.parts, batch.slot_F, None
        if batch.beside:
            part = batch.only
            count, width = part.table.shape
            # Rows of padding stand behind all sequences.
            sequence_F = (torch.arange(len(batch.slot_F)) // batch.uniform).clamp_(max=count)
            self.places = sequence_F, batch.position_F
            self.parts = [
                replace(part, bias=causal_bias(part.lengths, batch.uniform, self.heads, width * PAGE, self.dtype))
            ]

    def store(self, block: str, latent_FC: Tensor, key_FR: Tensor) -> None:
        """See `dsv3.model.attention.Cache`."""
        if self.places is None:
            store_latents(self.held[block], self.slots_F, latent_FC, key_FR)
            self.beside_of.pop(block, None)
        else:
            tokens = torch.cat((latent_FC, key_FR), dim=1)
            self.held[block].flatten(0, 1)[self.slots_F] = tokens
            self.pages(block).mT[self.places] = tokens

    def pages(self, block: str) -> Tensor:
        """See `dsv3.model.attention.Cache`."""
        if self.places is None:
            return self.held[block]
        [part] = self.parts
        assert isinstance(part, Absorbed)
        return self.entries(block, part.table.shape[1])

    def read(self, layer: str, blocks: Sequence[int]) -> Tensor:
        """A copy of some blocks of one layer, as they are stored: [blocks, 64, elements]."""
        return self.held[layer][torch.tensor(blocks, device=self.held[layer].device)]

    def write(self, layer: str, blocks: Sequence[int], content: Tensor) -> None:
        """The inverse of `read`, also from another cache of the same layout."""
        self.beside_of.pop(layer, None)
        held = self.held[layer]
        held[torch.tensor(blocks, device=held.device)] = content.to(held.device)
