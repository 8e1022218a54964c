"""Tokens to rooms of experts, for decoding: every expert has room for the same number of rows, whatever it gets.

So products (`dsv3.ops.grouped_gemm_fp8_masked`) read each expert's weight once, and no host has to know who gets how many. A
token chooses an expert once at most: room for all tokens of a pass is enough.

Legend: T tokens, K experts per token, E experts, R = E * room rows, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, anything, kernel
from dsv3.ops.permute import count_by_expert
from dsv3.ops.tiles import Tiles, empty_tiles, not_quantised_by_triton, rows_reference

MULTIPLE = 16
"""Rows of a room are a multiple of it: the narrowest tile of the products."""


@dataclass(frozen=True)
class Rooms:
    """Tokens in FP8, at their experts. How many rows of each room are used is told beside it; the others hold anything."""

    tiles: Tiles
    """[E * room, D]."""
    room: int


def room_for(tokens: int) -> int:
    """Rows of a room that holds so many tokens."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def assign_reference(expert_TK: Tensor, weight_TK: Tensor, experts: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    expert_A = expert_TK.flatten()
    chosen_AE = expert_A.unsqueeze(1) == torch.arange(experts, device=expert_A.device)
    before_A = (chosen_AE.cumsum(0) - 1).gather(1, expert_A.unsqueeze(1)).squeeze(1)
    row_A = expert_A * room + before_A
    weight_R = torch.zeros(experts * room, device=expert_A.device).scatter_(0, row_A, weight_TK.flatten())
    return row_A.view_as(expert_TK), weight_R, count_by_expert(expert_A, experts)


def rooms_reference(x_TD: Tensor, row_TK: Tensor, rows: int) -> Tiles:
    """The definition; rows of nobody are zeros."""
    tiles = rows_reference(x_TD)
    out = empty_tiles(rows, x_TD.shape[1], x_TD.device)
    out.values.view(torch.uint8).zero_()
    out.scale.fill_(1.0)
    for row_T in row_TK.unbind(1):
        out.values.view(torch.uint8)[row_T] = tiles.values.view(torch.uint8)
        out.scale[row_T] = tiles.scale
    return out


def assigned_by_triton(expert_TK: Tensor, weight_TK: Tensor, experts: int, room: int) -> str | None:
    """The reason why the kernel does not serve; None when it does."""
    if not expert_TK.is_contiguous() or not weight_TK.is_contiguous() or not expert_TK.numel():
        return "needs at least one assignment, in contiguous tensors"
    return no_triton(expert_TK, weight_TK)


def quantised_by_triton(x_TD: Tensor, row_TK: Tensor, rows: int) -> str | None:
    """The reason why the kernel does not serve; None when it does."""
    if not row_TK.is_contiguous():
        return "needs places in a contiguous tensor"
    return not_quantised_by_triton(x_TD)


assign_rooms = Operation(
    "assign_rooms",
    [
        Implementation("triton", kernel("rooms", "assign"), assigned_by_triton),
        Implementation("reference", assign_reference, anything),
    ],
)
"""`assign_rooms(expert [T, K] int64, weight [T, K] FP32, E, room) -> (row [T, K] int64, weight [R] FP32, counts [E] int64)`: the
row of each assignment, in the order of tokens within an expert, the weight of each row, and how many rows of each room are used.
Weights of other rows are anything. The K experts of a token differ, and `room` is T or more."""

quantize_to_rooms = Operation(
    "quantize_to_rooms",
    [
        Implementation("triton", kernel("rooms", "quantize"), quantised_by_triton),
        Implementation("reference", rooms_reference, anything),
    ],
)
"""`quantize_to_rooms(x [T, D] BF16 or FP32, row [T, K] int64, R) -> Tiles` of [R, D]: `quantize_rows(x)`, each row of it in its K
places. Rows that nobody has hold anything."""
