"""A plan's works as tensors; what passes make of them is tested with the engine."""

import torch
from torch.overrides import TorchFunctionMode

from dsv3.inference.batch import lay_out, width_for
from dsv3.inference.plan import Work
from dsv3.model.config import ModelConfig


def test_tables_are_wide_enough_have_few_widths_and_on_a_cpu_little_to_spare():
    for device, spare, widths in (("cpu", 1.25, 28), ("cuda", 2, 9)):
        found = [width_for(pages, torch.device(device)) for pages in range(1, 257)]
        assert all(pages <= width < spare * pages for pages, width in enumerate(found, start=1))
        assert len(set(found)) <= widths


class OnTheCpu(TorchFunctionMode):
    """Tensors that are meant for a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **{name: "cpu" if name == "device" else value for name, value in (kwargs or {}).items()})


def test_whole_prompts_are_one_part_on_a_gpu():
    starts, sizes = (0, 9, 0, 9, 9, 0), (3, 1, 2, 80, 1, 3)
    works = [Work(k, [0] * size, start, [k, k + 6]) for k, (start, size) in enumerate(zip(starts, sizes, strict=True))]
    with OnTheCpu():
        batch = lay_out(works, ModelConfig.preset("debug"), torch.device("cuda"))
    assert [work.sequence for work in batch.works] == [1, 4, 2, 0, 5, 3]
    assert batch.first == [0, 1, 2, 4, 7, 10]
    decoding, prompts, chunk = batch.parts
    assert [part.rows for part in batch.parts] == [slice(0, 2), slice(2, 10), slice(10, 90)]
    assert decoding.lengths.tolist() == [10, 10]
    assert prompts.segment_ids.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert chunk.slots.tolist() == [*range(3 * 64, 4 * 64), *range(9 * 64, 9 * 64 + 25)]


def test_whole_prompts_of_one_length_are_one_part_on_a_cpu():
    works = [Work(k, [0] * size, 0, [k, k + 6]) for k, size in enumerate((3, 70, 3, 5, 3))]
    batch = lay_out(works, ModelConfig.preset("debug"), torch.device("cpu"))
    assert [work.sequence for work in batch.works] == [0, 2, 4, 3, 1]
    assert [(part.rows, part.sequences) for part in batch.parts] == [
        (slice(0, 9), 3),
        (slice(9, 14), 1),
        (slice(14, 84), 1),
    ]
