"""Decoding: absorbed attention over pages at DeepSeek-V3's sizes, beside FlashMLA where it is installed."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3.bench.kernels.case import Case, Unit, Work
from dsv3.ops.kernels import flash_mla
from dsv3.ops.latent_pages import PAGE, packed_size, store_latents
from dsv3.ops.paged_attention import paged_latent_attention

LATENT, ROTATED = 512, 64
SCALE = 192**-0.5
SHAPES: tuple[tuple[int, int, int, int, bool, float, Unit], ...] = (
    (128, 1, 16, 8192, False, 3.2, "TB/s"),
    (128, 1, 128, 4096, False, 350, "TFLOP/s"),
    (128, 2, 128, 4096, False, 350, "TFLOP/s"),
    (1, 1, 128, 32768, False, 50, "us"),
    (128, 1, 16, 8192, True, 2.76, "TB/s"),
    (128, 1, 128, 4096, True, 350, "TFLOP/s"),
)
"""Sequences, tokens of the pass, heads, length, whether tokens are packed, and the aim. 16 heads are a rank's of eight."""


def cases(device: torch.device) -> Iterator[Case]:
    """All of them, each with its tensors made when its turn comes; then the store of a pass's tokens."""
    for shape in SHAPES:
        yield attention(device, *shape)
    for packed in (False, True):
        yield store(device, packed)


def pages_of(device: torch.device, count: int, packed: bool) -> Tensor:
    """Random tokens."""
    entries = torch.randn(count * PAGE, LATENT + ROTATED, dtype=torch.bfloat16, device=device)
    if not packed:
        return entries.view(count, PAGE, -1)
    pages = torch.empty(count, PAGE, packed_size(LATENT, ROTATED), dtype=torch.uint8, device=device)
    store_latents(pages, torch.arange(count * PAGE, device=device), entries[:, :LATENT], entries[:, LATENT:])
    return pages


def recorded(work: Work, device: torch.device) -> Work:
    """As a CUDA graph, which is how the engine decodes: small calls launched from Python would measure Python."""
    if device.type != "cuda":
        return work
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def attention(
    device: torch.device, batch: int, tokens: int, heads: int, length: int, packed: bool, target: float, unit: Unit
) -> Case:
    """Our own kernels, over pages in any order; both sides recorded."""
    held = length // PAGE
    pages = pages_of(device, batch * held, packed)
    table = torch.randperm(batch * held, device=device).int().view(batch, held)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    q = torch.randn(batch, tokens, heads, LATENT + ROTATED, dtype=torch.bfloat16, device=device)
    arguments: tuple[Any, ...] = q, pages, table, lengths, LATENT, SCALE
    ours = next(
        each.run
        for each in paged_latent_attention.implementations
        if each.name != "flash_mla" and each.supports(*arguments) is None
    )
    plugin: Work | None = None
    if not packed and flash_mla.no_flash_mla() is None:
        plugin = recorded(partial(flash_mla.decode, *arguments), device)
    return Case(
        op=f"paged_latent_attention{', packed' if packed else ''}",
        shape=f"{batch}x{tokens}, {heads} heads, {length} tokens",
        ours=recorded(partial(ours, *arguments), device),
        peer_name="copy rate" if packed else "FlashMLA",
        peer=plugin,
        bytes=pages.nbytes,
        flops=2 * batch * tokens * heads * length * (2 * LATENT + ROTATED),
        target=target,
        unit=unit,
    )


def store(device: torch.device, packed: bool) -> Case:
    """The tokens of a chunk of a prompt, to any slots."""
    count = 128
    pages = pages_of(device, count, packed)
    slots = torch.randperm(count * PAGE, device=device)
    latent = torch.randn(len(slots), LATENT, dtype=torch.bfloat16, device=device)
    key = torch.randn(len(slots), ROTATED, dtype=torch.bfloat16, device=device)
    return Case(
        op=f"store_latents{', packed' if packed else ''}",
        shape=f"{len(slots)}x({LATENT}+{ROTATED})",
        ours=partial(store_latents, pages, slots, latent, key),
        peer_name="copy rate",
        bytes=latent.nbytes + key.nbytes + pages.nbytes,
    )
