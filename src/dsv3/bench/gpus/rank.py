"""One rank of a measurement: its place, its device, and a clock that all ranks read at the same moment."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dsv3.bench.measure import Progress, Work, synchronize, take_turns
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import Dispatcher
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.mesh import Mesh, make_mesh
from dsv3.parallel.pipeline.parts import hold
from dsv3.recipe.parallel import ParallelSection

STD = 0.02


@dataclass(frozen=True)
class Rank:
    """`number` of `size`."""

    number: int
    size: int
    device: torch.device
    rounds: int
    progress: Progress = lambda **_: None

    def mesh(self, data: int = 1, expert: int = 1, pipeline: int = 1) -> Mesh:
        """All ranks, on one node, as `[parallel]` would have them."""
        return make_mesh(ParallelSection(data=data, expert=expert, pipeline=pipeline), self.size)

    def clock(self) -> float:
        """Seconds, when every rank's device has done all that it was given."""
        synchronize(self.device)
        dist.all_reduce(torch.zeros(1, device=self.device))
        synchronize(self.device)
        return time.perf_counter()

    def turns(self, sides: Mapping[str, Work], stage: str) -> dict[str, list[float]]:
        """See `take_turns`: all ranks begin together, and the time is the slowest one's."""
        return take_turns(sides, self.rounds, self.progress, stage, self.clock)

    def network(
        self, config: ModelConfig, weights: torch.dtype = torch.float32, dispatcher: Dispatcher | None = None,
        parts: set[str] | None = None,
    ) -> DeepSeekV3:  # fmt: skip
        """A model that computes in BF16 (FP32 on the CPU), or parts of it. A weight's values follow from its name alone."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with torch.device("meta"):
            model = DeepSeekV3(config, dtype, dispatcher).to(weights if self.device.type == "cuda" else dtype)
        model = (model if parts is None else hold(model, parts)).to_empty(device=self.device)
        generator, held = torch.Generator(self.device), model.held_experts()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            here = held.get(parameter, range(len(parameter)))
            whole = config.n_routed_experts if parameter in held else len(parameter)
            generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
            values = parameter.new_empty(whole, *parameter.shape[1:]).normal_(0.0, STD, generator=generator)
            parameter.data.copy_(values[here.start : here.stop])
        for block in model.blocks():
            if block.moe is not None:
                block.moe.gate.e_score_correction_bias.zero_()
        return model
