"""One MoE layer on ranks: what each computes, against all of it in one process."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3.errors import RunError
from dsv3.model.config import ModelConfig
from dsv3.model.feed_forward import DeepSeekMoE, LocalDispatcher, Routing
from dsv3.parallel.copies import Window
from dsv3.parallel.dispatch import ExpertParallel
from dsv3.parallel.mesh import make_mesh

CONFIG = ModelConfig.preset(
    "debug", hidden_size=160, moe_intermediate_size=48, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
    n_shared_experts=0,
)  # fmt: skip
TOKENS = 24


def layer(dispatcher, dtype):
    """The layer with the same weights wherever it is, its experts those of the dispatcher."""
    moe = DeepSeekMoE(CONFIG, dispatcher)
    generator, held = torch.Generator().manual_seed(1), moe.experts.held
    with torch.no_grad():
        moe.gate.weight.normal_(generator=generator)
        for weight in moe.experts.parameters():
            whole = torch.empty(CONFIG.n_routed_experts, *weight.shape[1:]).normal_(0, 0.1, generator=generator)
            weight.copy_(whole[held.start : held.stop])
    return moe.to(dtype)


def through(moe, x, routing):
    rows, weight, counts, handle = moe.dispatcher.dispatch(x, routing)
    return moe.dispatcher.combine(moe.experts(rows, counts, weight), handle)


def tokens_of(rank, tokens):
    generator = torch.Generator().manual_seed(100 + rank)
    return (torch.randn(tokens, CONFIG.hidden_size, generator=generator) for _ in range(2))


def choices(kind, x, moe):
    """The router's, or what no router would do."""
    if kind == "router":
        return moe.gate(x, 1, 0.0)
    expert = torch.arange(CONFIG.num_experts_per_tok).expand(
        len(x), -1
    )  # the first ranks get all, the last ones nothing
    weight = torch.rand(len(x), CONFIG.num_experts_per_tok, generator=torch.Generator().manual_seed(7))
    return Routing(expert.contiguous(), weight.requires_grad_(), CONFIG.n_routed_experts, None, None)


def check(section, ranks_per_node, kind="router", empty=None, dtype=torch.float32, fp8=False):
    """(deviation of outputs and of every gradient from the serial run's, wire bytes by group, routing of this rank)."""
    mesh = make_mesh(section, ranks_per_node)
    rank, ranks = mesh.expert.rank, mesh.expert.size
    dispatcher = ExpertParallel(mesh, fp8)
    results = []
    for moe, mine in ((layer(dispatcher, dtype), [rank]), (layer(LocalDispatcher(), dtype), range(ranks))):
        outputs, inputs, weights, expert = [], [], [], None
        for each in mine:
            x, grad = tokens_of(each, 0 if each == empty else TOKENS)
            x = x.to(dtype).requires_grad_()
            routing = choices(kind, x, moe)
            if kind != "router":
                weights.append(routing.weight)
            y = through(moe, x, routing)
            forward_bytes = {name: getattr(mesh, name).traffic["sent"] for name in ("rail", "node")}
            (y * grad).sum().backward()
            if each == rank:
                outputs, inputs, expert = y.detach(), x.grad, routing.expert
                chosen = [weights[-1].grad] if weights else []
        gate = [] if moe.gate.weight.grad is None else [mesh_sum(mesh, moe, mine)]
        held = dispatcher.held(CONFIG.n_routed_experts)
        slices = slice(0, len(held)) if moe.dispatcher is dispatcher else slice(held.start, held.stop)
        gradients = [each.grad[slices] for each in moe.experts.parameters()]
        if moe.dispatcher is dispatcher:
            traffic = forward_bytes
        results.append([outputs, inputs, *chosen, *gate, *gradients])
    return [deviation(a, b) for a, b in zip(*results, strict=True)], traffic, expert


def mesh_sum(mesh, moe, mine):
    """The router's gradient from all tokens."""
    grad = moe.gate.weight.grad.float()
    return mesh.expert.sum_(grad) if len(mine) == 1 else grad


def deviation(a, b):
    """Relative, of the largest element."""
    if not b.numel():
        return float(a.shape != b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


KINDS = ("router", "first", "one rank sends little", "all to one")


def routed(kind, rank, x, moe):
    """What a rank's router says, or what none would."""
    if kind == "router":
        routing = moe.gate(x, 1, 0.0)
        return Routing(routing.expert, routing.weight.detach().requires_grad_(), CONFIG.n_routed_experts, None, None)
    routing = choices("first", x, moe)
    expert = routing.expert
    if kind == "one rank sends little" and rank == 1:
        expert = torch.cat([expert[:1], torch.full_like(expert[1:], -1)])
    if kind == "all to one":
        expert = torch.full_like(expert, -1)
        expert[:, 2] = 5
    return Routing(expert, routing.weight, CONFIG.n_routed_experts, None, None)


def forms(section, ranks_per_node, settings):
    """`form` with each of these settings, on one mesh."""
    mesh = make_mesh(section, ranks_per_node)
    return [form(mesh, *each) for each in settings]


def form(mesh, kind, dtype, fp8, alignment):
    """(everything that one pass makes with exact and with bounded legs, wire bytes of both, its shapes): of this rank."""
    made, sent, shapes = [], [], []
    for bounded in (False, True):
        dispatcher = ExpertParallel(mesh, fp8, bounded)
        before = {name: getattr(mesh, name).traffic["sent"] for name in ("rail", "node")}
        moe = layer(dispatcher, dtype)
        x, grad = (each.to(dtype) for each in tokens_of(mesh.data.rank, TOKENS))
        x.requires_grad_()
        routing = routed(kind, mesh.expert.rank, x.detach(), moe)
        found = dispatcher.dispatch(x, routing, alignment)
        y = dispatcher.combine(moe.experts(found.rows, found.counts, found.weight), found.handle)
        sent.append({name: getattr(mesh, name).traffic["sent"] - before[name] for name in before})
        (y * grad).sum().backward()
        made.append(
            [y.detach(), x.grad, routing.weight.grad, found.counts, *(each.grad for each in moe.experts.parameters())]
        )
        shapes.append((len(found.rows), int(found.counts.sum())))
    return made, sent, shapes


def without_looking(section, ranks_per_node):
    """Dispatch and combine, forward and backward, with bounded legs, where nothing that would wait for a GPU is allowed: how far
    the results are off, in FP32 and with FP8 on the way."""
    mesh = make_mesh(section, ranks_per_node)
    return [blindly(mesh, fp8) for fp8 in (False, True)]


def blindly(mesh, fp8):
    """One of them."""
    dispatcher = ExpertParallel(mesh, fp8, bounded=True)
    x, grad = tokens_of(mesh.data.rank, TOKENS)
    x.requires_grad_()
    routing = routed("router", mesh.expert.rank, x.detach(), layer(dispatcher, torch.float32))
    with Blind():
        found = dispatcher.dispatch(x, routing, 16)
        y = dispatcher.combine(found.rows * found.weight.unsqueeze(1), found.handle)
        y.backward(grad)
    expected = x.detach() * routing.weight.detach().sum(1, keepdim=True)
    return deviation(y.detach(), expected)


class Blind(TorchDispatchMode):
    """Refuses what reads values on the host."""

    names = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero")
    operations = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __enter__(self):
        def refuse(*_, **__):
            raise AssertionError("a value is read on the host")

        self.kept = {name: getattr(torch.Tensor, name) for name in self.names}
        for name in self.names:
            setattr(torch.Tensor, name, refuse)
        return super().__enter__()

    def __exit__(self, *error):
        for name, each in self.kept.items():
            setattr(torch.Tensor, name, each)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        assert name not in self.operations, f"{name} waits for the device"
        indices = arguments[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        assert not any(each is not None and each.dtype == torch.bool for each in indices), "a mask as an index waits"
        return operation(*arguments, **(options or {}))


class Files:
    """Windows of ranks on the CPU: files that all of them map."""

    def __init__(self, directory):
        self.directory, self.opened = directory, 0

    def __call__(self, group, size, device):
        self.opened += 1
        meet = partial(torch.distributed.barrier, group=group.handle)
        names = [f"{self.directory}/{group.name} {group.ranks} {self.opened} {rank}" for rank in range(group.size)]
        own = torch.from_file(names[group.rank], shared=True, size=size, dtype=torch.uint8)
        meet()
        everyone = [
            own if rank == group.rank else torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            for rank, name in enumerate(names)
        ]
        return Window(everyone, meet)


def by_copies(section, ranks_per_node, directory, fp8):
    """(what bounded legs make through NCCL's place and through windows, bytes sent by both): two passes, the second smaller."""
    mesh = make_mesh(section, ranks_per_node)
    made, sent = [], []
    for copies in (None, Files(directory)):
        dispatcher, found = ExpertParallel(mesh, fp8, True, copies), []
        before = sum(group.traffic["sent"] for group in dispatcher.groups)
        moe = layer(dispatcher, torch.float32)
        for tokens in (TOKENS, TOKENS - 5):
            x, grad = tokens_of(mesh.data.rank, tokens)
            routing = routed("router", mesh.expert.rank, x, moe)
            y = through(moe, x.requires_grad_(), routing)
            (y * grad).sum().backward()
            found += [y.detach(), x.grad, routing.weight.grad]
        made.append([*found, *(each.grad for each in moe.experts.parameters())])
        sent.append(sum(group.traffic["sent"] for group in dispatcher.groups) - before)
    if copies.opened:
        with pytest.raises(RunError, match="slabs of one size"):
            dispatcher.groups[-1].exchange_all(
                [x], [1] * (dispatcher.groups[-1].size - 1) + [2], [1] * dispatcher.groups[-1].size
            )
    return made, sent, copies.opened
