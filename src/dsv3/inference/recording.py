"""A repeated pass on the CPU, recorded once and replayed: what a CUDA graph is on a GPU.

When a small model decodes, most of the time goes into the Python between the operations and into views. A recording is
made by running the model itself, so that nothing is defined twice: it is the list of operations that were run, with the
tensors that they read and wrote. Replaying it runs them again on the same memory, except views and what depends on
weights alone. The pass in Python is the reference twin.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3.errors import RunError
from dsv3.model.feed_forward import LocalDispatcher, every_expert
from dsv3.model.transformer import DeepSeekV3

MOST_PARAMETERS = 2**24
"""Larger models spend most of the time in matrix products, and a recording would hold copies of their weights."""
Function = Callable[..., tuple[Tensor, ...]]


def pays(model: DeepSeekV3, rows: int) -> bool:
    """Whether to record passes of so many rows.

    What Python decides from tensors' values cannot be recorded: which experts have rows, unless all get all tokens.
    """
    config = model.config
    if not every_expert(rows, config.hidden_size, config.n_routed_experts, config.num_experts_per_tok):
        return False
    if not all(block.moe is None or type(block.moe.dispatcher) is LocalDispatcher for block in model.blocks()):
        return False
    return sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS


Layouts = dict[Any, tuple[Tensor, Tensor]]
"""Weights, each with its copy from `row_by_row`, which all recordings share; the key identifies the weight's memory."""


class Recording:
    """`recording(*inputs)` is `function(*inputs)` for inputs of these shapes."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], layouts: Layouts):
        self.inputs = [each.clone() for each in inputs]
        with Recorder() as recorder:
            self.outputs = function(*self.inputs)
        self.program = program(recorder.calls, self.inputs, layouts)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's result, which the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        for function, args, kwargs in self.program:
            function(*args, **kwargs)
        return self.outputs


@dataclass(frozen=True)
class Call:
    """A call of a torch function. Its tensors are kept alive, so that no memory is used twice."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    in_place: bool
    read: set[int]
    """The memory of its arguments."""
    written: set[int]
    """The memory that it wrote to; none if it made a view, or no tensor."""

    @property
    def name(self) -> str:
        """The function's."""
        return self.function.__name__


class Recorder(TorchFunctionMode):
    """Lists the calls made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, result = function.__name__, function(*args, **kwargs)
        if name == "__get__" and not isinstance(result, Tensor):  # a shape, a dtype
            return result
        # Names of functions that write to their first argument and return it end with an underscore.
        in_place = name == "__setitem__" or "out" in kwargs or (name.endswith("_") and result is args[0])
        read = memory((*args, *kwargs.values()))
        written = memory((args[0], kwargs.get("out"))) if in_place else memory((result,)) - read
        self.calls.append(Call(function, args, kwargs, result, in_place, read, written))
        return result


READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
"""How Python reads tensors' values."""
Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def program(calls: list[Call], inputs: list[Tensor], layouts: Layouts) -> list[Step]:
    """The calls to repeat when the inputs have changed, each writing its result where it was.

    Memory changes if it is an input, is written to in place, or is computed from what changes. Raises `RunError` if
    Python read such memory: what it decided then might be wrong in the next pass.
    """
    changing = memory(inputs).union(*(call.written for call in calls if call.in_place))
    steps = []
    for call in calls:
        if call.name in READS and not changing.isdisjoint(call.read):
            raise RunError(
                f"this pass cannot be recorded: {call.name} reads a tensor that is another in the next pass; "
                "`pays` in inference/recording.py should have said no"
            )
        if call.written and not changing.isdisjoint(call.read | call.written):
            changing |= call.written
            steps.append(step(call, changing, layouts))
    return steps


def step(call: Call, changing: set[int], layouts: Layouts) -> Step:
    """A call as it is replayed."""
    if call.in_place:
        return call.function, call.args, call.kwargs
    function, args, kwargs = leaner(call, changing, layouts)
    try:
        function(*args, **kwargs)
    except TypeError:
        return copied, (call.function, call.args, call.kwargs, call.result), {}
    return function, args, kwargs


def leaner(call: Call, changing: set[int], layouts: Layouts) -> Step:
    """An equivalent call that takes `out`, which methods do not, and avoids temporaries."""
    function, args, result = call.function, call.args, call.result
    constant = len(args) > 1 and isinstance(args[1], Tensor) and memory(args[1:2]).isdisjoint(changing)
    if call.name == "linear" and args[0].is_contiguous():
        weight_IO = row_by_row(args[1].mT, layouts) if constant else args[1].mT
        rows, columns = args[0].view(-1, len(weight_IO)), result.view(-1, weight_IO.shape[1])
        return torch.mm, (rows, weight_IO), {"out": columns}
    if call.name == "bmm" and constant:
        args = args[0], row_by_row(args[1], layouts)
    elif call.name == "embedding":
        return torch.index_select, (args[1], 0, args[0].flatten()), {"out": result.view(-1, args[1].shape[1])}
    elif call.name == "silu":
        return torch.ops.aten.silu.out, args, {"out": result}
    elif call.name == "flatten":  # where it is no view
        return torch.Tensor.copy_, (result.view(args[0].shape), args[0]), {}
    namesake = getattr(torch, call.name, None)
    if isinstance(function, MethodDescriptorType) and isinstance(namesake, BuiltinFunctionType):
        function = namesake
    return function, args, {**call.kwargs, "out": result}


def copied(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Calls a function that takes no `out`."""
    result.copy_(function(*args, **kwargs))


def row_by_row(weight: Tensor, layouts: Layouts) -> Tensor:
    """A weight [..., in, out] copied to be contiguous in its outputs: the product with a few rows takes two thirds of the time."""
    key = weight.data_ptr(), weight.shape, weight.stride()
    if key not in layouts:
        layouts[key] = weight, weight.contiguous()
    return layouts[key][1]


def memory(values: Iterable[Any]) -> set[int]:
    """The storage addresses of the tensors among the values, and in lists among them."""
    found = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, (list, tuple)):
            found |= memory(value)
    return found
