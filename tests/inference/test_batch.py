"""A plan's works as tensors; what passes make of them is tested with the engine."""

import torch

from dsv3.inference.batch import width_for


def test_tables_are_wide_enough_have_few_widths_and_on_a_cpu_little_to_spare():
    for device, spare, widths in (("cpu", 1.25, 28), ("cuda", 2, 9)):
        found = [width_for(pages, torch.device(device)) for pages in range(1, 257)]
        assert all(pages <= width < spare * pages for pages, width in enumerate(found, start=1))
        assert len(set(found)) <= widths
