"""The decoding kernel, interpreted in float32, against its twin."""

import pytest
import torch

from dsv3.ops.paged_attention import reference
from tests.ops.paged import sequences

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")

LENGTHS = [[0, 0, 0], [130, 0, 4, 64, 300], [0, 65, 128, 0], [1, 2, 3]]


def compare(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_any_lengths_in_any_number_of_parts(lengths, parts, packed):
    from dsv3.ops.kernels.paged_attention import decode

    q, *cache = sequences(lengths, 1, 3, 128, 16, packed)
    compare(decode(q, *cache, 128, 0.2, parts=parts), reference(q, *cache, 128, 0.2))


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 5])
def test_tokens_of_a_pass_see_one_another_causally(tokens, heads):
    from dsv3.ops.kernels.paged_attention import decode

    # The second sequence's last page holds one token: the other queries see none of it, which may be a piece of its own.
    q, *cache = sequences([tokens, 129, 64 + tokens], tokens, heads, 32, 16)
    for parts in (1, 5):
        compare(decode(q, *cache, 32, 0.3, parts=parts), reference(q, *cache, 32, 0.3))


def test_the_number_of_parts_is_chosen():
    from dsv3.ops.kernels.paged_attention import decode

    # Two blocks of rows.
    q, *cache = sequences([130], 2, 33, 32, 16)
    compare(decode(q, *cache, 32, 0.3), reference(q, *cache, 32, 0.3))


@pytest.mark.parametrize(("lengths", "config"), [([64 * 7, 0, 64], (4, 8, 2, 1)), ([64 * 10], (1, 16, 4, 1))], ids=str)
def test_pieces_are_combined_few_and_many_at_a_time(lengths, config, monkeypatch):
    from dsv3.ops.kernels import paged_attention

    monkeypatch.setattr(paged_attention, "COMBINED", {len(lengths) == 1: paged_attention.Combined(*config)})
    q, *cache = sequences(lengths, 1, 6, 16, 16)
    compare(paged_attention.decode(q, *cache, 16, 0.3, parts=10), reference(q, *cache, 16, 0.3))
