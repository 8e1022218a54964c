"""The instructions of a pipeline schedule: one rank's list of them is its program for one batch.

Stages are numbered from the embedding (0) to the head, micro-batches from 0. An instruction is about one micro-batch in one
stage, its chunk; a rank may hold several stages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

What = Literal["activation", "gradient"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One micro-batch in one stage."""

    stage: int
    micro_batch: int


class Forward(Chunk):
    """The stage's forward pass; in the last stage the losses too."""


class Backward(Chunk):
    """Gradients of the stage's input and of its weights."""


class InputGradient(Chunk):
    """The first half of `Backward`, which the stage before waits for."""


class WeightGradient(Chunk):
    """The other half, which nobody waits for."""


@dataclass(frozen=True, slots=True)
class Overlapped:
    """A forward and a backward pass whose phases alternate, so that communication of one hides under the other's compute."""

    forward: Forward
    backward: Backward


@dataclass(frozen=True, slots=True)
class Message:
    """An activation on its way to the next stage, or its gradient on the way back."""

    what: What
    stage: int
    """The stage it goes to."""
    micro_batch: int
    peer: int
    """The other rank."""


class Send(Message):
    """Starts sending the result of an earlier instruction, without waiting."""


class Receive(Message):
    """Starts receiving a message that a later instruction waits for."""


Compute = Forward | Backward | InputGradient | WeightGradient | Overlapped
Instruction = Compute | Send | Receive
Program = Sequence[Instruction]


def chunks(instruction: Instruction) -> Iterator[Chunk]:
    """The passes of one instruction: two of a pair, none of a message."""
    if isinstance(instruction, Overlapped):
        yield instruction.forward
        yield instruction.backward
    elif isinstance(instruction, Chunk):
        yield instruction
