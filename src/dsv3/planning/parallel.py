"""What a recipe's layout over many GPUs costs, before any is rented: memory of each rank, wire traffic, time of a step.

Memory is what this code base keeps: gradients in FP32 on every rank that holds a parameter; weights in FP32, or with several
data-parallel ranks in BF16, with FP32 master copies sharded like the moments (ZeRO-1); copies of the matrices for their products
(of FP32 weights one in BF16; or two in FP8); and activations. Times follow from what a GPU computes and sends in a second, or
from measured times of layers; docs/scale.md says what is left out.

Legend: D hidden, I inner elements of an expert, K experts per token, E experts.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import comb, inf

from dsv3.model.config import ModelConfig
from dsv3.parallel.pipeline.instructions import Backward, Compute, Forward, InputGradient, Overlapped, WeightGradient
from dsv3.parallel.pipeline.layout import Layout
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.simulator import Costs, Timeline, peak_activations, simulate
from dsv3.planning.flops import block_flops, is_dense
from dsv3.planning.layout import Holding, divided, holdings, schedule_of
from dsv3.recipe.schema import Recipe

TILED = 1 + 4 / 128
"""Bytes of an element of E4M3 with its share of the scale."""


@dataclass(frozen=True)
class Machine:
    """What one GPU of a cluster does in a second."""

    flops: float = 400e12
    """FLOP/s sustained in the passes."""
    between: float = 50e9
    """Bytes/s to GPUs of other nodes; the report's is InfiniBand's."""
    within: float = 160e9
    """Bytes/s to GPUs of its own node; the report's is NVLink's."""
    node: int = 8
    """GPUs of a node."""
    layers: Mapping[str, float] | None = None
    """Seconds a token of `dense_layer`, `moe_layer` and `head`, forward and backward, in place of `flops`: DeepSeek-V3's, as
    `dsv3 bench train --share` measures them. An MTP module counts as a layer and a head."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, and what they are for."""

    layers: str
    parameters: int
    weights: int
    """With their master copies, and two bytes for copies that products read."""
    gradients: int
    moments: int
    activations: int
    """At the most."""

    @property
    def total(self) -> int:
        """Without what libraries and the allocator take."""
        return self.weights + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step; those of the passes are means over the ranks of a pipeline, and add up with `bubble` and
    `update` to `total`."""

    total: float
    forward: float
    """Forward passes alone."""
    backward: float
    """Backward passes alone, with weights' gradients or without."""
    weight_gradient: float
    """Weights' gradients alone."""
    pair: float
    """A forward and a backward pass, overlapped."""
    bubble: float
    update: float
    """Gradients summed, weights gathered; nothing hides it."""
    exposed: float
    """Of `total`, what it would save if nothing had to be sent."""


@dataclass(frozen=True)
class Plan:
    """One step of a recipe with `batch` sequences."""

    recipe: Recipe
    batch: int
    machine: Machine

    @cached_property
    def config(self) -> ModelConfig:
        """The network."""
        return self.recipe.model.config()

    @cached_property
    def micro_batches(self) -> int:
        """Of one pipeline."""
        return self.recipe.micro_batches(self.batch)

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch // (self.recipe.parallel.data * self.micro_batches) * self.recipe.data.sequence_length

    @cached_property
    def schedule(self) -> Schedule:
        """Of this batch; without a pipeline one pass after the other."""
        return schedule_of(self.recipe.parallel, self.micro_batches)

    @cached_property
    def layout(self) -> Layout:
        """The blocks of each stage."""
        return divided(self.config, self.schedule.stages, self.recipe.data.sequence_length)

    @cached_property
    def held(self) -> list[Holding]:
        """By rank of the pipeline."""
        return holdings(self.recipe)[:: self.recipe.parallel.expert]

    @property
    def fp8(self) -> bool:
        """Whether products, and what is dispatched, are in FP8."""
        return self.recipe.training.precision == "fp8"

    def memory(self, rank: int) -> RankMemory:
        """Of one rank of the pipeline, on each of its data-parallel ranks."""
        held, recompute = self.held[rank], self.recipe.training.recompute
        kept = sum(
            kept_bytes(self.config, is_dense(self.config, each), recompute, self.fp8, self.room) for each in held.blocks
        )
        chunks = peak_activations(self.schedule.programs[rank]) / len(self.schedule.placement[rank])
        copied = {"fp32": 0, "bf16": held.parameters - held.narrow, "fp8": held.parameters - held.outside}
        weights = held.weights + 2 * copied[self.recipe.training.precision]
        return RankMemory(
            held.layers, held.parameters, weights, held.gradients, held.moments, round(kept * chunks * self.tokens)
        )

    def reached(self, experts: int) -> float:
        """How many of the holders of so many experts a token is sent to (0 to 1), if groups, and experts in these, are random."""
        config = self.config
        size = config.n_routed_experts // config.n_group
        covered, each = max(1, experts // size), min(experts, size)
        chosen, picked = config.topk_group * size, config.num_experts_per_tok
        missed = sum(
            comb(covered, met) * comb(config.n_group - covered, config.topk_group - met) * comb(chosen - met * each, picked)
            for met in range(min(covered, config.topk_group) + 1)
        )  # fmt: skip
        return 1 - missed / comb(config.n_group, config.topk_group) / comb(chosen, picked)

    @property
    def room(self) -> int | None:
        """Rows a token that a rank's experts have room for, if exchanges are bounded; else None: as many as a token chooses."""
        ranks, chosen = self.recipe.parallel.expert, self.config.num_experts_per_tok
        if ranks == 1 or not self.recipe.parallel.bounded_exchange:
            return None
        return ranks * min(chosen, self.config.n_routed_experts // ranks)

    @cached_property
    def rows(self) -> tuple[float, float]:
        """Rows a token of one dispatch (see `parallel.dispatch`): (to other nodes; from there to the node's other ranks). In bounded
        exchanges a token has a row for every rank."""
        ranks = self.recipe.parallel.expert
        width, each = min(self.machine.node, ranks), self.config.n_routed_experts // ranks
        nodes = ranks // width
        if self.recipe.parallel.bounded_exchange:
            return nodes - 1, ranks - nodes
        return (nodes - 1) * self.reached(each * width), (ranks - nodes) * self.reached(each)

    @property
    def row_bytes(self) -> tuple[float, float]:
        """(of a dispatched row, its experts and weights included; of a combined one)."""
        hidden, beside = self.config.hidden_size, 8 * self.config.num_experts_per_tok
        return hidden * (TILED if self.fp8 else 2) + beside, 2 * hidden

    @cached_property
    def exchange(self) -> float:
        """Seconds of dispatch and combine of one MoE block, one leg after the other; backward takes as long."""
        between, within = self.rows
        seconds = between / self.machine.between + within / self.machine.within
        return self.tokens * sum(self.row_bytes) * seconds

    @cached_property
    def wire(self) -> dict[str, float]:
        """Bytes that a GPU sends, by purpose."""
        (between, within), (there, back) = self.rows, self.row_bytes
        return {
            "dispatch of a block, to other nodes": self.tokens * between * there,
            "dispatch of a block, within the node": self.tokens * within * there,
            "combine of a block, to other nodes": self.tokens * between * back,
            "combine of a block, within the node": self.tokens * within * back,
            "activation to the next stage": self.message_bytes,
            "gradients and weights of a step": max(map(self.update_bytes, range(len(self.held)))),
        }

    @property
    def message_bytes(self) -> int:
        """An activation between two stages, or its gradient: BF16."""
        return 2 * self.tokens * self.config.hidden_size

    def update_bytes(self, rank: int) -> float:
        """Sent by a rank for one step: FP32 gradients to the ranks that update them, updated weights to all in their dtype, and the
        gradients of its shares of what another rank of the pipeline holds too."""
        held, parallel = self.held[rank], self.recipe.parallel
        others = parallel.data // parallel.expert
        shared = (8 * held.shared - 2 * held.narrow_shared) * (parallel.data - 1) / parallel.data
        routed = (8 * held.routed - 2 * held.narrow_routed) * (others - 1) / others
        twice = self.recipe.parallel.pipeline > 1 and self.recipe.parallel.schedule == "dual_pipe"
        return shared + routed + (4 * held.updated if twice else 0)

    def compute(self, stage: int) -> float:
        """Seconds of a chunk, forward and backward."""
        blocks, last, times = self.layout.stages[stage], stage == self.layout.last, self.machine.layers
        if times is None:
            flops = block_flops(self.config, blocks, last, self.recipe.data.sequence_length)
            return self.tokens * flops / self.machine.flops
        dense = sum(is_dense(self.config, name) for name in blocks)
        heads = last + sum(name.startswith("mtp.") for name in blocks)
        seconds = dense * times["dense_layer"] + (len(blocks) - dense) * times["moe_layer"] + heads * times["head"]
        return self.tokens * seconds

    def costs(self, stage: int) -> Costs:
        """Seconds of a chunk, a third each for the forward pass, input gradients and weight gradients. Alone, a pass waits for its
        tokens; in a pair, the longer of compute and communication hides the other."""
        third = self.compute(stage) / 3
        sent = self.exchange * sum(not is_dense(self.config, name) for name in self.layout.stages[stage])
        message = self.message_bytes / self.machine.between
        return Costs(third + sent, 2 * third + sent, third, max(3 * third, 2 * sent), message)

    @cached_property
    def timeline(self) -> Timeline:
        """Of a step, without the update."""
        return simulate(self.schedule.programs, [self.costs(stage) for stage in range(self.schedule.stages)])

    @cached_property
    def step(self) -> Step:
        """What a step takes. Data-parallel ranks are taken to be on different nodes."""
        passes, ranks = self.timeline.total, len(self.held)

        def spent(*kinds: type[Compute]) -> float:
            own = (each for rank in self.timeline.spans for each in rank if isinstance(each.instruction, kinds))
            return sum(each.end - each.start for each in own) / ranks

        update = max(map(self.update_bytes, range(ranks))) / self.machine.between
        free = replace(self, machine=replace(self.machine, between=inf, within=inf)).timeline.total
        return Step(
            passes + update, spent(Forward), spent(Backward, InputGradient), spent(WeightGradient), spent(Overlapped),
            passes - spent(Forward, Backward, InputGradient, WeightGradient, Overlapped), update, passes + update - free,
        )  # fmt: skip


def kept_bytes(
    config: ModelConfig, dense: bool, recompute: Collection[str], fp8: bool = False, room: int | None = None
) -> float:
    """Bytes a token that one block keeps between its passes; see docs/memory.md for what `recompute` leaves out. `room`: rows a
    token of the routed experts, where there are more than a token chooses (`Plan.room`).

    In FP8, linear layers keep their inputs as tiles of E4M3 (attention's result in 12 bits), and gate and up alike.
    """
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    low = config.q_lora_rank or 0
    values = heads * config.v_head_dim
    inner = config.intermediate_size if dense else config.moe_intermediate_size
    chosen, always = (0, 1) if dense else (room or config.num_experts_per_tok, config.n_shared_experts)
    # The stream twice, both latents before their norms, attention's result.
    kept = 2 * (2 * hidden + low + latent + config.qk_rope_head_dim + values) + 4 * heads
    if not dense:
        kept += 12 * config.n_routed_experts + 40 * chosen
    if "mla_up" not in recompute:
        kept += 2 * heads * (2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim)
    if fp8:
        inputs = hidden * (1 + chosen + always) + (0 if "mla_up" in recompute else low + latent)
        # The router reads what the norm gave, not tiles of it.
        kept += 0 if dense or "norms" in recompute else 2 * hidden
        return kept + (inputs + 2 * inner * (chosen + always)) * TILED + values * (1.5 + 4 / 128)
    kept += 2 * chosen * hidden + 4 * inner * (chosen + always)
    kept += 0 if "norms" in recompute else 2 * (2 * hidden + low + latent)
    return kept + (0 if "swiglu" in recompute else 2 * inner * (chosen + always))
