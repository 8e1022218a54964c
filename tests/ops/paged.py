"""Sequences in shuffled pages, with everything poisoned that no one may read."""

import torch

from dsv3.ops.latent_pages import PAGE, packed_size, store_latents

HUGE = 2**30


def sequences(lengths, tokens, heads, latent, rotated, packed=False, dtype=torch.float32, device="cpu", seed=0):
    """(queries [B, T, H, L], pages, table, lengths): slots behind a sequence and free pages hold NaN, free entries huge numbers."""
    generator = torch.Generator(device=device).manual_seed(seed)
    held = [-(-length // PAGE) for length in lengths]
    size = packed_size(latent, rotated) if packed else latent + rotated
    count = sum(held) + 3
    shuffled = torch.randperm(count, generator=generator, device=device).int()
    table = torch.full((len(lengths), max(held) + 2), HUGE, dtype=torch.int32, device=device)
    pages = torch.full((count, PAGE, size), 0xFF if packed else torch.nan, device=device).to(
        torch.uint8 if packed else dtype
    )
    first = 0
    for b, (length, own) in enumerate(zip(lengths, held, strict=True)):
        table[b, :own] = shuffled[first : first + own]
        first += own
        position = torch.arange(length, device=device)
        slots = table[b].long()[position // PAGE] * PAGE + position % PAGE
        shape = length, latent + rotated
        entries = (torch.randn(shape, generator=generator, device=device) * 0.1).to(torch.bfloat16).to(dtype)
        store_latents(pages, slots, entries[:, :latent].contiguous(), entries[:, latent:].contiguous())
    # Larger, so that scores differ as if both were of deviation 1; results are then small beside a rounding of their own.
    q = torch.randn(len(lengths), tokens, heads, latent + rotated, generator=generator, device=device) * 10
    return q.to(dtype), pages, table, torch.tensor(lengths, dtype=torch.int32, device=device)
