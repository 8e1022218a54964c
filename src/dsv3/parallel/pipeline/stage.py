"""One stage of a network as segments, computation and communication in turn: what the overlapped executor alternates between.

The five phases of a block become two computations with its dispatch and combine between and behind them; what nothing is
sent between is one segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dsv3.model.block import Block, Carry, Pass
from dsv3.model.feed_forward import Routing
from dsv3.model.micro_batch import MicroBatch
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.transformer import DeepSeekV3


@dataclass
class Flow:
    """One micro-batch on its way through a stage."""

    rows: MicroBatch
    stream: Tensor | None = None
    """[B, T, D] between blocks: what one stage sends to the next."""
    carry: Carry | None = None
    """Within a block."""
    hidden: Tensor | None = None
    """The normed state that the next MTP module reads."""
    total: Tensor | None = None
    """The loss, in the last stage."""
    losses: list[Tensor] = field(default_factory=list)
    """Without gradient: the main loss, then MTP's."""
    routings: dict[str, Routing] = field(default_factory=dict)
    """By the name of the MoE block."""


Step = Callable[[Flow], None]


def segments(model: DeepSeekV3, blocks: Sequence[str], first: bool, last: bool, mtp: bool) -> list[list[Step]]:
    """The steps of a stage with these blocks of `model`, grouped: those at even places compute, those at odd ones communicate.

    `mtp` says whether the MTP modules take part.
    """
    by_name = {block.name: block for block in model.blocks()}
    groups: list[list[Step]] = [[]]
    if first:
        groups[-1].append(lambda flow: enter(model, flow))
    for name in blocks:
        if not name.startswith("mtp."):
            add_block(groups, by_name[name], None)
    if last:
        groups[-1].append(lambda flow: main_loss(model, flow))
    for module in model.mtp if last and mtp else []:
        groups[-1].append(enter_module(model, module))
        add_block(groups, module.block, module.depth + 1)
        groups[-1].append(module_loss(model, module))
    return groups


def add_block(groups: list[list[Step]], block: Block, ahead: int | None) -> None:
    """The phases of a block; of an MTP module's, which reads tokens `ahead`."""

    def attend(flow: Flow) -> None:
        shared: Pass = flow.rows.shared if ahead is None else flow.rows.shorter(ahead)
        assert flow.stream is not None
        flow.carry, flow.stream = block.attend(flow.stream, shared), None
        if flow.carry.routing is not None:
            flow.routings[block.name] = flow.carry.routing

    def phase(run: Callable[[Carry], None]) -> Step:
        def step(flow: Flow) -> None:
            assert flow.carry is not None
            run(flow.carry)

        return step

    def merge(flow: Flow) -> None:
        assert flow.carry is not None
        flow.stream, flow.carry = block.merge(flow.carry), None

    groups[-1].append(attend)
    if block.moe is None:
        groups[-1] += [phase(block.experts), merge]
    else:
        groups += [[phase(block.dispatch)], [phase(block.experts)], [phase(block.combine)], [merge]]


def enter(model: DeepSeekV3, flow: Flow) -> None:
    """The embedding."""
    flow.stream = model.embed(flow.rows.inputs)


def main_loss(model: DeepSeekV3, flow: Flow) -> None:
    """Final norm, head and the main loss."""
    assert flow.stream is not None
    flow.hidden, flow.stream = model.norm(flow.stream), None
    add_loss(model, flow, 1, 1.0)


def enter_module(model: DeepSeekV3, module: MultiTokenPrediction) -> Step:
    """What comes before an MTP module's block."""

    def step(flow: Flow) -> None:
        assert flow.hidden is not None
        states, embeddings, _ = model.deeper(module, flow.hidden, flow.rows)
        flow.stream, flow.hidden = module.enter(states, embeddings), None

    return step


def module_loss(model: DeepSeekV3, module: MultiTokenPrediction) -> Step:
    """What comes behind it."""

    def step(flow: Flow) -> None:
        assert flow.stream is not None
        flow.hidden, flow.stream = module.shared_head.norm(flow.stream), None
        add_loss(model, flow, module.depth + 2, flow.rows.mtp_weight / len(model.mtp))

    return step


def add_loss(model: DeepSeekV3, flow: Flow, ahead: int, weight: float) -> None:
    """One loss joins the total."""
    assert flow.hidden is not None
    loss = flow.rows.loss(flow.hidden, model.lm_head.weight, ahead)
    flow.losses.append(loss.detach())
    part = loss * (weight * flow.rows.scale)
    flow.total = part if flow.total is None else flow.total + part
