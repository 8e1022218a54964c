import numpy as np
import torch

from dsv3.training.transfer import Transfer


def test_shapes_and_values_come_back():
    given = {
        "losses": torch.tensor([1.25, float("nan")]), "skipped": torch.tensor(True), "norm": torch.tensor(0.1),
        "load": torch.tensor([2**40 + 1, 0]), "bias": torch.full((2, 3), 0.001),
    }  # fmt: skip
    transfer = Transfer(given)
    given["bias"].fill_(7)  # what changes afterwards is not in it
    found = transfer.read()
    assert found.keys() == given.keys()
    assert np.isnan(found["losses"]).tolist() == [False, True]
    assert bool(found["skipped"])
    assert float(found["norm"]) == float(torch.tensor(0.1))
    assert found["load"].tolist() == [2**40 + 1, 0]
    assert np.array_equal(found["bias"].astype(np.float32), np.full((2, 3), 0.001, np.float32))
