import pytest
import torch

from dsv3.errors import UserError
from dsv3.inference.cache import LatentCache

VARIANTS = [
    ("debug", {}),
    ("debug", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    ("debug", {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32}, "n_shared_experts": 0}),
    ("tiny", {}),
    ("tiny", {"q_lora_rank": None}),
]


def empty_cache(model, batch, length):
    names = [layer.name for layer in model.layers]
    return LatentCache(model.config, names, batch, length, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
def test_cached_passes_give_the_logits_of_a_full_forward(make_model, preset, changes):
    """Prompts of unequal length in one pass (expanded form), then token by token (absorbed form)."""
    model = make_model(preset, **changes)
    lengths, steps = [7, 3, 12], 6
    tokens = torch.randint(0, model.config.vocab_size, (3, 18), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(tokens).logits
        cache = empty_cache(model, 3, 18)
        padded = torch.zeros(3, 12, dtype=torch.long)
        for row, length in enumerate(lengths):
            padded[row, :length] = tokens[row, :length]
        logits = model(padded, positions=cache.begin(torch.arange(12).expand(3, -1), 12), cache=cache).logits
        for row, length in enumerate(lengths):
            torch.testing.assert_close(logits[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)
        at = torch.tensor(lengths)
        for step in range(steps):
            new = tokens.gather(1, at.unsqueeze(1))
            found = model(new, positions=cache.begin(at.unsqueeze(1), 12 + step + 1), cache=cache).logits[:, 0]
            torch.testing.assert_close(found, expected[torch.arange(3), at], atol=1e-4, rtol=1e-4)
            at = at + 1


def test_an_absorbed_pass_over_several_tokens_equals_the_expanded_one(make_model):
    model = make_model("debug")
    tokens = torch.randint(0, 320, (2, 10), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cache = empty_cache(model, 2, 10)
        model(tokens[:, :4], positions=cache.begin(torch.arange(4).expand(2, -1), 4), cache=cache)
        found = model(tokens[:, 4:], positions=cache.begin(torch.arange(4, 10).expand(2, -1), 10), cache=cache).logits
        torch.testing.assert_close(found, model(tokens).logits[:, 4:], atol=1e-4, rtol=1e-4)


def test_it_keeps_the_latent_and_the_rotated_key_and_forgets_rows(make_model):
    model = make_model("debug")
    tokens = torch.randint(0, 320, (3, 5), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        cache = empty_cache(model, 3, 6)
        model(tokens, positions=cache.begin(torch.arange(5).expand(3, -1), 5), cache=cache)
        assert set(cache.values) == {"0", "1", "2"}
        config = model.config
        assert {tuple(v.shape) for v in cache.values.values()} == {
            (3, 6, config.kv_lora_rank + config.qk_rope_head_dim)
        }
        cache.keep(torch.tensor([2, 0]))
        last = torch.tensor([[9], [9]])
        found = model(last, positions=cache.begin(torch.tensor([[5], [5]]), 6), cache=cache).logits[:, 0]
        whole = torch.cat((tokens[[2, 0]], last), dim=1)
        torch.testing.assert_close(found, model(whole).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_longer_than_the_model_reaches_is_refused(make_model):
    model = make_model("debug")
    empty_cache(model, 1, 128)
    with pytest.raises(UserError, match=r"129 tokens are more than the model's max_position_embeddings = 128"):
        empty_cache(model, 1, 129)
