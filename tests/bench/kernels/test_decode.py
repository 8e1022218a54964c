import pytest
import torch

from dsv3.bench.kernels import decode


@pytest.fixture(autouse=True)
def small(monkeypatch):
    pytest.importorskip("triton")
    for name, size in (("LATENT", 128), ("ROTATED", 16)):
        monkeypatch.setattr(decode, name, size)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_timed_is_attention_over_whole_pages(packed):
    case = decode.attention(torch.device("cpu"), 2, 3, 4, 128, packed, 3.2, "TB/s")
    out, lse = case.ours()
    assert out.shape == (2, 3, 4, 128)
    assert lse.isfinite().all()
    assert case.bytes == 2 * 128 * (128 + 4 + 32 if packed else 2 * 144)
    assert case.flops == 2 * 2 * 3 * 4 * 128 * (128 + 128 + 16)


@pytest.mark.parametrize("packed", [False, True])
def test_every_token_of_the_store_is_written(packed):
    case = decode.store(torch.device("cpu"), packed)
    case.ours()
    assert case.peer_name == "copy rate"
