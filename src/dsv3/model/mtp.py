"""One multi-token-prediction module (report, section 2.2, equations 21 to 23).

`h^k_i = TRM_k(M_k [enorm(Emb(t_{i+k})) ; hnorm(h^{k-1}_i)])`: embedding first, as the released `eh_proj` expects, with the
previous state taken after its final norm, which is what published engines feed.
"""

import torch
from torch import Tensor, nn

from dsv3.model.block import Block, Pass
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Dispatcher, Routing
from dsv3.model.linear import Linear, RMSNorm


class SharedHead(nn.Module):
    """The norm in front of the output head; the head itself is the main model's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MultiTokenPrediction(nn.Module):
    """Module k predicts one token further than module k - 1; embedding and head are the main model's."""

    def __init__(self, config: ModelConfig, depth: int, dispatcher: Dispatcher):
        super().__init__()
        self.depth = depth
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, f"mtp.{depth}", dense=False, dispatcher=dispatcher)
        self.shared_head = SharedHead(config)

    def forward(self, hidden: Tensor, next_embeddings: Tensor, shared: Pass) -> tuple[Tensor, Routing | None]:
        """(normed state of depth k - 1 [B, T, D], embeddings of the tokens k further [B, T, D]) -> (normed state, routing)."""
        x, routing = self.block(self.enter(hidden, next_embeddings), shared)
        return self.shared_head.norm(x), routing

    def enter(self, hidden: Tensor, next_embeddings: Tensor) -> Tensor:
        """What the block reads."""
        return self.eh_proj(torch.cat((self.enorm(next_embeddings), self.hnorm(hidden)), dim=-1))
