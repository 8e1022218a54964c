"""One stage of a network as segments, computation and communication in turn: what the overlapped executor alternates between.

The five phases of a block become two computations with its dispatch and combine between and behind them; what nothing is
sent between is one segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dsv3.model.block import Block, Carry
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
        groups[-1].append(partial(embed, model))
    for name in blocks:
        if not name.startswith("mtp."):
            add_block(groups, by_name[name], 0)
    if last:
        groups[-1].append(partial(main_loss, model))
    for module in model.mtp if last and mtp else []:
        groups[-1].append(partial(enter_module, model, module))
        add_block(groups, module.block, module.depth + 1)
        groups[-1].append(partial(module_loss, model, module))
    return groups


def add_block(groups: list[list[Step]], block: Block, ahead: int) -> None:
    """The phases of a block that reads tokens `ahead`: 0 in the main model, more in an MTP module."""

    def attend(flow: Flow) -> None:
        assert flow.stream is not None
        shared = flow.rows.shorter(ahead) if ahead else flow.rows.shared
        flow.carry, flow.stream = block.attend(flow.stream, shared), None
        if flow.carry.routing is not None:
            flow.routings[block.name] = flow.carry.routing

    def phase(run: Callable[[Carry], None], flow: Flow) -> None:
        assert flow.carry is not None
        run(flow.carry)

    def merge(flow: Flow) -> None:
        assert flow.carry is not None
        flow.stream, flow.carry = block.merge(flow.carry), None

    dispatch, experts, combine = (partial(phase, each) for each in (block.dispatch, block.experts, block.combine))
    groups[-1].append(attend)
    if block.moe is None:
        groups[-1] += [experts, merge]
    else:
        groups += [[dispatch], [experts], [combine], [merge]]


def embed(model: DeepSeekV3, flow: Flow) -> None:
    """The embedding."""
    flow.stream = model.embed(flow.rows.inputs)


def main_loss(model: DeepSeekV3, flow: Flow) -> None:
    """Final norm, head and the main loss."""
    assert flow.stream is not None
    flow.hidden, flow.stream = model.norm(flow.stream), None
    add_loss(model, flow, 1, 1.0)


def enter_module(model: DeepSeekV3, module: MultiTokenPrediction, flow: Flow) -> None:
    """What comes before an MTP module's block."""
    assert flow.hidden is not None
    states, embeddings, _ = model.deeper(module, flow.hidden, flow.rows)
    flow.stream, flow.hidden = module.enter(states, embeddings), None


def module_loss(model: DeepSeekV3, module: MultiTokenPrediction, flow: Flow) -> None:
    """What comes after it."""
    assert flow.stream is not None
    flow.hidden, flow.stream = module.shared_head.norm(flow.stream), None
    add_loss(model, flow, module.depth + 2, flow.rows.mtp_weight / len(model.mtp))


def add_loss(model: DeepSeekV3, flow: Flow, ahead: int, weight: float) -> None:
    """Adds one loss to the total."""
    assert flow.hidden is not None
    loss = flow.rows.loss(flow.hidden, model.lm_head.weight, ahead)
    flow.losses.append(loss.detach())
    part = loss * (weight * flow.rows.scale)
    flow.total = part if flow.total is None else flow.total + part
