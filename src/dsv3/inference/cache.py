"""The latent cache: for each token and block, the normed latent and the rotated key (576 values for DeepSeek-V3).

Legend: B sequences, T tokens of a pass, S positions held, C elements of the latent, R elements of the rotated key,
L = C + R elements of an entry.
"""

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig


class LatentCache:
    """A rectangle of positions for each sequence of a batch; what `dsv3.model.attention.Cache` asks for.

    Entries are addressed by position, so rows of unequal length need no padding on the left: what a shorter row writes
    behind its end is hidden from its tokens by position, and overwritten before any of them may see it.
    """

    def __init__(
        self, config: ModelConfig, blocks: list[str], batch: int, length: int, dtype: torch.dtype, device: torch.device
    ):
        if length > config.max_position_embeddings:
            raise UserError(
                f"{length} tokens are more than the model's max_position_embeddings = {config.max_position_embeddings}; "
                "shorten the prompt or max_tokens"
            )
        self.length = length
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.values = {name: torch.zeros(batch, length, width, dtype=dtype, device=device) for name in blocks}
        self.rows = torch.arange(batch, device=device).unsqueeze(1)
        self.position_BT = torch.empty(0)
        self.end = 0
        self.first = True
        self.bias: Tensor | None = None

    def begin(self, position_BT: Tensor, end: int, filled: bool = True) -> Tensor:
        """Announces a pass over the tokens at these positions, of which `end` is beyond the last; returns the positions.

        What is held from `end` on is forgotten. `filled`: the last position is `end` - 1.
        """
        self.first = self.end == 0
        self.end = end
        self.position_BT = position_BT
        self.bias = None
        if not self.first and (position_BT.numel() > 1 or not filled):
            held = torch.arange(end, device=position_BT.device)
            hidden = held > position_BT.unsqueeze(-1)
            self.bias = torch.zeros(hidden.shape, device=held.device).masked_fill_(hidden, float("-inf"))
        return position_BT

    def store(self, block: str, latent_BTC: Tensor, key_BTR: Tensor) -> None:
        """See `dsv3.model.attention.Cache`."""
        self.values[block][self.rows, self.position_BT] = torch.cat((latent_BTC, key_BTR), dim=-1)

    def read(self, block: str) -> tuple[Tensor, Tensor | None] | None:
        """See `dsv3.model.attention.Cache`."""
        if self.first:
            return None
        return self.values[block][:, : self.end], self.bias

    def keep(self, rows: Tensor) -> None:
        """Forgets all sequences but these (int [n])."""
        self.values = {name: values[rows] for name, values in self.values.items()}
        self.rows = self.rows[: len(rows)]
