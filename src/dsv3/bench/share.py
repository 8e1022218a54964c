"""What one GPU of a cluster does when DeepSeek-V3 is trained on it (`dsv3 bench train --share`): full-width layers, each with
the four routed experts that 64-way expert parallelism leaves a GPU, and the tokens a balanced all-to-all would bring them.

Layers are timed by differences between networks of other depths; what 3 dense and 58 MoE layers and the head take together
gives tokens a second and GPU. Communication and pipeline bubbles are not in it.

Legend: T tokens, K experts a token, D hidden.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsv3.bench.limits import Rates, limits
from dsv3.bench.measure import Progress, track
from dsv3.bench.slices import DEPTHS, Layers, of_depth, randomize
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Dispatched, Dispatcher, Routing
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.permute import Permutation, permute, sort_by_expert, unpermute
from dsv3.planning.flops import training_flops_per_token
from dsv3.recipe.schema import OptimizerSection
from dsv3.training.optimizer import Optimizer

EXPERT_RANKS = 64
"""The report's expert parallelism (section 3.2)."""
TOKENS = 4096
MICRO_BATCHES = 8
"""A step, of one sequence each."""
KINDS = {
    "grouped products": r"deep_gemm|^(wgrad|add_wgrad|contiguous|masked)_kernel|cutlass.*enable_3x",
    "attention": r"sdpa",
    "other products": r"nvjet|gemm",
    "quantise, transpose, 12 bits": r"^(rows|transposing|dequantize|quantize|transpose|pack|unpack)_kernel",
    "norms and SwiGLU": r"^(forward|backward|tiles)_kernel|norm",
    "queries and keys": r"^(rotate|keys|keys_backward)_kernel",
    "router, sort, permute": r"^(select|gradient|count|prefix|place|copy|sum)_kernel",
    "cross-entropy": r"^loss_kernel",
    "copies and concatenations": r"copy|Cat|[Mm]emcpy|[Mm]emset|[Ff]ill|^clear_kernel",
}
"""Kernels by the first pattern that their name matches; the rest is elementwise."""


class BalancedExchange(Dispatcher):
    """In place of an all-to-all: a GPU's experts get as many rows as it sends, evenly, made from its own tokens."""

    def __init__(self, experts: int):
        self.experts = experts

    def held(self, experts: int) -> range:
        """The first ones."""
        return range(self.experts)

    def send(self, parcel: tuple[Tensor, Routing, int]) -> Dispatched:
        """Choice k of every token goes to expert k modulo the number of experts."""
        x_TD, routing, alignment = parcel
        tokens, chosen = routing.expert.shape
        expert = (torch.arange(chosen, device=x_TD.device) % self.experts).expand(tokens, chosen).contiguous()
        to = sort_by_expert(expert, self.experts, 0, alignment)
        return Dispatched(permute(x_TD, to), to.by_row(routing.weight), to.counts_E, to)

    def send_back(self, rows: Tensor, handle: Permutation) -> Tensor:
        """The sums, as after the second all-to-all."""
        return unpermute(rows, handle)


@dataclass(frozen=True)
class Share:
    """Of one precision, with or without MTP; times in milliseconds a micro-batch of 4,096 tokens, forward and backward."""

    precision: str
    mtp: bool
    dense_layer: float
    moe_layer: float
    head: float
    """Embedding, final norm, output head and loss; with MTP its module and second head as well."""
    optimizer: float
    """Of the largest network in MoE layers, a step of 8 micro-batches."""
    tokens_per_second: float
    """4096 / (3 dense + 58 MoE layers + head), the optimizer's time spread over the micro-batches of a step."""
    teraflops: float
    """By the report's causal accounting, which counts no MTP unless it runs."""
    peak_memory: int
    """Bytes, of the largest network that was timed."""
    budget: Mapping[str, float]
    """Milliseconds by kind of kernel of one micro-batch of the first network; "between kernels" is when none ran."""
    limits: Mapping[str, float]
    """The least that these kinds need (`limits.py`); absent ones need no time."""


def bench_share(
    precision: Literal["bf16", "fp8"], mtp: bool, rates: Rates, progress: Progress = lambda **_: None
) -> Share:
    """Measures on the current GPU, which has these `rates`."""
    whole, times, updates, peak = ModelConfig.preset("deepseek-v3"), list[float](), list[float](), 0
    budget: dict[str, float] = {}
    # The MTP module is a layer too: with one more, the network in FP8 fills the GPU.
    depths = [(dense, moe - mtp) for dense, moe in DEPTHS]
    for dense, moe in track(depths, f"{precision}{' with MTP' if mtp else ''}", progress):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = Step(of_depth(whole, dense, moe, mtp), precision)
        passes, update = step.timed()
        times.append(passes / MICRO_BATCHES)
        updates.append(update)
        peak = max(peak, torch.cuda.max_memory_allocated())
        budget = budget or step.budget()
        del step
    layers = Layers.of(times, depths)
    # The update of the layers timed, as if spread over all that the whole model has.
    total = layers.whole(whole) * (1 + updates[0] / MICRO_BATCHES / times[0])
    speed = 1000 * TOKENS / total
    teraflops = training_flops_per_token(whole, TOKENS, mtp=mtp) * speed / 1e12
    least = limits(of_depth(whole, *depths[0], mtp), TOKENS, precision, rates)
    return Share(precision, mtp, *layers, updates[0], speed, teraflops, peak, budget, least)


class Step:
    """A network of some layers and its optimizer."""

    def __init__(self, config: ModelConfig, precision: str):
        self.model, self.mtp_weight = network(config), 0.3 if config.num_nextn_predict_layers else 0.0
        if precision == "fp8":
            self.model.compute_in_fp8()
        self.optimizer = Optimizer(self.model, OptimizerSection(moments="bf16"), muon_dtype=torch.bfloat16)
        self.tokens = torch.randint(config.vocab_size, (MICRO_BATCHES, 1, TOKENS + 1), device="cuda")

    def gradients(self, number: int) -> None:
        """Forward and backward pass of one micro-batch."""
        losses = self.model.loss(
            self.tokens[number], mtp_weight=self.mtp_weight, balance_alpha=1e-4, scale=1 / MICRO_BATCHES, divisor=TOKENS
        )
        losses.total.backward()

    def timed(self) -> tuple[float, float]:
        """Milliseconds of a step's passes, and of its update, after two steps that do not count."""
        for _ in range(3):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            for micro in range(MICRO_BATCHES):
                self.gradients(micro)
            marks[1].record()
            norms = self.optimizer.clip()
            self.optimizer.step(1e-6, ~norms["all"].isfinite())
            marks[2].record()
            torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])

    def budget(self) -> dict[str, float]:
        """Where one micro-batch's time goes: milliseconds by kind of kernel."""
        self.gradients(0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            self.gradients(1)
            ended.record()
            torch.cuda.synchronize()
        found = dict.fromkeys([*KINDS, "elementwise"], 0.0)
        for event in profile.key_averages():
            found[kind_of(event.key)] += event.self_device_time_total / 1000
        found["between kernels"] = max(0.0, started.elapsed_time(ended) - sum(found.values()))
        return found


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "elementwise")


def network(config: ModelConfig) -> DeepSeekV3:
    """On the current GPU, with random weights; the router chooses among all 256 experts, four of which are here."""
    here = config.n_routed_experts // EXPERT_RANKS
    with torch.device("meta"):
        model = DeepSeekV3(config, torch.bfloat16, BalancedExchange(here))
    model = model.to_empty(device="cuda")
    randomize(model, 0.006)
    return model
