import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.device import pick_device


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="device 'cuda:2': torch finds 2 GPUs here, counted from 'cuda:0'"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:first", "meta", "mps"])
def test_what_is_no_device(name):
    with pytest.raises(UserError, match=f"device '{name}': expected 'auto', 'cpu', 'cuda' or one GPU"):
        pick_device(name)


def test_a_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': torch finds no GPU here; use 'auto' or 'cpu'"):
        pick_device("cuda")
