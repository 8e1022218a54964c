"""MLA's absorbed attention (report, section 2.1.1): all heads attend to one entry a position, which is key and value alike.

Legend: B sequences, T tokens of the pass, H heads, S positions held, C elements of the latent, L = C + R elements of an
entry, the latent and then the rotated key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.operation import Implementation, Operation, anything


def reference(q_BTHL: Tensor, entry_BSL: Tensor, bias_BTS: Tensor | None, latent: int, scale: float) -> Tensor:
    """The definition, softmax in FP32."""
    scores = torch.einsum("bthl,bsl->bths", q_BTHL, entry_BSL).float() * scale
    if bias_BTS is not None:
        scores = scores + bias_BTS.unsqueeze(2)
    return torch.einsum("bths,bsc->bthc", scores.softmax(-1).to(entry_BSL.dtype), entry_BSL[..., :latent])


def sdpa(q_BTHL: Tensor, entry_BSL: Tensor, bias_BTS: Tensor | None, latent: int, scale: float) -> Tensor:
    """Torch's attention with the heads as further queries of a single head."""
    length, heads = q_BTHL.shape[1:3]
    bias = None if bias_BTS is None else bias_BTS.to(q_BTHL.dtype).repeat_interleave(heads, dim=1).unsqueeze(1)
    entries = entry_BSL.unsqueeze(1)
    mixed = F.scaled_dot_product_attention(
        q_BTHL.flatten(1, 2).unsqueeze(1), entries, entries, attn_mask=bias, scale=scale
    )
    return mixed.squeeze(1).unflatten(1, (length, heads))[..., :latent]


def on_cpu(q_BTHL: Tensor, *rest: object) -> str | None:
    """On GPUs torch's kernels want the bias in layouts that depend on S; one of them gave wrong tokens in BF16."""
    return None if q_BTHL.device.type == "cpu" else "for tensors on the CPU"


latent_attention = Operation(
    "latent_attention", [Implementation("sdpa", sdpa, on_cpu), Implementation("reference", reference, anything)]
)
"""`latent_attention(q [B, T, H, L], entries [B, S, L], bias [B, T, S] or None, C, scale) -> [B, T, H, C]`.

The bias is 0 where a token sees a position and -inf elsewhere; None: all tokens see all positions.
"""
