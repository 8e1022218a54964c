import torch

from dsv3.inference.batch import lay_out
from dsv3.inference.cache import PagedCache
from dsv3.inference.plan import Work
from dsv3.model.config import ModelConfig

CONFIG = ModelConfig.preset("debug")
SIZE = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim


def stored(cache, starts, counts, gathered, value):
    """One pass over so many tokens of two sequences, whose entries all hold one number; the cache's pages in it."""
    blocks = [2, 5], [1, 3]
    works = [Work(k, [0] * counts[k], starts[k], blocks[k]) for k in range(2)]
    batch = lay_out(works, CONFIG, torch.device("cpu"))
    batch.gathered = gathered and cache.gather(["0"], batch)
    assert batch.gathered == gathered
    cache.begin(batch)
    entries = torch.full((len(batch.token_F), SIZE), value)
    cache.store("0", *entries.split([CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim], dim=1))
    return cache.pages("0")


def test_the_gathered_copy_is_what_the_pages_hold():
    """Also after a pass that stored in pages alone, and a write from outside; behind a sequence lies nothing that is not finite."""
    cache = PagedCache(CONFIG, ["0"], 8, torch.float32, torch.device("cpu"))
    cache.held["0"].fill_(torch.nan)
    held = stored(cache, (0, 0), (70, 70), False, 1.0)
    stored(cache, (70, 70), (1, 1), True, 2.0)
    stored(cache, (71, 71), (3, 1), False, 3.0)
    gathered = stored(cache, (74, 72), (1, 1), True, 4.0)
    assert gathered[:2].isfinite().all()
    expected = [[1.0] * 70 + [2.0] + [3.0] * 3 + [4.0], [1.0] * 70 + [2.0, 3.0, 4.0]]
    for sequence, (values, blocks) in enumerate(zip(expected, ([2, 5], [1, 3]), strict=True)):
        assert gathered[sequence, : len(values), 0].tolist() == values
        assert held[blocks].flatten(0, 1)[: len(values), 0].tolist() == values
    cache.write("0", [2], torch.full((1, *held.shape[1:]), 5.0))
    assert stored(cache, (75, 73), (1, 1), True, 6.0)[0, [0, 63, 64, 75], 0].tolist() == [5.0, 5.0, 1.0, 6.0]


def test_a_batch_without_room_makes_the_copy_stale():
    """Its pass may be replayed, without `store`: the copy from before is gathered again."""
    cache = PagedCache(CONFIG, ["0"], 8, torch.float32, torch.device("cpu"))
    stored(cache, (0, 0), (70, 70), False, 1.0)
    stored(cache, (70, 70), (1, 1), True, 2.0)
    works = [Work(k, [0], 71, blocks) for k, blocks in enumerate(([2, 5], [1, 3], [0, 4], [6, 7]))]
    assert not cache.gather(["0"], lay_out(works, CONFIG, torch.device("cpu")))
    cache.held["0"][5, 7] = 3.0
    assert stored(cache, (72, 71), (1, 1), True, 4.0)[0, 70:73, 0].tolist() == [2.0, 3.0, 4.0]
