"""Runs a Gluon kernel on the CPU: its Python as it stands, with tensors of torch in place of shared memory, a thread for each group
of warps, and barriers that count arrivals and bytes. It shows what is fetched, awaited, multiplied and written where; that a kernel
gets stuck is an error. Layouts, registers and what the compiler makes of it are not seen: a GPU alone shows these.
"""

import threading
from types import FunctionType, SimpleNamespace

import torch

PATIENCE = 20
"""Seconds until a barrier that does not complete is an error."""


class Number(int):
    """A scalar that knows `.to`."""

    def to(self, _):
        return self


class Pointer:
    """To an element of a vector."""

    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, more):
        return Pointer(self.values, self.at + more)


class Descriptor:
    """A tensor, and the shape of the blocks that are copied. What lies outside reads as zeros and is not written."""

    def __init__(self, tensor, block):
        self.tensor, self.block, self.dtype, self.layout = tensor, block, torch.float32, None

    def inside(self, place):
        """(slices of the tensor, slices of the block)."""
        sizes = [max(min(b, size - p), 0) for p, b, size in zip(place, self.block, self.tensor.shape, strict=True)]
        return tuple(slice(p, p + n) for p, n in zip(place, sizes, strict=True)), tuple(slice(n) for n in sizes)


class Shared:
    """A tensor in shared memory."""

    def __init__(self, values):
        self.values = values

    def index(self, i):
        return Shared(self.values[i])

    def slice(self, start, length, dim=0):
        assert start + length <= self.values.shape[dim]
        return Shared(self.values.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.values.permute(order))

    def reshape(self, shape):
        return Shared(self.values.view(shape))

    def load(self, _):
        return self.values.clone()

    def store(self, values):
        self.values.copy_(values)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced are there."""

    def __init__(self):
        self.changed, self.phase, self.count, self.arrived, self.missing = threading.Condition(), 0, None, 0, 0

    def change(self, arrivals=0, bytes=0):
        with self.changed:
            self.arrived += arrivals
            self.missing += bytes
            assert self.arrived <= self.count
            if self.arrived == self.count and not self.missing:
                self.phase, self.arrived = self.phase + 1, 0
                self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase & 1 != parity, PATIENCE), "stuck at a barrier"


class Barriers(list):
    """As they are allocated."""

    index = list.__getitem__


def load_block(descriptor, place, barrier, target):
    """`tma.async_copy_global_to_shared`."""
    there, here = descriptor.inside(place)
    assert tuple(target.values.shape) == tuple(descriptor.block)
    target.values.zero_()
    target.values[here] = descriptor.tensor[there].float()
    barrier.change(bytes=-target.values.numel() * descriptor.tensor.element_size())


def store_block(descriptor, place, source):
    """`tma.async_copy_shared_to_global`."""
    there, here = descriptor.inside(place)
    descriptor.tensor[there] = source.values[here]


def add_block(descriptor, place, source):
    """The same, adding."""
    there, here = descriptor.inside(place)
    descriptor.tensor[there] += source.values[here]


def allocate(_, shape, __):
    """Full of NaN: nothing may be read before it is fetched."""
    return Shared(torch.full(shape, torch.nan))


def together(works, *_):
    """`gl.warp_specialize`: a thread each; raises what one of them raises."""
    failed = []

    def run(function, arguments):
        try:
            function(*arguments)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def run(module, kernel, programs, *arguments, **constants):
    """All programs of the kernel of that name, one after another. Descriptors and pointers are this file's."""
    gl = SimpleNamespace(
        load=lambda pointer: Number(pointer.values[pointer.at]),
        cdiv=lambda a, b: -(-a // b),
        minimum=min,
        where=torch.where,
        arange=lambda start, end, layout: torch.arange(start, end),
        split=lambda values: values.unbind(-1),
        convert_layout=lambda values, layout, assert_trivial: values,
        full=lambda shape, value, *_: torch.full(shape, float(value)),
        static_range=range,
        num_programs=lambda _: programs,
        allocate_shared_memory=lambda dtype, shape, layout: (
            Barriers(Barrier() for _ in range(shape[0])) if dtype is torch.int64 else allocate(dtype, shape, layout)
        ),
        warp_specialize=together,
        thread_barrier=lambda: None,
        SliceLayout=lambda *_: None,
        constexpr=None,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
    )
    from triton.language import constexpr

    names = dict(vars(module)) | {
        "gl": gl,
        "mbarrier": SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: setattr(barrier, "count", count),
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, bytes: barrier.change(arrivals=1, bytes=bytes),
            arrive=lambda barrier, pred=True: barrier.change(arrivals=int(pred)),
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=load_block, async_copy_shared_to_global=store_block, store_wait=lambda _: None
        ),
        "add_shared_to_global": add_block,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": lambda a, b, sums, use_acc=True, **_: a.values @ b.values + (sums if use_acc else 0),
        "warpgroup_mma_wait": lambda _, deps: deps[0],
    }
    for name, each in vars(module).items():
        if isinstance(each, constexpr):
            names[name] = each.value
        if hasattr(each, "is_gluon"):
            names[name] = FunctionType(each.fn.__code__, names)
    for program in range(programs):
        gl.program_id = lambda _, program=program: program
        names[kernel](*arguments, **constants)
