"""Writes tokens into pages of MLA's cache, as they are or packed in bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.ops.kernels.scaling import magnitude_bits, quotient, scale_of
from dsv3.ops.tiles import TILE

WARPS = 1


@triton.jit
def store_kernel(
    pages, words, halves, slots, latent, key, latent_stride, key_stride,
    LATENT: tl.constexpr, ROTATED: tl.constexpr, SIZE: tl.constexpr, PACKED: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    own = (column < LATENT) & (slot >= 0)
    x = tl.load(latent + token * latent_stride + column, own, other=0.0)
    of_key = tl.arange(0, KEY_BLOCK)
    own_key = (of_key < ROTATED) & (slot >= 0)
    rotated = tl.load(key + token * key_stride + of_key, own_key, other=0.0)
    if PACKED:
        wide = x.to(tl.float32)
        scale = scale_of(tl.max(magnitude_bits(wide), axis=1), True)
        values = quotient(wide, scale[:, None], True, False).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store(pages + slot * SIZE + column, values, own)
        own_scale = (tile < LATENT // TILE) & (slot >= 0)
        tl.store(words + (slot * SIZE + LATENT) // 4 + tile, scale, own_scale)
        at = halves + (slot * SIZE + LATENT + LATENT // TILE * 4) // 2
        tl.store(at + of_key, rotated.to(halves.dtype.element_ty), own_key)
    else:
        tl.store(pages + slot * SIZE + column, x.to(pages.dtype.element_ty), own)
        tl.store(pages + slot * SIZE + LATENT + of_key, rotated.to(pages.dtype.element_ty), own_key)


def store(pages: Tensor, slots_N: Tensor, latent_NC: Tensor, key_NR: Tensor) -> None:
    """See `dsv3.ops.latent_pages.store_latents`."""
    (tokens, latent), rotated = latent_NC.shape, key_NR.shape[1]
    if not tokens:
        return
    packed = pages.dtype == torch.uint8
    words, halves = (pages.view(torch.float32), pages.view(torch.bfloat16)) if packed else (None, None)
    store_kernel[(tokens,)](
        pages, words, halves, slots_N, latent_NC, key_NR, latent_NC.stride(0), key_NR.stride(0),
        latent, rotated, pages.shape[2], packed,
        TILE, triton.next_power_of_2(triton.cdiv(latent, TILE)), triton.next_power_of_2(rotated),
        num_warps=WARPS,
    )  # fmt: skip
