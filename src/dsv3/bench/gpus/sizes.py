"""What is measured, and how much of it: the sizes of two H200s, which a test replaces by tiny ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.model.config import ModelConfig


@dataclass(frozen=True)
class Size:
    """A network and the tokens of one measurement."""

    preset: str
    changes: Mapping[str, Any]
    """Fields of its configuration."""
    length: int
    """Tokens a sequence."""
    micro_batches: int
    """A turn."""
    sequences: int = 1
    """A micro-batch."""

    @property
    def config(self) -> ModelConfig:
        """The network, without MTP modules."""
        return ModelConfig.preset(self.preset, num_nextn_predict_layers=0, **self.changes)

    @property
    def tokens(self) -> int:
        """Of one rank in one turn."""
        return self.micro_batches * self.sequences * self.length

    @property
    def shapes(self) -> dict[str, Any]:
        """As the result file has them."""
        return {
            "network": self.preset, **self.changes, "micro-batches": self.micro_batches, "sequences": self.sequences,
            "length": self.length,
        }  # fmt: skip


THREE_WIDE = {"num_hidden_layers": 3, "first_k_dense_replace": 0, "n_routed_experts": 32, "vocab_size": 512}
"""Of DeepSeek-V3's width, eight choices a token; experts that two GPUs hold beside their gradients in FP32."""
EIGHT_DENSE = {"num_hidden_layers": 8, "first_k_dense_replace": 8, "vocab_size": 8192}
THREE_BLOCKS = {"num_hidden_layers": 3, "vocab_size": 32768}


@dataclass(frozen=True)
class Sizes:
    """Of all parts."""

    overlap: Size = Size("deepseek-v3", THREE_WIDE, 4096, 6)
    """Its micro-batches are pairs of passes."""
    pipeline: Size = Size("lite", EIGHT_DENSE, 4096, 12)
    zero: Size = Size("lite", THREE_BLOCKS, 4096, 1)
    scaling: Size = Size("lite", THREE_BLOCKS, 4096, 16, 2)
    rounds: int = 5
    device: str = "cuda"
    threads: int | None = None
    """Of each rank on the CPU."""
