"""Weights stored in FP8 in inference, the released ones: E4M3 and one scale for each block of 128 x 128 (report, section 3.3.2).

A GPU with FP8 products multiplies them as they are: the input is quantised in tiles of 1 x 128, as DeepSeek's own inference code
does. Everywhere else, and wherever gradients are recorded, every use multiplies them out to the input's dtype: that rounds no
input, and takes several times as long. `in_fp8` decides, for all layers.

Legend: R rows (tokens, or tokens at their experts), D hidden, K inputs, N outputs, E experts, I inner elements of an expert.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3.ops.block_scaled import scale_shape
from dsv3.ops.gemm_fp8 import gemm_fp8, prepared_scale
from dsv3.ops.grouped_gemm_fp8 import grouped_gemm_fp8, grouped_gemm_fp8_masked
from dsv3.ops.kernels.available import no_triton
from dsv3.ops.rooms import Rooms
from dsv3.ops.swiglu import swiglu_tiles
from dsv3.ops.tiles import TILE, Tiles, quantize_rows

log = logging.getLogger(__name__)
Blocks = tuple[Tensor, Tensor]
"""(E4M3 [..., N, K], its scales)."""
PIECE = 16
"""Bytes: tensor cores read rows in pieces of it."""
IN_ROOMS = 128
"""Tokens of a pass up to which routed experts compute in rooms (`dsv3.ops.rooms`). At DeepSeek-V3's sizes rooms for 128 tokens take 1 GB
while a layer is computed; from there on most experts have enough rows for sorted ones to be no slower."""


def in_fp8(x: Tensor, *weights: Blocks) -> bool:
    """Whether these stored weights are multiplied with x in FP8; a GPU that cannot is told of once for each reason."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    reason = not_in_fp8(x, *weights)
    if reason is not None:
        tell(reason)
    return reason is None


def not_in_fp8(x: Tensor, *weights: Blocks) -> str | None:
    """The reason why x is not multiplied with them in FP8; None when it is."""
    if x.dtype != torch.bfloat16:
        return f"activations are in {x.dtype}, FP8 products are for BF16"
    for weight, scale in weights:
        if weight.shape[-1] % PIECE:
            return f"FP8 products sum over a multiple of {PIECE} elements, not {weight.shape[-1]}"
        if scale.shape != scale_shape(weight.shape):
            return f"experts whose gate and up have {weight.shape[-2] // 2} outputs: FP8 products need a multiple of {TILE}"
    return no_triton(x)


@cache
def tell(reason: str) -> None:
    """One line in the log, the first time."""
    log.warning("weights in FP8 are multiplied out at every use, which is slower: %s", reason)


class Once:
    """A tensor made of others, made again when one of them was written to or is another tensor: as `precision.weights.BlockCache`."""

    def __init__(self, make: Callable[..., Tensor]):
        self.make = make
        self.made: Tensor | None = None
        self.key: tuple[object, ...] = ()
        self.sources: tuple[Tensor, ...] = ()
        """Held, so that no other tensor gets their memory."""

    # What is made while a model generates must be a tensor that a later pass with gradients may read.
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(self, *sources: Tensor, option: object = None) -> Tensor:
        """`make(*sources)`, or `make(*sources, option)`."""
        # What was made in inference mode does not count what is written to it.
        known = not any(each.is_inference() for each in sources)
        key = (option, *((each.data_ptr(), each._version) for each in sources)) if known else ()
        if self.made is None or key != self.key or not known:
            more = () if option is None else (option,)
            self.made, self.key, self.sources = self.make(*(each.detach() for each in sources), *more), key, sources
        return self.made


class Linear(Protocol):
    """`dsv3.model.linear.Linear`, as it is needed here."""

    weight: nn.Parameter
    """[N, K]."""
    weight_scale_inv: Tensor | None
    """None where the weight is not stored in FP8."""


def stacked_scale(*scales: Tensor) -> Tensor:
    """The scales of weights one below the other, in FP32 and as the products read them; they may be stored as E8M0."""
    return prepared_scale(torch.cat([each.float() for each in scales], dim=-2))


class Stored:
    """One product for the weights of one linear layer, or of several that read the same input: it is quantised once."""

    def __init__(self, *linears: Linear):
        self.linears = linears
        self.scale = Once(stacked_scale)

    @property
    def weights(self) -> list[Blocks]:
        """Of the layers whose weights are stored in FP8."""
        each = [(linear.weight, linear.weight_scale_inv) for linear in self.linears]
        return [(weight, scale) for weight, scale in each if scale is not None]

    def serves(self, x: Tensor) -> bool:
        """Whether all layers' weights are stored in FP8, and multiplied so with x."""
        if self.linears[0].weight_scale_inv is None:
            return False
        weights = self.weights
        return len(weights) == len(self.linears) and in_fp8(x, *weights)

    def __call__(self, x: Tensor | Tiles, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[..., K], or tiles of [R, K] -> [..., sum of N], in `dtype`.

        Where blocks of one weight would lie across the next one, each has a product of its own.
        """
        tiles = x if isinstance(x, Tiles) else quantize_rows(x.flatten(0, -2))
        weights = self.weights
        if all(len(weight) % TILE == 0 for weight, _ in weights[:-1]):
            scale_PQ = self.scale.of(*(scale for _, scale in weights))
            out = gemm_fp8(tiles, side_by_side([weight for weight, _ in weights]), scale_PQ, dtype)
        else:
            out = torch.cat([gemm_fp8(tiles, weight, stacked_scale(scale), dtype) for weight, scale in weights], dim=-1)
        return out if isinstance(x, Tiles) else out.unflatten(0, x.shape[:-1])


@torch.inference_mode(False)
@torch.no_grad()
def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """[sum of N, K] of parameters [N, K] as one matrix. Unless they follow one another in memory already, they are moved there,
    so that memory holds them once; their values stay, and what is written to them is written to the matrix."""
    if len(weights) == 1:
        return weights[0].detach()
    places = [each.data_ptr() for each in weights]
    ends = [each.data_ptr() + each.nbytes for each in weights]
    one_storage = len({each.untyped_storage().data_ptr() for each in weights}) == 1
    if not one_storage or places[1:] != ends[:-1] or not all(each.is_contiguous() for each in weights):
        whole = torch.cat([each.detach().view(torch.uint8) for each in weights]).view(weights[0].dtype)
        for each, part in zip(weights, whole.split([len(each) for each in weights]), strict=True):
            each.data = part
    return weights[0].detach().as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())


def feed_forward(x: Tensor, gate_up: Stored, down: Stored) -> Tensor:
    """SwiGLU of [..., D] in FP8; the activation goes from FP32 straight to tiles."""
    inner_RJ = gate_up(x).flatten(0, -2)
    return down(swiglu_tiles(inner_RJ), x.dtype).view(x.shape)


def experts_in_rooms(rooms: Rooms, counts_E: Tensor, weight_R: Tensor, gate_up: Blocks, down: Blocks) -> Tensor:
    """Each expert's SwiGLU on the rows in its room, times their weights: BF16 [E * room, D]; rows of nobody hold anything.

    `gate_up` is [E, 2I, D], `down` [E, D, I]. Every expert's weights are read once, those of experts without rows not at all.
    """
    inner_RJ = grouped_gemm_fp8_masked(rooms.tiles, *gate_up, counts_E, rooms.room).flatten(0, 1)
    act = swiglu_tiles(inner_RJ, weight_R, counts_E=counts_E)
    return grouped_gemm_fp8_masked(act, *down, counts_E, rooms.room).flatten(0, 1)


def experts_in_groups(rows_RD: Tensor, counts_E: Tensor, weight_R: Tensor, gate_up: Blocks, down: Blocks) -> Tensor:
    """The same on rows sorted by expert, each group behind the one before: [R, D]. Groups may be of any size."""
    inner_RJ = grouped_gemm_fp8(quantize_rows(rows_RD), *gate_up, counts_E, rows_RD.dtype)
    return grouped_gemm_fp8(swiglu_tiles(inner_RJ, weight_R), *down, counts_E, rows_RD.dtype)
