"""The peer of our pipelines: `torch.distributed.pipelining` with the same blocks, used as its documentation says."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.pipelining as pipelining
from torch import Tensor, nn

from dsv3.model.block import Pass
from dsv3.model.micro_batch import default_positions
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cross_entropy import linear_cross_entropy
from dsv3.parallel.group import Group
from dsv3.parallel.pipeline.layout import Layout


class StageModule(nn.Module):
    """Some blocks, with the embedding in the first stage and the final norm in the last. The head belongs to the loss, which
    never holds all logits."""

    def __init__(self, model: DeepSeekV3, blocks: Sequence[str], first: bool, last: bool, shared: Pass):
        super().__init__()
        by_name = {block.name: block for block in model.blocks()}
        self.blocks = nn.ModuleList(by_name[name] for name in blocks)
        self.embed_tokens = model.embed_tokens if first else None
        self.norm = model.norm if last else None
        self.lm_head = model.lm_head if last else None
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """int [1, T] or [1, T, D] -> [1, T, D]."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for block in self.blocks:
            x, _ = block(x, self.shared)
        return x if self.norm is None else self.norm(x)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of one micro-batch."""
        assert self.lm_head is not None
        loss: Tensor = linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, target.flatten(), float(target.numel())
        )
        return loss


class TorchPipeline:
    """One of torch's schedules over our stages."""

    def __init__(self, model: DeepSeekV3, layout: Layout, group: Group, held: Sequence[int], rows: Tensor, words: str):
        self.model, self.group, self.rows = model, group, rows
        shared = Pass(rotations(model.config, default_positions(rows[:1, :-1])))
        modules = {
            each: StageModule(model, layout.stages[each], each == 0, each == layout.last, shared) for each in held
        }
        self.first, self.last = 0 in modules, layout.last in modules
        loss = modules[layout.last].loss if self.last else absent_loss
        stages = [
            pipelining.PipelineStage(module, each, len(layout.stages), rows.device, group=group.handle)
            for each, module in modules.items()
        ]
        self.schedule: Any = (
            pipelining.ScheduleDualPipeV(list(stages), len(rows), loss_fn=loss)
            if words == "DualPipeV"
            else pipelining.Schedule1F1B(stages[0], len(rows), loss_fn=loss)
        )

    def step(self) -> Tensor:
        """Gradients of the batch from none; its mean loss, FP32, on every rank."""
        self.model.zero_grad()
        losses: list[Tensor] = []
        inputs = (self.rows[:, :-1],) if self.first else ()
        if self.last:
            self.schedule.step(*inputs, target=self.rows[:, 1:], losses=losses)
        else:
            self.schedule.step(*inputs)
        mean = torch.stack(losses).mean() if losses else torch.zeros((), device=self.rows.device)
        return self.group.sum_(mean.detach())


def absent_loss(hidden: Tensor, target: Tensor) -> Tensor:
    """For ranks without the last stage; never called."""
    raise AssertionError("the loss is the last stage's")
