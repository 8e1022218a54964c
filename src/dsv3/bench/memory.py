"""What waits in memory for the backward pass, and what `training.recompute` saves of it."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.bench.measure import Progress
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3
from dsv3.recipe.schema import Precision, Recomputable
from dsv3.training.device import COMPUTE_DTYPES

KINDS: tuple[str, ...] = get_args(Recomputable)
CHOICES: tuple[tuple[str, ...], ...] = ((), *((kind,) for kind in KINDS), KINDS)


@dataclass(frozen=True)
class Memory:
    """One forward and backward pass; weights, their copies in FP8 and gradients, there before and after, are not counted."""

    recompute: tuple[str, ...]
    kept: int
    """Bytes that wait between the two passes."""
    peak: int
    """Most bytes at any moment."""
    seconds: float
    """Of both passes, without the counting: the median."""


class Live(TorchDispatchMode):
    """Counts the bytes that operations on the CPU have made and something still holds: `now`, and at `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(each.untyped_storage()) for each in tensors_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for each in tensors_of(out):
            storage = each.untyped_storage()
            if id(storage) not in known:
                known.add(id(storage))
                self.now += storage.nbytes()
                finalize(storage, self.free, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def free(self, size: int) -> None:
        """A storage is gone."""
        self.now -= size


def tensors_of(values: Any) -> Iterable[Tensor]:
    """The tensors among nested arguments."""
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))


def bench_memory(
    preset: str = "tiny",
    *,
    batch: int = 8,
    length: int = 1024,
    device: torch.device | str = "cpu",
    precision: Precision = "bf16",
    rounds: int = 3,
    choices: Sequence[tuple[str, ...]] = CHOICES,
    progress: Progress = lambda **_: None,
) -> list[Memory]:
    """One row for each choice of `training.recompute`, MTP included."""
    config = ModelConfig.preset(preset)
    config = config.replace(max_position_embeddings=max(length, config.max_position_embeddings))
    model = DeepSeekV3(config, compute_dtype=COMPUTE_DTYPES[precision]).initialize("fan_in").to(device)
    if precision == "fp8":
        model.compute_in_fp8()
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    rows = []
    for number, kinds in enumerate(choices):
        model.recompute(kinds)
        passes(model, tokens)  # gradients are there from now on
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            passes(model, tokens)
            seconds.append(time.perf_counter() - started)
        kept, peak = measured(model, tokens)
        rows.append(Memory(kinds, kept, peak, statistics.median(seconds)))
        progress(stage="bench memory", done=number + 1, total=len(choices))
    return rows


def measured(model: DeepSeekV3, tokens: Tensor) -> tuple[int, int]:
    """(kept, peak) of one pass forward and backward."""
    if tokens.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = model.loss(tokens, mtp_weight=0.3, balance_alpha=1e-4).total
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before
    with Live() as live:
        loss = model.loss(tokens, mtp_weight=0.3, balance_alpha=1e-4).total
        kept = live.now
        loss.backward()
    return kept, live.most


def passes(model: DeepSeekV3, tokens: Tensor) -> None:
    """Forward and backward, to the end."""
    model.loss(tokens, mtp_weight=0.3, balance_alpha=1e-4).total.backward()
    if tokens.is_cuda:
        torch.cuda.synchronize()
