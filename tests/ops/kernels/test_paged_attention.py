"""The decoding kernel, interpreted in float32, against its twin."""

import pytest
import torch

from dsv3.ops.paged_attention import reference
from tests.ops.paged import sequences

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")

LENGTHS = [[70], [0, 0, 0], [130, 0, 4, 64, 300], [0, 65, 128, 0], [1, 2, 3]]


def compare(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_any_lengths_in_any_number_of_parts(lengths, parts, packed):
    from dsv3.ops.kernels.paged_attention import decode

    q, *cache = sequences(lengths, 1, 3, 128, 16, packed)
    compare(decode(q, *cache, 128, 0.2, parts=parts), reference(q, *cache, 128, 0.2))


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 5, 16])
def test_tokens_of_a_pass_see_one_another_causally(tokens, heads):
    from dsv3.ops.kernels.paged_attention import decode

    # The second sequence's last page holds one token: the other queries see none of it, which may be a piece of its own.
    q, *cache = sequences([tokens, 129, 64 + tokens], tokens, heads, 32, 16)
    for parts in (1, 5):
        compare(decode(q, *cache, 32, 0.3, parts=parts), reference(q, *cache, 32, 0.3))


def test_the_number_of_parts_is_chosen():
    from dsv3.ops.kernels.paged_attention import decode

    q, *cache = sequences([200, 10], 2, 40, 32, 16)
    compare(decode(q, *cache, 32, 0.3), reference(q, *cache, 32, 0.3))


@pytest.mark.parametrize("filling", [True, False])
def test_pieces_are_combined_few_and_many_at_a_time(filling, monkeypatch):
    from dsv3.ops.kernels import paged_attention

    small = paged_attention.Combined(4, 8, 2, 1) if filling else paged_attention.Combined(1, 16, 4, 1)
    monkeypatch.setattr(paged_attention, "COMBINED", {filling: small})
    monkeypatch.setattr(paged_attention, "FILLING", 0 if filling else 100)
    q, *cache = sequences([64 * 7, 0, 64], 1, 6, 16, 16)
    compare(paged_attention.decode(q, *cache, 16, 0.3, parts=8), reference(q, *cache, 16, 0.3))
