"""What a layout over many GPUs costs, before any is rented: memory of each rank, wire traffic, time of a step.

Memory is what this code base keeps: weights and gradients in FP32 on every rank that holds them, moments shared out among the
data-parallel ranks (ZeRO-1), copies of the matrices for their products (one in BF16, or two in FP8), and activations. Times
follow from a rate of computation and a bandwidth that are given: measured ones, if there are any.

Legend: D hidden, I inner elements of an expert, K experts per token, E experts.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from math import comb

from dsv3.errors import UserError
from dsv3.model.config import ModelConfig
from dsv3.parallel.pipeline.layout import Layout, balanced_layout
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.parallel.pipeline.simulator import Costs, Timeline, peak_activations, simulate
from dsv3.planning.parameters import Parameters, count_parameters

TILED = 1 + 4 / 128
"""Bytes of an element of E4M3 with its share of the scale."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, and what they are for."""

    blocks: tuple[str, ...]
    parameters: int
    weights: int
    """FP32, and two bytes for copies."""
    gradients: int
    moments: int
    activations: int
    """At the most."""

    @property
    def total(self) -> int:
        """Without what libraries and the allocator take."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Plan:
    """One layout of one network. Sizes are counts; `rate` is FLOP/s that a GPU sustains, `bandwidth` bytes/s to other ranks."""

    config: ModelConfig
    schedule: Schedule
    layout: Layout
    data: int
    """Ranks of each pipeline stage."""
    expert: int
    """Those among them that share the experts of a block."""
    tokens: int
    """Of a micro-batch."""
    length: int
    """Of a sequence."""
    rate: float
    bandwidth: float
    recompute: Collection[str] = ()
    moment_bytes: int = 2
    fp8: bool = False

    @cached_property
    def counted(self) -> Parameters:
        """Of the whole network."""
        return count_parameters(self.config)

    def memory(self, rank: int) -> RankMemory:
        """Of one rank of the pipeline, on each of its data-parallel ranks."""
        parts = set().union(*map(self.layout.parts, self.schedule.held(rank)))
        shared, experts = (sum(sizes) for sizes in zip(*map(self.part, parts), strict=True))
        own = shared + experts
        moments = 2 * self.moment_bytes * (shared // self.data + experts * self.expert // self.data)
        blocks = tuple(name for stage in self.schedule.held(rank) for name in self.layout.stages[stage])
        chunk = sum(self.kept(name) for name in blocks) / len(self.schedule.held(rank))
        activations = peak_activations(self.schedule.programs[rank]) * chunk * self.tokens
        return RankMemory(blocks, own, 6 * own, 4 * own, moments, round(activations))

    def part(self, name: str) -> tuple[int, int]:
        """(parameters of a part on every rank that holds it, its experts' on one of the ranks that share them)."""
        counted = self.counted
        if name in ("embed_tokens", "lm_head"):
            return counted.embedding, 0
        if name == "norm":
            return self.config.hidden_size, 0
        if self.is_dense(name.removeprefix("layers.")):
            return counted.dense_block, 0
        experts = self.config.n_routed_experts * counted.expert
        whole = counted.mtp_module if name.startswith("mtp.") else counted.moe_block
        return whole - experts, experts // self.expert

    def is_dense(self, block: str) -> bool:
        """Whether a block of the main model has no experts."""
        return block.isdigit() and int(block) < self.config.num_dense_layers

    def kept(self, block: str) -> float:
        """Bytes a token that a block keeps for the backward pass."""
        return kept_bytes(self.config, self.is_dense(block), self.recompute, self.fp8)

    @cached_property
    def ranks_per_token(self) -> float:
        """Other ranks that a token is sent to, on average, where each choice of experts is as likely as any other."""
        experts, chosen = self.config.n_routed_experts, self.config.num_experts_per_tok
        elsewhere = comb(experts - experts // self.expert, chosen) / comb(experts, chosen)
        return (self.expert - 1) * (1 - elsewhere)

    @property
    def dispatch_bytes(self) -> float:
        """Sent by a rank for one MoE block and one micro-batch; combine sends as many rows back, in BF16."""
        width = self.config.hidden_size * (TILED if self.fp8 else 2)
        return self.tokens * self.ranks_per_token * width

    @property
    def combine_bytes(self) -> float:
        """As `dispatch_bytes`."""
        return self.tokens * self.ranks_per_token * self.config.hidden_size * 2

    @property
    def message_bytes(self) -> int:
        """An activation between two stages, or its gradient: BF16."""
        return 2 * self.tokens * self.config.hidden_size

    def zero_bytes(self, rank: int) -> float:
        """Sent by a data-parallel rank for one step: FP32 gradients to those that update them, updated weights to all."""
        parts = set().union(*map(self.layout.parts, self.schedule.held(rank)))
        shared, experts = (sum(sizes) for sizes in zip(*map(self.part, parts), strict=True))
        others = self.data // self.expert
        return 8 * (shared * (self.data - 1) / self.data + experts * (others - 1) / others)

    def costs(self, stage: int) -> Costs:
        """Seconds of a chunk. Alone, a pass waits for its tokens; in a pair, the longer of both hides the other."""
        compute = self.tokens * block_flops(self.config, self.layout, stage, self.length) / 3 / self.rate
        moe = sum(not self.is_dense(name) for name in self.layout.stages[stage])
        sent = moe * (self.dispatch_bytes + self.combine_bytes) / self.bandwidth
        pair = max(3 * compute, 2 * sent)
        return Costs(compute + sent, 2 * compute + sent, compute, pair, self.message_bytes / self.bandwidth)

    @cached_property
    def timeline(self) -> Timeline:
        """Of a step, without the optimizer's."""
        return simulate(self.schedule.programs, [self.costs(stage) for stage in range(self.schedule.stages)])


def block_flops(config: ModelConfig, layout: Layout, stage: int, length: int) -> float:
    """FLOPs a token of a stage, forward and backward, attention's causal half included."""
    counted = count_parameters(config)
    attention = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * length / 2
    total = 0.0
    for name in layout.stages[stage]:
        dense = name.isdigit() and int(name) < config.num_dense_layers
        mtp = name.startswith("mtp.")
        parameters = counted.mtp_module_active + counted.embedding if mtp else counted.moe_block_active
        total += (counted.dense_block if dense else parameters) + attention
    return 6 * (total + (counted.embedding if stage == layout.last else 0))


def kept_bytes(config: ModelConfig, dense: bool, recompute: Collection[str], fp8: bool = False) -> float:
    """Bytes a token that one block keeps between its passes; see docs/memory.md for what `recompute` leaves out.

    In FP8, linear layers keep their inputs as tiles of E4M3 (attention's result in 12 bits), and gate and up alike.
    """
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    low = config.q_lora_rank or 0
    values = heads * config.v_head_dim
    inner = config.intermediate_size if dense else config.moe_intermediate_size
    chosen, always = (0, 1) if dense else (config.num_experts_per_tok, config.n_shared_experts)
    # The stream twice, both latents before their norms, attention's result, the experts' results.
    kept = 2 * (2 * hidden + low + latent + config.qk_rope_head_dim + values + chosen * hidden) + 4 * heads
    if not dense:
        kept += 12 * config.n_routed_experts + 40 * chosen
        kept += 0 if "norms" in recompute else 4 * hidden
    if "mla_up" not in recompute:
        kept += 2 * heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim)
    if fp8:
        inputs = hidden * (1 + chosen + always) + (0 if "mla_up" in recompute else low + latent)
        return kept + (inputs + 2 * inner * (chosen + always)) * TILED + values * (1.5 + 4 / 128)
    kept += 2 * chosen * hidden + 4 * inner * (chosen + always)
    kept += 0 if "norms" in recompute else 2 * (2 * hidden + low + latent)
    return kept + (0 if "swiglu" in recompute else 2 * inner * (chosen + always))


def divided(config: ModelConfig, stages: int, length: int) -> Layout:
    """The blocks in so many stages that compute equally long, as nearly as can be, for sequences of `length` tokens.

    Raises `UserError` where a stage would have no block.
    """
    depth = config.num_nextn_predict_layers
    alone = (Layout(((str(i),), ())) for i in range(config.num_hidden_layers))
    ends = Layout(((), tuple(f"mtp.{k}" for k in range(depth))))
    costs = [block_flops(config, each, 0, length) for each in alone]
    return balanced_layout(costs, stages, 0.0, block_flops(config, ends, 1, length), depth)


def make_plan(
    config: ModelConfig, name: str, *, pipeline: int, data: int, expert: int, batch: int, micro_batch: int, length: int,
    rate: float, bandwidth: float, recompute: Collection[str] = (), moment_bytes: int = 2, fp8: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a batch of `batch` sequences. Blocks are divided so that all stages compute equally long.

    Raises `UserError` for numbers that do not divide one another, and where the schedule or the division cannot be had.
    """
    if data % expert or config.n_routed_experts % expert:
        raise UserError(
            f"{expert} expert ranks: expected a divisor of {data} data-parallel ranks and of {config.n_routed_experts} experts"
        )
    if batch % (data * micro_batch):
        raise UserError(
            f"a batch of {batch} sequences on {data} data-parallel ranks, {micro_batch} at a time: expected a multiple of "
            f"{data * micro_batch}"
        )
    schedule = make_schedule(name, pipeline, batch // (data * micro_batch))
    layout = divided(config, schedule.stages, length)
    tokens = micro_batch * length
    return Plan(config, schedule, layout, data, expert, tokens, length, rate, bandwidth, recompute, moment_bytes, fp8)
