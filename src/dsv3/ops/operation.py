"""An operation: one function for its callers, several implementations behind it, the first that supports the call serves.

`DSV3_OPS="attention=reference,grouped_linear=loop"` in the environment forces implementations by name.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import UserError, nearest
from dsv3.ops.kernels.available import no_triton


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `supports` takes the call's arguments: None when it serves, else the reason why not."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]


class Operation:
    """Calls the first implementation, in order of preference, that supports the arguments; the last is the reference twin.

    Raises `UserError` when none supports them, or when the one forced through `DSV3_OPS` does not.
    """

    def __init__(self, name: str, implementations: Sequence[Implementation]):
        self.name = name
        self.implementations = tuple(implementations)
        forced = forced_implementations().get(name)
        legal = [each.name for each in self.implementations]
        if forced is not None and forced not in legal:
            raise UserError(f"DSV3_OPS: {name} has no implementation {forced!r}: {nearest(forced, legal)}")
        self.candidates = tuple(each for each in self.implementations if forced in (None, each.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for each in self.candidates:
            if each.supports(*args, **kwargs) is None:
                return each.run(*args, **kwargs)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.explain(*args, **kwargs))
        raise UserError(f"{self.name}: no implementation serves these arguments. {reasons}")

    def explain(self, *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
        """Each implementation's name with None (it would serve) or the reason why it does not."""
        return [(each.name, each.supports(*args, **kwargs)) for each in self.candidates]


def forced_implementations() -> dict[str, str]:
    """The pairs of `DSV3_OPS`."""
    pairs = [pair for pair in os.environ.get("DSV3_OPS", "").split(",") if pair]
    for pair in pairs:
        if pair.count("=") != 1:
            raise UserError(f"DSV3_OPS holds {pair!r}: expected operation=implementation, separated by commas")
    return dict(pair.split("=") for pair in pairs)


def kernel(file: str, function: str) -> Callable[..., Any]:
    """A function of `ops/kernels/`, whose file is imported when it is called: Triton is not everywhere."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"dsv3.ops.kernels.{file}"), function)(*args, **kwargs)

    return run


def anything(*args: Any, **kwargs: Any) -> None:
    """The `supports` of a reference twin."""


def on_gpu(*args: Any) -> str | None:
    """The `supports` of kernels that take the call's tensors as they come."""
    return no_triton(*(each for each in args if isinstance(each, Tensor)))


def in_training(*args: Any, **kwargs: Any) -> str | None:
    """The `supports` of what saves work for the backward pass; its own bookkeeping costs as much as a few rows do."""
    return None if torch.is_grad_enabled() else "pays in training only"
