"""Attention over pages, by definition: against attention over contiguous entries, and what it must not read."""

import pytest
import torch

from dsv3.errors import UserError
from dsv3.ops.latent_pages import PAGE, pack, packed_size, store_latents, unpack
from dsv3.ops.paged_attention import (
    causal_bias,
    entries_attention,
    gathered,
    paged_latent_attention,
    reference,
    side_by_side,
)
from tests.ops.paged import sequences


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_pages_are_a_way_to_lay_out_entries(tokens, packed):
    lengths = [70, 5, 128]
    q, pages, table, held = sequences(lengths, tokens, 4, 128, 16, packed)
    out, lse = reference(q, pages, table, held, 128, 0.2)
    for b, length in enumerate(lengths):
        entries = pages[table[b, : -(-length // PAGE)].long()].flatten(0, 1)[:length]
        if packed:
            entries = unpack(entries, 128, torch.float32)
        query, position = torch.arange(length - tokens, length), torch.arange(length)
        bias = torch.zeros(tokens, length).masked_fill(position > query[:, None], float("-inf"))
        scores = torch.einsum("thl,sl->ths", q[b], entries) * 0.2 + bias.unsqueeze(1)
        torch.testing.assert_close(lse[b], scores.logsumexp(-1))
        torch.testing.assert_close(out[b], torch.einsum("ths,sc->thc", scores.softmax(-1), entries[:, :128]))


@pytest.mark.parametrize("tokens", [1, 3])
def test_gathering_pages_is_the_definition(tokens):
    """Where a page's number, an entry behind the end or a page of nobody's were read, it would show: see `sequences`."""
    arguments = *sequences([70, 0, 5, 128], tokens, 4, 128, 16), 128, 0.2
    for found, expected in zip(gathered(*arguments), reference(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_pages_side_by_side_attend_like_gathered_ones(tokens):
    q, pages, table, lengths = sequences([70, 3, 130], tokens, 4, 32, 16)
    entries = side_by_side(pages, table, lengths)
    assert all(not entries[b, length:].any() for b, length in enumerate(lengths))
    bias = causal_bias(lengths, tokens, 4, entries.shape[1], q.dtype)
    found = entries_attention(q, entries, bias, 32, 0.2)
    torch.testing.assert_close(found, paged_latent_attention(q, pages, table, lengths, 32, 0.2)[0])


def test_what_sees_nothing_is_zero():
    q, *cache = sequences([0, 2], 3, 2, 32, 16)
    out, lse = paged_latent_attention(q, *cache, 32, 0.2)
    assert not out[0].any()
    assert (lse[0] == float("-inf")).all()
    assert not out[1, 0].any()
    assert out[1, 1:].all()
    assert lse[1, 1:].isfinite().all()


def test_two_parts_of_a_context_are_merged_by_their_sums():
    q, pages, table, lengths = sequences([200], 1, 4, 32, 16)
    whole, _ = reference(q, pages, table, lengths, 32, 0.2)
    parts = [(table[:, :2], 128), (table[:, 2:], 72)]
    outs, sums = zip(
        *(reference(q, pages, t, torch.tensor([n], dtype=torch.int32), 32, 0.2) for t, n in parts), strict=True
    )
    weights = torch.stack(sums).softmax(0).unsqueeze(-1)
    torch.testing.assert_close((torch.stack(outs) * weights).sum(0), whole)


def test_a_packed_token_of_deepseek_v3_has_656_bytes():
    assert packed_size(512, 64) == 656
    latent, key = torch.randn(7, 512), torch.randn(7, 64)
    latent[2, 128:256] = 0
    latent[3, :128] *= 1e4
    packed = pack(latent, key)
    assert packed.shape == (7, 656)
    scale = packed[:, 512:528].contiguous().view(torch.float32)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    largest = latent.unflatten(1, (4, 128)).abs().amax(-1)
    assert (largest <= 448 * scale).all()
    assert (largest[largest > 0] > 224 * scale[largest > 0]).all()
    found = unpack(packed, 512, torch.float32)
    assert torch.equal(found[:, 512:], key.to(torch.bfloat16).float())
    # Half a step of E4M3, three bits behind the first; of its smallest numbers, 2^-10.
    step = torch.maximum(latent.abs() * 2**-4, scale.repeat_interleave(128, dim=1) * 2**-10)
    assert ((found[:, :512] - latent).abs() <= step).all()
    assert torch.equal(found[:, :512].to(torch.bfloat16).float(), found[:, :512])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_tokens_without_a_slot_are_not_stored(dtype):
    size = packed_size(128, 16) if dtype == torch.uint8 else 144
    pages = torch.zeros(2, PAGE, size, dtype=dtype)
    latent, key = torch.randn(3, 128), torch.randn(3, 16)
    store_latents(pages, torch.tensor([70, -1, 3]), latent, key)
    assert pages.flatten(0, 1).any(-1).nonzero().flatten().tolist() == [3, 70]
    tokens = pages[1, 6][None], pages[0, 3][None]
    for found, n in zip(tokens, (0, 2), strict=True):
        if dtype == torch.uint8:
            assert torch.equal(found, pack(latent[n : n + 1], key[n : n + 1]))
        else:
            assert torch.equal(found, torch.cat((latent[n], key[n]))[None].to(dtype))


def test_shapes_that_do_not_agree_are_refused():
    q, pages, table, lengths = sequences([70], 1, 2, 32, 16)
    with pytest.raises(UserError, match=r"need pages of \[64, 48\], not \[64, 47\]"):
        paged_latent_attention(q, pages[..., :47], table, lengths, 32, 0.2)
    with pytest.raises(UserError, match="1 sequences have as many"):
        paged_latent_attention(q, pages, table, lengths.repeat(2), 32, 0.2)
    with pytest.raises(UserError, match="in int32"):
        paged_latent_attention(q, pages, table, lengths.long(), 32, 0.2)
    with pytest.raises(UserError, match="packs latents of a multiple of 128"):
        store_latents(torch.zeros(1, PAGE, 64, dtype=torch.uint8), lengths, torch.zeros(1, 32), torch.zeros(1, 16))
    with pytest.raises(UserError, match=r"32 \+ 16 elements need pages of \[64, 48\], not \[64, 64\]"):
        store_latents(torch.zeros(1, PAGE, 64), lengths, torch.zeros(1, 32), torch.zeros(1, 16))
