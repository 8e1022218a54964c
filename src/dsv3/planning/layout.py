"""What each rank holds in a parallel layout, by arithmetic on its recipe: the blocks of a stage, the parameters of a rank."""

from dataclasses import dataclass
from itertools import groupby

from dsv3.model.config import ModelConfig
from dsv3.parallel.pipeline.layout import Layout, balanced_layout
from dsv3.parallel.pipeline.schedule import Schedule
from dsv3.parallel.pipeline.schedules import make_schedule
from dsv3.planning.flops import block_flops, is_dense
from dsv3.planning.parameters import count_parameters
from dsv3.recipe.parallel import ParallelSection, least_micro_batches
from dsv3.recipe.schema import Recipe


@dataclass(frozen=True)
class Holding:
    """What each of some ranks holds: those of one pipeline rank that have the same experts."""

    ranks: range
    blocks: tuple[str, ...]
    """By name (`Block.name`), from all its stages."""
    experts: range
    """Of every MoE block."""
    shared: int
    """Parameters beside the routed experts'; the router's correction biases are none."""
    routed: int
    """Parameters of these experts."""
    outside: int
    """Of `shared`, those of embedding and head."""
    narrow_shared: int
    """Of `shared`, those held in BF16, whose FP32 master copies are shared out (`parallel.zero`)..."""
    narrow_routed: int
    """...and of `routed`."""
    masters: int
    """Parameters whose master copy this rank has: its share of these, to within a row a parameter."""
    updated: int
    """Parameters whose moments the rank keeps: its share, to within a row a parameter; with Muon all, at most."""
    moment_bytes: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.shared + self.routed

    @property
    def narrow(self) -> int:
        """Parameters held in BF16."""
        return self.narrow_shared + self.narrow_routed

    @property
    def weights(self) -> int:
        """Bytes in FP32 and BF16, master copies included."""
        return 4 * (self.parameters - self.narrow + self.masters) + 2 * self.narrow

    @property
    def gradients(self) -> int:
        """Bytes, all in FP32."""
        return 4 * self.parameters

    @property
    def moments(self) -> int:
        """Bytes of Adam's two moments, at most where Muon keeps one."""
        return 2 * self.moment_bytes * self.updated

    @property
    def layers(self) -> str:
        """The blocks in short: `0-3 58-60 mtp.0`."""
        numbers = [int(name) for name in self.blocks if name.isdigit()]
        runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda each: each[1] - each[0])]
        written = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
        return " ".join([*written, *(name for name in self.blocks if not name.isdigit())])


def holdings(recipe: Recipe) -> list[Holding]:
    """By place in the pipeline, then by experts: the rank e of place p is the first of entry p x `parallel.expert` + e."""
    config, parallel = recipe.model.config(), recipe.parallel
    schedule, each = schedule_of(parallel), config.n_routed_experts // parallel.expert
    layout = divided(config, schedule.stages, recipe.data.sequence_length)
    moment_bytes = 2 if recipe.optimizer.moments == "bf16" else 4
    found = []
    for place, stages in enumerate(schedule.placement):
        blocks = tuple(name for stage in stages for name in layout.stages[stage])
        parts = set().union(*map(layout.parts, stages))
        shared, wide, routed = map(sum, zip(*(part_parameters(config, part) for part in parts), strict=True))
        routed //= parallel.expert
        outside = count_parameters(config).embedding * len(parts & {"embed_tokens", "lm_head"})
        updated = shared // parallel.data + routed * parallel.expert // parallel.data
        narrow_shared, narrow_routed = shared - wide, routed
        if recipe.optimizer.kind == "muon":
            updated, narrow_shared, narrow_routed = shared + routed, outside, 0
        if recipe.training.precision == "fp32" or parallel.data == 1:
            narrow_shared = narrow_routed = 0
        elif parallel.data == parallel.expert:
            narrow_routed = 0
        masters = narrow_shared // parallel.data + narrow_routed * parallel.expert // parallel.data
        first, end = place * parallel.data, (place + 1) * parallel.data
        found += [
            Holding(
                range(first + e, end, parallel.expert), blocks, range(e * each, (e + 1) * each), shared, routed, outside,
                narrow_shared, narrow_routed, masters, updated, moment_bytes,
            )
            for e in range(parallel.expert)
        ]  # fmt: skip
    return found


def schedule_of(parallel: ParallelSection, micro_batches: int | None = None) -> Schedule:
    """The schedule of a step with so many micro-batches on each pipeline (by default as few as it can have); without a pipeline,
    one pass after the other. Which rank holds which stage does not depend on their number."""
    name, ranks = parallel.schedule if parallel.pipeline > 1 else "one_f_one_b", parallel.pipeline
    count = least_micro_batches(name, ranks) if micro_batches is None else micro_batches
    return make_schedule(name, ranks, count, parallel.schedule_below)


def divided(config: ModelConfig, stages: int, length: int) -> Layout:
    """The blocks in so many stages of nearly equal compute time, for sequences of `length` tokens.

    Raises `UserError` where a stage would have no block.
    """
    depth = config.num_nextn_predict_layers
    costs = [block_flops(config, [str(i)], False, length) for i in range(config.num_hidden_layers)]
    last = block_flops(config, [f"mtp.{k}" for k in range(depth)], True, length)
    return balanced_layout(costs, stages, 0.0, last, depth)


def part_parameters(config: ModelConfig, part: str) -> tuple[int, int, int]:
    """Parameters of a part, by its name in `Layout.parts`: (beside the routed experts; of these, those that passes read in FP32:
    norm gains and the router; of all its routed experts)."""
    counted, hidden, experts = count_parameters(config), config.hidden_size, config.n_routed_experts
    if part in ("embed_tokens", "lm_head"):
        return counted.embedding, 0, 0
    if part == "norm":
        return hidden, hidden, 0
    gains = 2 * hidden + (config.q_lora_rank or 0) + config.kv_lora_rank
    if is_dense(config, part.removeprefix("layers.")):
        return counted.dense_block, gains, 0
    whole, routed = counted.moe_block, experts * counted.expert
    if part.startswith("mtp."):
        whole, gains = counted.mtp_module, gains + 3 * hidden
    return whole - routed - experts, gains + experts * hidden, routed
