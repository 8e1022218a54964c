import pytest
import torch

from dsv3.training.device import peak_flops, peak_memory


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("CPU", None), ("NVIDIA GeForce GT 1030", None),
    ],
)  # fmt: skip
def test_peaks_are_found_by_name(name, flops):
    assert peak_flops(name) == flops


def test_memory_is_that_of_the_process():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 10_000_000)
    assert peak_memory(torch.device("cpu")) >= before + 40_000_000
    assert held[0] == 1
