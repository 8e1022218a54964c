"""AdamW as the report sets it, and Muon (Jordan et al. 2024) for the matrices of the blocks where a recipe asks for it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline.parts import Holders
from dsv3.parallel.zero import Shares
from dsv3.recipe.schema import OptimizerSection
from dsv3.training.adamw import AdamWInBF16, first_state
from dsv3.weights.parts import Place

NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip
"""Coefficients of the five iterations that bring singular values to about 1 (You Jiacheng's schedule, as published for the
modded-nanogpt speed run)."""

MODULE_GROUPS = {
    "embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp.gate.": "router",
    "mlp.experts.": "experts", "mlp.shared_experts.": "shared", "mlp.": "dense",
}  # fmt: skip
"""By a part of the parameter's name, the first that fits; gains of norms and MTP modules are groups of their own."""


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix of each [out, in] matrix of a batch, to within the iteration's tolerance.

    `[N, out, in] -> [N, out, in]` in `dtype`; five Newton-Schulz steps.
    """
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(x, x.mT.contiguous())
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made semi-orthogonal, then scaled to the size of an AdamW update.

    A parameter is a matrix [out, in] or a stack of them [N, out, in]; matrices of equal shape are handled in one batch.
    The scale `0.2 sqrt(max(out, in))` gives the root mean square of AdamW's updates, so that both take like learning
    rates (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """See `AdamWInBF16.step`."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2], parameter.shape[-1]].append(parameter)
            for shape, parameters in by_shape.items():
                self.update(parameters, shape, group)

    def update(self, parameters: list[nn.Parameter], shape: tuple[int, int], group: dict[str, Any]) -> None:
        """One update of all parameters whose matrices have one shape."""
        directions = []
        keep = parameters[0].new_ones(()) if self.found_inf is None else 1 - self.found_inf
        for parameter in parameters:
            assert parameter.grad is not None
            if self.grad_scale is not None:
                parameter.grad.div_(self.grad_scale)
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, keep * (1 - group["momentum"]))
            directions.append(parameter.grad.lerp(momentum, group["momentum"]).view(-1, *shape))
        steps = orthogonalise(torch.cat(directions), self.dtype).split([len(each) for each in directions])
        size = 0.2 * max(shape) ** 0.5
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - keep * (group["lr"] * group["weight_decay"]))
            parameter.addcmul_(step.to(parameter.dtype).view_as(parameter), keep, value=-group["lr"] * size)


class Optimizer:
    """The optimizers of one model, stepped together; `learning_rate` is set before each step.

    The recipe says whether norm gains (one-dimensional parameters) and the embedding have weight decay; all else has.
    Muon, where the recipe chooses it, takes the matrices of all blocks and of `eh_proj`; embedding, head, routers and gains stay
    with AdamW. With several data-parallel ranks each keeps AdamW's state of its share alone (`parallel.zero`), and Muon's whole.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        section: OptimizerSection,
        muon_dtype: torch.dtype = torch.float32,
        mesh: Mesh | None = None,
        holders: Holders | None = None,
    ):
        self.section, self.mesh = section, mesh or Mesh()
        hidden = {
            each for name, each in model.named_parameters() if section.kind == "muon" and is_hidden_matrix(each, name)
        }
        self.keep_gradients = False
        """Whether gradients are cleared in place, by zeros."""
        self.shortening: Tensor | None = None
        """What the next step divides gradients by, to clip them: at least 1."""
        self.shares = Shares(model, self.mesh, hidden, holders)
        self.names = {share: name for name, share in self.shares.own.items() if share.numel()}
        own = [module_group(name, share.dim()) for name, share in self.shares.own.items()]
        self.groups = list(dict.fromkeys(group for each in self.mesh.pipeline.objects(own) for group in each))
        """The module groups of the parameters of all stages."""
        muon = [share for share in self.names if share in hidden]
        rest = [share for share in self.names if share not in hidden]
        groups = [
            dict(params=[p for p in rest if self.decays(p)], weight_decay=section.weight_decay),
            dict(params=[p for p in rest if not self.decays(p)], weight_decay=0.0),
        ]
        adamw: torch.optim.Optimizer
        if section.moments == "bf16":
            adamw = AdamWInBF16(groups, section.betas, section.eps)
        else:
            adamw = torch.optim.AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps, fused=True)
            # Torch makes this in the first step. Made here, a checkpoint holds the same tensors whenever it is written, also for
            # parameters that have had no gradient yet (MTP modules whose weight is 0).
            for parameter in rest:
                adamw.state[parameter] = first_state(parameter, parameter.dtype)
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [(adamw, 1.0)]
        if muon:
            part = Muon(muon, 0.0, section.muon_momentum, section.weight_decay, muon_dtype)
            self.parts.append((part, section.muon_scale))

    def decays(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter has weight decay."""
        if self.names[parameter] == "embed_tokens.weight":
            return self.section.decay_embedding
        return parameter.dim() > 1 or self.section.decay_norms

    def clip(self) -> dict[str, Tensor]:
        """Sums the gradient over the ranks, and has the next `step` clip it to the recipe's global norm. Returns its norms (FP32
        scalars): of each group of modules that has a gradient, in a pipeline of every group, and of all together as "all".
        """
        self.shares.reduce()
        gradients: dict[str, list[Tensor]] = defaultdict(list)
        zero = torch.zeros((), device=next(iter(self.shares.own.values())).device)
        for group in self.groups if self.mesh.pipeline.size > 1 else []:
            gradients[group].append(zero)
        for name, share in self.shares.own.items():
            if share.grad is not None:
                counted = share.numel() and self.shares.counts(name)
                gradients[module_group(name, share.dim())].append(share.grad if counted else zero)
        norms = self.shares.norms({group: nn.utils.get_total_norm(each) for group, each in gradients.items()})
        norms["all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        self.shortening = (norms["all"] / self.section.clip_norm).clamp(min=1.0)
        return norms

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """Updates the parameters from their gradients, and clears the gradients.

        Where `skip`, a bool scalar on the device, is True, weights and moments stay the same to the bit; the host does not wait.
        """
        for part, scale in self.parts:
            # GradScaler's protocol: gradients are divided by the first, and nothing is updated where the second is 1.
            part.grad_scale = self.shortening  # type: ignore[attr-defined]
            part.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            for group in part.param_groups:
                group["lr"] = learning_rate * scale
            part.step()
        self.shortening = None
        # Torch's fused AdamW does not do this; FP8 copies of weights are made again when the version has changed.
        torch.autograd.graph.increment_version(self.names)
        self.shares.gather()
        for part, _ in self.parts:
            part.zero_grad(set_to_none=not self.keep_gradients)

    def places(self) -> dict[str, Place]:
        """Where each of `tensors` lies in the whole one."""
        return {
            name: self.shares.place(name.rpartition(".")[0])
            if tensor.dim()
            else Place((), 0, self.mesh.data.rank == 0 and self.shares.speaks(name))
            for name, tensor in self.tensors().items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All state, by parameter name and the optimizer's own word: `layers.0....exp_avg`; a checkpoint is read into it."""
        return {
            f"{self.names[parameter]}.{word}": value  # type: ignore[index]  # an optimizer's state is keyed by parameters
            for part, _ in self.parts
            for parameter, words in part.state.items()
            for word, value in words.items()
        }


def module_group(name: str, dimensions: int) -> str:
    """The group of modules that a parameter's gradient norm is reported under."""
    if name.startswith("mtp."):
        return "mtp"
    if dimensions == 1:
        return "norms"
    return next(group for part, group in MODULE_GROUPS.items() if part in name)


def is_hidden_matrix(parameter: Tensor, name: str) -> bool:
    """Whether Muon may take it: a matrix between hidden states, where all directions are alike in kind."""
    return parameter.dim() > 1 and not name.startswith(("embed_tokens", "lm_head")) and not name.endswith("gate.weight")
