"""ZeRO-1 (Rajbhandari et al. 2020): every data-parallel rank updates its share of each parameter, and sends it to the others.

A share is some rows of the parameter: of a matrix, of a stack of experts laid out as one, or elements of a gain. Gradients are
reduce-scattered in FP32, optimizer state exists for the share alone, and updated shares are all-gathered. Where passes compute
in BF16, the whole matrix exists in BF16 only ("narrow"), and its FP32 master copy is sharded; of what passes read in FP32
(gains, routers) the share is a view. Experts are sharded over the ranks that hold the same ones, everything else over all
data-parallel ranks. What two ranks of a pipeline hold (DualPipe's stages, and the embedding where MTP reads it elsewhere), both
update by the sum of their gradients, a sum of two numbers, which is the same on both.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.group import Group
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline.parts import Holders, part_of
from dsv3.weights.parts import Place

BUCKET = 2**26
"""Most elements sent at once: the copies made for it take four bytes each."""


class Shares:
    """This rank's share of every parameter of a model; of a rank alone, the parameters themselves."""

    def __init__(
        self, model: DeepSeekV3, mesh: Mesh, whole: Collection[nn.Parameter] = (), holders: Holders | None = None
    ):
        """The model's matrices are in FP32, and cast here if its compute dtype is BF16.

        Parameters among `whole` are updated by every rank, for update rules that need the whole matrix.
        """
        self.holders = holders or {}
        self.parameters = dict(model.named_parameters())
        self.held, self.experts = model.held_experts(), model.config.n_routed_experts
        self.whole = set(whole)
        self.mesh = mesh
        matrices, dtype = model.matrices(), model.compute_dtype or torch.float32
        self.narrow = {
            name
            for name, parameter in self.parameters.items()
            if parameter in matrices and self.divided(parameter) and parameter.dtype != dtype
        }
        """The names of what is whole in `dtype` alone."""
        self.dtype = dtype
        self.own = {name: self.share(name) for name in self.parameters}
        """By the parameter's name: [rows of this rank, columns], or [elements]; none has gradients but by `reduce`."""

    def group(self, parameter: nn.Parameter) -> Group:
        """The ranks that have the same parameter."""
        return self.mesh.expert_data if parameter in self.held else self.mesh.data

    def ranks(self, name: str) -> tuple[int, ...]:
        """The ranks of the pipeline that hold a parameter or buffer of this rank; the first counts and writes it."""
        return self.holders.get(part_of(name), (self.mesh.pipeline.rank,))

    def speaks(self, name: str) -> bool:
        """Whether this rank is the first of `ranks`."""
        return self.ranks(name)[0] == self.mesh.pipeline.rank

    def divided(self, parameter: nn.Parameter) -> bool:
        """Whether each rank of its group has a share of its own."""
        return parameter not in self.whole and self.group(parameter).size > 1

    def share(self, name: str) -> nn.Parameter:
        """A view of this rank's rows; or a copy, their master, of a parameter that becomes narrow here."""
        parameter = self.parameters[name]
        if not self.divided(parameter):
            return parameter
        rows = self.rows(name, parameter.detach())
        if name not in self.narrow:
            return nn.Parameter(rows)
        master = nn.Parameter(rows.clone())
        parameter.data, parameter.grad_dtype = parameter.data.to(self.dtype), rows.dtype
        return master

    def rows(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a whole parameter."""
        group = self.group(self.parameters[name])
        each = share_of(whole, group.size)
        return as_rows(whole)[group.rank * each :][:each]

    def masters(self, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the model with this rank's FP32 rows in place of narrow parameters: what a checkpoint holds."""
        return {name: self.own[name].detach() if name in self.narrow else each for name, each in model.items()}

    @torch.no_grad()
    def put(self, name: str, whole: Tensor) -> None:
        """Overwrites a narrow parameter and its master with these values (FP32)."""
        self.own[name].copy_(self.rows(name, whole))
        self.parameters[name].copy_(whole)

    def whole_place(self, name: str, tensor: Tensor) -> Place:
        """Where a parameter or buffer of this rank lies in the whole one, and whether this rank writes it into a checkpoint."""
        parameter = self.parameters.get(name)
        held = None if parameter is None else self.held.get(parameter)
        if parameter is None or held is None:
            return Place(tuple(tensor.shape), 0, self.mesh.data.rank == 0 and self.speaks(name))
        written = self.mesh.expert_data.rank == 0 and self.speaks(name)
        return Place((self.experts, *tensor.shape[1:]), held.start * tensor.shape[1], written)

    def place(self, name: str) -> Place:
        """The same for this rank's share."""
        parameter = self.parameters[name]
        place, group = self.whole_place(name, parameter), self.group(parameter)
        if not self.divided(parameter):
            return place
        return place._replace(
            first=place.first + group.rank * share_of(parameter, group.size), written=self.speaks(name)
        )

    def reduce(self) -> None:
        """Sums the parameters' gradients over the ranks into the shares' gradients, and frees them."""
        for group, names in self.buckets(name for name, each in self.parameters.items() if each.grad is not None):
            gradients = [as_rows(self.parameters[name].grad) for name in names]
            mine = group.scatter_sum(torch.cat([divide(each, group.size) for each in gradients], dim=1))
            for name, part in zip(names, mine.split(self.widths(names, group)), strict=True):
                share = self.own[name]
                share.grad = part[: share.numel()].view_as(share)
                self.parameters[name].grad = None
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                self.group(parameter).sum_(parameter.grad)
        for name, share in self.own.items():
            for peer in self.ranks(name):
                if peer != self.mesh.pipeline.rank and share.grad is not None and share.numel():
                    share.grad.add_(self.mesh.pipeline.swap(share.grad, peer))

    def gather(self) -> None:
        """Sends every updated share to all ranks, and frees its gradient."""
        updated = {name for name, share in self.own.items() if share.grad is not None}
        self.spread(updated - self.narrow)
        self.spread(updated & self.narrow)
        for name, parameter in self.parameters.items():
            if self.divided(parameter):
                self.own[name].grad = None

    @torch.no_grad()
    def spread(self, names: Iterable[str]) -> None:
        """Sends these shares to all ranks, in their parameters' dtype, which must be the same for all of them."""
        for group, bucket in self.buckets(names):
            padded = []
            for name, width in zip(bucket, self.widths(bucket, group), strict=True):
                flat = self.own[name].detach().flatten().to(self.parameters[name].dtype)
                padded.append(nn.functional.pad(flat, (0, width - len(flat))))
            everyone = group.gather(torch.cat(padded))
            for name, parts in zip(bucket, everyone.split(self.widths(bucket, group), dim=1), strict=True):
                parameter = self.parameters[name]
                parameter.copy_(parts.flatten()[: parameter.numel()].view_as(parameter))

    def spread_masters(self) -> None:
        """Sends what was written into masters to all ranks; every rank calls it."""
        self.spread(self.narrow)

    def widths(self, names: Sequence[str], group: Group) -> list[int]:
        """Elements of one rank's share of each, padding included."""
        return [share_of(self.parameters[name], group.size) * columns(self.parameters[name]) for name in names]

    def buckets(self, names: Iterable[str]) -> Iterator[tuple[Group, list[str]]]:
        """The divided ones of these parameters, by group, at most `BUCKET` elements at a time."""
        wanted = set(names)
        for group in (self.mesh.data, self.mesh.expert_data):
            bucket, size = list[str](), 0
            for name, parameter in self.parameters.items():
                if name not in wanted or self.group(parameter) is not group or not self.divided(parameter):
                    continue
                if bucket and size + parameter.numel() > BUCKET:
                    yield group, bucket
                    bucket, size = [], 0
                bucket.append(name)
                size += parameter.numel()
            if bucket:
                yield group, bucket

    def norms(self, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Norms over all ranks from those of this rank's shares, by name; every element counts once."""
        if self.mesh.data.size == self.mesh.pipeline.size == 1:
            return norms
        squares = torch.stack(list(norms.values())).square()
        for group in (self.mesh.data, self.mesh.pipeline):
            group.sum_(squares)
        return dict(zip(norms, squares.sqrt(), strict=True))

    def counts(self, name: str) -> bool:
        """Whether this rank's gradient counts in the norm: where several ranks have the same, that of one."""
        parameter = self.parameters[name]
        return self.speaks(name) and (self.divided(parameter) or self.group(parameter).rank == 0)


def as_rows(tensor: Tensor | None) -> Tensor:
    """[..., columns] as a matrix; a vector as it is."""
    assert tensor is not None
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor


def columns(tensor: Tensor) -> int:
    """Elements of a row."""
    return tensor.shape[-1] if tensor.dim() > 1 else 1


def share_of(tensor: Tensor, ranks: int) -> int:
    """Rows of every rank but the last ones, which may have fewer or none."""
    return -(-(tensor.numel() // columns(tensor)) // ranks)


def divide(rows: Tensor, ranks: int) -> Tensor:
    """[rows, columns] -> [ranks, n], padded with zeros."""
    flat = rows.flatten()
    width = share_of(rows, ranks) * columns(rows)
    return nn.functional.pad(flat, (0, ranks * width - len(flat))).view(ranks, width)
