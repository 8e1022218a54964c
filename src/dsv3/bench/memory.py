"""How much memory a training step takes in BF16 and in FP8, and what each of the report's ways to save some of it saves."""

import statistics
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import finalize

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.bench.measure import Progress, synchronize, track
from dsv3.model.config import ModelConfig
from dsv3.model.transformer import DeepSeekV3, refuse_sizes
from dsv3.recipe.schema import OptimizerSection
from dsv3.training.optimizer import Optimizer


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    precision: Literal["bf16", "fp8"] = "fp8"
    recompute: tuple[str, ...] = ()
    moments: Literal["fp32", "bf16"] = "fp32"
    """Adam's."""
    wide: bool = False
    """Whether what FP8 layers keep in E4M3 is kept in BF16."""
    twelve_bits: bool = True
    """Whether FP8 keeps the input of `o_proj` in E5M6; else attention's own copy serves."""
    held: Literal["nothing", "average", "second head"] = "nothing"
    """What else is in memory: the average of the weights; MTP's own embedding and head, with gradients and moments."""


BF16, FP8 = Setting("bf16"), Setting()
TECHNIQUES: dict[str, tuple[Setting, Setting]] = {
    "BF16: `norms` computed again": (BF16, replace(BF16, recompute=("norms",))),
    "BF16: `mla_up` computed again": (BF16, replace(BF16, recompute=("mla_up",))),
    "BF16: `swiglu` computed again": (BF16, replace(BF16, recompute=("swiglu",))),
    "BF16: all three": (BF16, replace(BF16, recompute=("norms", "mla_up", "swiglu"))),
    "FP8 in place of BF16, `swiglu` computed again": (BF16, FP8),
    "FP8: layers' inputs kept in E4M3": (replace(FP8, wide=True), FP8),
    "FP8: `o_proj`'s input kept in E5M6": (replace(FP8, twelve_bits=False), FP8),
    "FP8: `norms` computed again": (FP8, replace(FP8, recompute=("norms",))),
    "FP8: `mla_up` computed again": (FP8, replace(FP8, recompute=("mla_up",))),
    "FP8: moments in BF16": (FP8, replace(FP8, moments="bf16")),
    "FP8: average of the weights on the CPU": (replace(FP8, held="average"), FP8),
    "FP8: MTP shares embedding and head": (replace(FP8, held="second head"), FP8),
    "all of it": (BF16, replace(FP8, recompute=("norms", "mla_up"), moments="bf16")),
}
"""What saves memory: a step without it, and the same step with it."""


@dataclass(frozen=True)
class Memory:
    """One step."""

    resting: int
    """Bytes of weights, their copies in FP8, gradients and moments, and of what else is held."""
    kept: int
    """Further bytes, kept between the two passes."""
    peak: int
    """Most bytes at any moment, all of them counted."""
    seconds: float
    """Median of both passes together, measured without counting bytes."""


class Live(TorchDispatchMode):
    """Counts the bytes of tensors on the CPU that are still alive: `now`, and at `most` since `restart`."""

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
        """A storage was freed."""
        self.now -= size

    def restart(self) -> None:
        """Begins a new maximum."""
        self.most = self.now


class Allocated(nullcontext[None]):
    """The same figures from a GPU's allocator, without what was allocated before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.cuda.memory_allocated()

    @property
    def now(self) -> int:
        """Bytes."""
        return torch.cuda.memory_allocated() - self.before

    @property
    def most(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() - self.before

    def restart(self) -> None:
        """As `Live`'s."""
        torch.cuda.reset_peak_memory_stats()


def tensors_of(values: Any) -> Iterable[Tensor]:
    """The tensors among nested arguments."""
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))


def bench_memory(
    preset: str = "tiny",
    *,
    batch: int = 8,
    length: int = 1024,
    device: torch.device | str = "cpu",
    rounds: int = 3,
    progress: Progress = lambda **_: None,
) -> dict[Setting, Memory]:
    """Every setting of `TECHNIQUES` on one network and one micro-batch, MTP included.

    `UserError` for sizes that no FP8 product takes.
    """
    config = ModelConfig.preset(preset)
    config = config.replace(max_position_embeddings=max(length, config.max_position_embeddings))
    meter: Live | Allocated = Allocated() if torch.device(device).type == "cuda" else Live()
    with meter:
        model = DeepSeekV3(config, compute_dtype=torch.bfloat16).initialize("fan_in").to(device)
        tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(device)
    for block in model.blocks():
        refuse_sizes(block)
    settings = sorted({each for pair in TECHNIQUES.values() for each in pair}, key=lambda each: each.precision)
    found: dict[Setting, Memory] = {}
    for setting in track(settings, "bench memory", progress):
        if setting.precision == "fp8" and model.layers[0].self_attn.inputs_fp8 is None:
            model.compute_in_fp8()
        found[setting] = measured(model, tokens, setting, meter, rounds)
    return found


def measured(model: DeepSeekV3, tokens: Tensor, setting: Setting, meter: Live | Allocated, rounds: int) -> Memory:
    """One setting."""
    model.recompute(setting.recompute)
    with meter:
        # Neither is used: they only take up memory.
        optimizer = Optimizer(model, OptimizerSection(moments=setting.moments))
        others = held(model, setting)
        passes(model, tokens, setting, meter)  # allocates gradients and the FP8 copies of weights
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        passes(model, tokens, setting, meter)
        seconds.append(time.perf_counter() - started)
    resting = meter.now
    with meter:
        meter.restart()
        kept = passes(model, tokens, setting, meter) - resting
    del optimizer, others
    return Memory(resting, kept, meter.most, statistics.median(seconds))


def held(model: DeepSeekV3, setting: Setting) -> list[Tensor]:
    """What `Setting.held` says."""
    if setting.held == "average":
        return [torch.empty_like(each) for each in model.parameters()]
    if setting.held == "second head":
        own = (model.embed_tokens.weight, model.lm_head.weight)
        return [torch.empty_like(each) for each in own for _ in ("weight", "gradient", "moment", "second moment")]
    return []


def passes(model: DeepSeekV3, tokens: Tensor, setting: Setting, meter: Live | Allocated) -> int:
    """Forward and backward, to the end; the bytes there are between the two."""
    plain = setting.twelve_bits and not setting.wide
    with nullcontext() if plain else saved_tensors_hooks(keep_wide if setting.wide else leave_twelve_bits, as_it_was):
        loss = model.loss(tokens, mtp_weight=0.3, balance_alpha=1e-4).total
    kept = meter.now
    loss.backward()
    synchronize(tokens.device)
    return kept


def keep_wide(tensor: Tensor) -> tuple[Tensor, torch.dtype, torch.Size]:
    """What an FP8 layer would keep if it kept BF16: its E4M3 values in two bytes each."""
    wide = tensor.to(torch.bfloat16) if tensor.dtype == torch.float8_e4m3fn else tensor
    return wide, tensor.dtype, tensor.shape


def leave_twelve_bits(tensor: Tensor) -> tuple[Tensor, torch.dtype, torch.Size]:
    """Nothing in place of packed 12-bit values, the only tensors of bytes."""
    return tensor.new_empty(0) if tensor.dtype == torch.uint8 else tensor, tensor.dtype, tensor.shape


def as_it_was(kept: tuple[Tensor, torch.dtype, torch.Size]) -> Tensor:
    """What was kept, or zeros of its shape."""
    tensor, dtype, shape = kept
    return tensor.to(dtype) if tensor.shape == shape else tensor.new_zeros(shape)
