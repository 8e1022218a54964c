"""Forward passes of a model over a cache. Those of decoding repeat in few shapes: they are recorded and replayed.

Legend: F tokens of the pass, D hidden, N rows of logits, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.inference.batch import Batch
from dsv3.inference.cache import PagedCache
from dsv3.inference.recording import Function, Layouts, Recording, pays
from dsv3.model.attention import Absorbed
from dsv3.model.block import Block, Pass
from dsv3.model.mtp import MultiTokenPrediction
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3

STEADY = 4
"""Passes of one shape before it is recorded: recording takes about as long as four passes."""


class Graph:
    """`Recording` for a GPU: a CUDA graph."""

    def __init__(self, function: Function, inputs: Sequence[Tensor]):
        self.inputs = [each.clone() for each in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels and allocates workspaces outside the graph
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
    """A model's passes; `graphs`: whether those of decoding on a GPU become CUDA graphs."""

    def __init__(self, model: DeepSeekV3, cache: PagedCache, graphs: bool):
        self.model, self.cache, self.graphs = model, cache, graphs
        self.seen: Counter[Any] = Counter()
        self.worth: dict[int, bool] = {}
        self.recorded: dict[Any, Recording | Graph] = {}
        self.layouts: Layouts = {}

    def main(self, batch: Batch, row_N: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(hidden [F, D], logits [N, V] of these rows, the experts [F, K] that each MoE block chose)."""
        rows = filled(row_N, len(batch.token_F)) if batch.uniform else row_N
        hidden_FD, logits, *experts = self.repeat("main", self.model.layers, self.read, batch, rows)
        return hidden_FD, logits[: len(row_N)], tuple(experts)

    def read(self, batch: Batch, row_N: Tensor) -> tuple[Tensor, ...]:
        """The main model on one batch."""
        self.cache.begin(batch)
        output = self.model(batch.token_F[None], positions=batch.position_F[None], cache=self.cache)
        hidden_FD = output.hidden[0]
        experts = [routing.expert for routing in output.routing.values()]
        return hidden_FD, self.model.head(hidden_FD.index_select(0, row_N)), *experts

    def draft(
        self, module: MultiTokenPrediction, batch: Batch, hidden_FD: Tensor, token_F: Tensor, row_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One MTP module on hidden states and their next tokens: (its hidden states [F, D], the most likely tokens after these rows [N])."""

        def read(batch: Batch, hidden_FD: Tensor, token_F: Tensor, row_N: Tensor) -> tuple[Tensor, ...]:
            self.cache.begin(batch)
            shared = Pass(rotations(self.model.config, batch.position_F[None]), None, self.cache)
            out_FD = module(hidden_FD[None], self.model.embed(token_F[None]), shared)[0][0]
            return out_FD, self.model.head(out_FD.index_select(0, row_N)).max(-1).indices

        rows = filled(row_N, len(batch.only.lengths)) if batch.uniform else row_N
        out_FD, guesses = self.repeat(f"draft {module.depth}", [module.block], read, batch, hidden_FD, token_F, rows)
        return out_FD, guesses[: len(row_N)]

    def repeat(
        self,
        kind: str,
        blocks: Iterable[Block],
        function: Callable[..., tuple[Tensor, ...]],
        batch: Batch,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """`function(batch, *inputs)`, a pass through these blocks; recorded and replayed if its shape repeats."""
        if not batch.uniform or not self.replays(len(batch.token_F)):
            return function(batch, *inputs)
        gathered = self.cache.gather([block.name for block in blocks], batch)
        batch = replace(batch, gathered=gathered)
        part = batch.only
        tensors = batch.token_F, batch.position_F, batch.slot_F, part.table, part.lengths, *inputs
        on_gpu = batch.token_F.is_cuda
        # On a CPU and without a gathered copy, storing depends on how many tokens are padding.
        key = kind, batch.uniform, gathered or on_gpu or len(batch.works), *(each.shape for each in tensors)
        self.seen[key] += 1
        if key not in self.recorded:
            if self.seen[key] < STEADY:
                return function(batch, *inputs)

            def of_tensors(
                token: Tensor, position: Tensor, slot: Tensor, table: Tensor, lengths: Tensor, *rest: Tensor
            ) -> tuple[Tensor, ...]:
                parts = [Absorbed(part.rows, table, lengths)]
                return function(replace(batch, token_F=token, position_F=position, slot_F=slot, parts=parts), *rest)

            self.recorded[key] = Graph(of_tensors, tensors) if on_gpu else Recording(of_tensors, tensors, self.layouts)
        return self.recorded[key](*tensors)

    def forget(self) -> None:
        """Drops all recordings: they hold copies of the weights."""
        self.recorded.clear()
        self.layouts.clear()

    def replays(self, rows: int) -> bool:
        """Whether passes of so many rows may be recorded."""
        if rows not in self.worth:
            if self.model.lm_head.weight.is_cuda:
                self.worth[rows] = self.graphs and not counted_on_the_host(self.model)
            else:  # attention over packed pages reads tensors' values in Python there
                self.worth[rows] = self.cache.dtype != torch.uint8 and pays(self.model, rows)
        return self.worth[rows]


def filled(row_N: Tensor, count: int) -> Tensor:
    """With row 0 behind them, so many: one recording serves a batch that shrinks."""
    return row_N if len(row_N) == count else F.pad(row_N, (0, count - len(row_N)))


@torch.inference_mode()
def counted_on_the_host(model: DeepSeekV3) -> bool:
    """Whether passes on a GPU wait for the experts' row counts: in FP32, and where FP8 weights are dequantised."""
    head = model.lm_head.weight
    x = head.new_empty(1, model.config.hidden_size, dtype=model.compute_dtype or head.dtype)
    experts = [block.moe.experts for block in model.blocks() if block.moe is not None]
    return any(
        x.dtype == torch.float32 if each.gate_up_proj_scale_inv is None else not each.serves_in_fp8(x)
        for each in experts
    )
