"""Pages of MLA's cache: 64 tokens each, of every token the latent and its rotated key (report, section 2.1.1).

A token is L elements in BF16 or FP32, or it is packed in bytes: the latent in E4M3, one FP32 scale for each 128 of its
elements, a power of two so that unpacking to BF16 rounds nothing, and the rotated key in BF16. DeepSeek-V3's 512 + 64 elements
take 512 + 16 + 128 = 656 bytes, as FlashMLA lays them out.

Legend: P pages, N tokens, C elements of the latent, R of the rotated key, L = C + R.
"""

import torch
from torch import Tensor

from dsv3.ops.kernels.available import no_triton
from dsv3.ops.operation import Implementation, Operation, kernel
from dsv3.ops.tiles import TILE, rows_reference

PAGE = 64
"""Tokens of a page: FlashMLA's size."""


def packed_size(latent: int, rotated: int) -> int:
    """Bytes of a packed token."""
    return latent + latent // TILE * 4 + rotated * 2


def pack(latent_NC: Tensor, key_NR: Tensor) -> Tensor:
    """BF16 or FP32 -> uint8 [N, bytes]: the definition of the layout."""
    tiles = rows_reference(latent_NC, power_of_two=True)
    parts = tiles.values, tiles.scale, key_NR.to(torch.bfloat16)
    in_rows = [each.clone(memory_format=torch.contiguous_format) for each in parts]
    return torch.cat([each.view(torch.uint8) for each in in_rows], dim=1)


def unpack(tokens: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """uint8 [..., bytes] -> [..., L]."""
    scales = latent // TILE * 4
    values, scale, key = tokens.split([latent, scales, tokens.shape[-1] - latent - scales], dim=-1)
    factor = scale.contiguous().view(torch.float32).repeat_interleave(TILE, dim=-1)
    wide = values.contiguous().view(torch.float8_e4m3fn).float() * factor
    return torch.cat((wide.to(dtype), key.contiguous().view(torch.bfloat16).to(dtype)), dim=-1)


def read_latents(pages: Tensor, slots_N: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """[N, L]: the tokens in these slots."""
    tokens = pages.view(-1, pages.shape[2])[slots_N]
    return unpack(tokens, latent, dtype) if pages.dtype == torch.uint8 else tokens.to(dtype)


def reference(pages: Tensor, slots_N: Tensor, latent_NC: Tensor, key_NR: Tensor) -> None:
    """The definition."""
    packed = pages.dtype == torch.uint8
    tokens = pack(latent_NC, key_NR) if packed else torch.cat((latent_NC, key_NR), dim=1).to(pages.dtype)
    kept = slots_N >= 0
    pages.view(-1, pages.shape[2])[slots_N[kept]] = tokens[kept]


def disagree(pages: Tensor, slots_N: Tensor, latent_NC: Tensor, key_NR: Tensor) -> str | None:
    """What is wrong with the shapes."""
    latent, rotated = latent_NC.shape[1], key_NR.shape[1]
    if not pages.is_contiguous():
        return "needs pages that are contiguous"
    if pages.dtype == torch.uint8 and latent % TILE:
        return f"packs latents of a multiple of {TILE} elements, not {latent}"
    size = packed_size(latent, rotated) if pages.dtype == torch.uint8 else latent + rotated
    if pages.shape[1:] != (PAGE, size):
        return f"tokens of {latent} + {rotated} elements need pages of [{PAGE}, {size}], not {list(pages.shape[1:])}"
    return None


def triton_serves(pages: Tensor, slots_N: Tensor, latent_NC: Tensor, key_NR: Tensor) -> str | None:
    """Why it does not."""
    if latent_NC.stride(1) != 1 or key_NR.stride(1) != 1:
        return "needs tokens whose elements are side by side"
    return disagree(pages, slots_N, latent_NC, key_NR) or no_triton(pages, slots_N, latent_NC, key_NR)


store_latents = Operation(
    "store_latents",
    [
        Implementation("triton", kernel("latent_pages", "store"), triton_serves),
        Implementation("reference", reference, disagree),
    ],
)
"""`store_latents(pages, slots [N] int, latent [N, C], key [N, R])`: writes token n to pages[slot // 64, slot % 64], in place.

Pages are [P, 64, L] in BF16 or FP32, or uint8 [P, 64, bytes] of packed tokens. A token whose slot is negative is not written:
a recorded pass has room for more tokens than it is given. Slots are different. Raises `UserError` for shapes that do not agree.
"""
