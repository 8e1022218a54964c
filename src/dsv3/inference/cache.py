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
from dsv3.ops.paged_attention import causal_bias


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in one layer; uint8 is the packed form."""
    if dtype == torch.uint8:
        return packed_size(config.kv_lora_rank, config.qk_rope_head_dim)
    return (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class PagedCache:
    """Implements `dsv3.model.attention.Cache`.

    On a CPU, the pages of a batch that decodes are also kept in a gathered copy: while the batch stays the same, its passes
    store their tokens in both and have nothing to gather. The last page of either belongs to no sequence: its last slot takes
    padding.
    """

    def __init__(
        self, config: ModelConfig, layers: Sequence[str], num_blocks: int, dtype: torch.dtype, device: torch.device
    ):
        shape = num_blocks + 1, PAGE, token_bytes(config, dtype) // dtype.itemsize
        self.heads, self.dtype = config.num_attention_heads, dtype
        self.held = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        self.gathered: dict[str, Tensor] = {}
        self.gathered_of: dict[str, tuple[int, list[int]]] = {}
        """By layer, what was gathered: pages of each sequence, and the sequences."""
        self.parts: Sequence[Expanded | Absorbed] = []
        self.slots_F = torch.empty(0, dtype=torch.int64)
        self.places: tuple[Tensor, Tensor] | None = None
        """(sequence [F], position [F]) of this pass's tokens in the gathered copy, if it reads that."""

    def gather(self, layers: Sequence[str], batch: Batch) -> bool:
        """Whether some layers have a gathered copy for a uniform batch; makes one where the last was of another batch."""
        part, held = batch.only, self.held[layers[0]]
        count, width = part.table.shape
        if held.is_cuda or not held.is_floating_point() or (count + 1) * width > len(held):
            for layer in layers:  # a replayed pass stores in pages alone, without calling `store`
                self.gathered_of.pop(layer, None)
            return False
        sequences = width, [work.sequence for work in batch.works]
        for layer in layers:
            if self.gathered_of.get(layer) != sequences:
                self.gathered.setdefault(layer, torch.empty_like(held))
                entries = self.entries(layer, width)[:count]
                pages = entries.view(-1, *held.shape[1:])
                torch.index_select(self.held[layer], 0, part.table.flatten(), out=pages)
                for entries_SL, length in zip(entries, part.lengths.tolist(), strict=True):
                    entries_SL[length:] = 0  # 0 times what is not finite is not 0
                self.gathered_of[layer] = sequences
        return True

    def entries(self, layer: str, width: int) -> Tensor:
        """[sequences, S, L] of the gathered copy, for so many pages each."""
        pages = self.gathered[layer]
        count = len(pages) // width
        return pages[: count * width].view(count, width * PAGE, pages.shape[2])

    def begin(self, batch: Batch) -> None:
        """Prepares for a pass. A slot is block * 64 + offset; tokens with a negative one are not stored."""
        self.parts, self.slots_F, self.places = batch.parts, batch.slot_F, None
        if batch.gathered:
            part = batch.only
            count, width = part.table.shape
            # Padding belongs to the page behind all sequences.
            sequence_F = (torch.arange(len(batch.slot_F)) // batch.uniform).clamp(max=count)
            self.places = sequence_F, batch.position_F
            self.parts = [
                replace(part, bias=causal_bias(part.lengths, batch.uniform, self.heads, width * PAGE, self.dtype))
            ]

    def store(self, block: str, latent_FC: Tensor, key_FR: Tensor) -> None:
        """See `dsv3.model.attention.Cache`."""
        if self.places is None:
            store_latents(self.held[block], self.slots_F, latent_FC, key_FR)
            self.gathered_of.pop(block, None)
        else:
            tokens = torch.cat((latent_FC, key_FR), dim=1)
            self.held[block].flatten(0, 1)[self.slots_F] = tokens
            self.pages(block)[self.places] = tokens

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
        self.gathered_of.pop(layer, None)
        held = self.held[layer]
        held[torch.tensor(blocks, device=held.device)] = content.to(held.device)
