"""The passes of a model over a cache. Those of decoding come again and again in few shapes: they are recorded and replayed.

Legend: F tokens of the pass, D hidden, N rows of logits, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv3.inference.batch import Batch
from dsv3.inference.cache import PagedCache
from dsv3.inference.recording import Function, Recording, pays
from dsv3.model.attention import Absorbed
from dsv3.model.block import Pass
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.rope import Rope
from dsv3.model.transformer import DeepSeekV3

STEADY = 4
"""Passes of one shape after which it is likely to come often enough: a recording takes about as long as four."""


class Graph:
    """A CUDA graph: as `Recording`."""

    def __init__(self, function: Function, inputs: Sequence[Tensor]):
        self.inputs = [each.clone() for each in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and libraries make room outside the graph
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's result, which the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


class Passes:
    """What the runner computes with; `graphs`: whether passes on a GPU become CUDA graphs."""

    def __init__(self, model: DeepSeekV3, cache: PagedCache, graphs: bool):
        self.model, self.cache, self.graphs = model, cache, graphs
        self.seen: Counter[Any] = Counter()
        self.worth: dict[int, bool] = {}
        self.recorded: dict[Any, Recording | Graph] = {}

    def main(self, batch: Batch, row_N: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(hidden [F, D], logits [N, V] of these rows, the experts [F, K] that each MoE block chose)."""
        hidden_FD, logits_NV, *experts = self.repeat("main", self.read, batch, row_N)
        return hidden_FD, logits_NV, tuple(experts)

    def read(self, batch: Batch, row_N: Tensor) -> tuple[Tensor, ...]:
        """The main model on one batch."""
        self.cache.begin(batch.parts, batch.slot_F)
        output = self.model(batch.token_F[None], positions=batch.position_F[None], cache=self.cache)
        hidden_FD = output.hidden[0]
        experts = [routing.expert for routing in output.routing.values()]
        return hidden_FD, self.model.head(hidden_FD[row_N]), *experts

    def draft(
        self, module: MultiTokenPrediction, batch: Batch, hidden_FD: Tensor, token_F: Tensor, row_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One MTP module on states and the tokens further on: (its states [F, D], the most likely tokens behind these rows [N])."""

        def read(batch: Batch, hidden_FD: Tensor, token_F: Tensor, row_N: Tensor) -> tuple[Tensor, ...]:
            self.cache.begin(batch.parts, batch.slot_F)
            shared = Pass(Rope.at(self.model.config, batch.position_F[None]), None, self.cache)
            out_FD = module(hidden_FD[None], self.model.embed(token_F[None]), shared)[0][0]
            return out_FD, self.model.head(out_FD[row_N]).argmax(-1)

        out_FD, guess_N = self.repeat(f"draft {module.depth}", read, batch, hidden_FD, token_F, row_N)
        return out_FD, guess_N

    def repeat(
        self, kind: str, function: Callable[..., tuple[Tensor, ...]], batch: Batch, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function(batch, *inputs)`, replayed if passes of its shape come often."""
        if not batch.uniform or not self.replays(len(batch.token_F)):
            return function(batch, *inputs)
        [part] = batch.parts
        assert isinstance(part, Absorbed)
        tensors = batch.token_F, batch.position_F, batch.slot_F, part.table, part.lengths, *inputs
        key = kind, batch.uniform, len(batch.works), *(each.shape for each in tensors)
        self.seen[key] += 1
        if key not in self.recorded:
            if self.seen[key] < STEADY:
                return function(batch, *inputs)

            def of_tensors(
                token: Tensor, position: Tensor, slot: Tensor, table: Tensor, lengths: Tensor, *rest: Tensor
            ) -> tuple[Tensor, ...]:
                parts = [Absorbed(part.rows, table, lengths)]
                return function(replace(batch, token_F=token, position_F=position, slot_F=slot, parts=parts), *rest)

            self.recorded[key] = (Graph if batch.token_F.is_cuda else Recording)(of_tensors, tensors)
        return self.recorded[key](*tensors)

    def replays(self, rows: int) -> bool:
        """Whether passes of so many rows may be recorded."""
        if rows not in self.worth:
            self.worth[rows] = self.graphs if self.model.lm_head.weight.is_cuda else pays(self.model, rows)
        return self.worth[rows]
