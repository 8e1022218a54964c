"""The heads of MLA's expanded form (report, equations 5 to 9): rotated queries, keys out of a part of their own and a shared one.

Both are what the projections leave, with a part of every head changed: kernels write them once, where slices, rotations and
concatenations would pass over memory several times.

Legend: B sequences, T tokens, H heads, N content elements of a head, R rotated ones, F = R / 2 pairs, V elements of a value.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything, on_gpu


def rotated(x_BTHR: Tensor, turn_BTF: Tensor) -> Tensor:
    """Turns the pairs (0, 1), (2, 3), ... by the angle of their token: the released weights' interleaved layout.

    A pair is a complex number, its rotation (complex64 [B or 1, T, F]) a product in FP32.
    """
    pairs = torch.view_as_complex(x_BTHR.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_BTF.unsqueeze(2)).flatten(-2).to(x_BTHR.dtype)


def rotate_reference(x: Tensor, turn_BTF: Tensor) -> Tensor:
    """The definition."""
    rotary = 2 * turn_BTF.shape[-1]
    content, rest = x.split([x.shape[-1] - rotary, rotary], dim=-1)
    return torch.cat((content, rotated(rest, turn_BTF)), dim=-1)


def keys_reference(kv: Tensor, key_BTR: Tensor, content: int) -> tuple[Tensor, Tensor]:
    """The definition."""
    own, values = kv.split([content, kv.shape[-1] - content], dim=-1)
    return torch.cat((own, key_BTR.unsqueeze(2).expand(-1, -1, kv.shape[2], -1)), dim=-1), values


class Rotate(torch.autograd.Function):
    """Backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn_BTF: Tensor) -> Tensor:
        """[B, T, H, N + R]."""
        from dsv3.ops.kernels.rotary import rotate

        ctx.turn = turn_BTF
        return rotate(x, turn_BTF)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[B, T, H, N + R]."""
        from dsv3.ops.kernels.rotary import rotate

        return rotate(grad, ctx.turn, backwards=True), None


class KeysAndValues(torch.autograd.Function):
    """Backward sums over heads what the shared part got from each."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, key_BTR: Tensor, content: int) -> tuple[Tensor, Tensor]:
        """(keys, values): the values are a view of what they come from."""
        from dsv3.ops.kernels.rotary import keys

        ctx.content = content
        return keys(kv, key_BTR, content), kv[..., content:]

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor, None]:
        """[B, T, H, N + V] and [B, T, R]."""
        from dsv3.ops.kernels.rotary import keys_backward

        return *keys_backward(grad_keys, grad_values, ctx.content), None


rotate_heads = Operation(
    "rotate_heads",
    [
        Implementation("triton", Rotate.apply, on_gpu),
        Implementation("reference", rotate_reference, anything),
    ],
)
"""`rotate_heads(x [B, T, H, N + R], turn complex64 [B or 1, T, F]) -> [B, T, H, N + R]`: the last R elements of every head turned."""

keys_and_values = Operation(
    "keys_and_values",
    [
        Implementation("triton", KeysAndValues.apply, on_gpu),
        Implementation("reference", keys_reference, anything),
    ],
)
"""`keys_and_values(kv [B, T, H, N + V], key [B, T, R], N) -> (keys [B, T, H, N + R], values [B, T, H, V])`: every head's own N
elements and the R that all heads share; the values are a view."""
