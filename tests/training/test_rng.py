import json
import random

import numpy
import torch

from dsv3.training.rng import random_state, restore_random_state

CPU = torch.device("cpu")


def draws():
    return random.random(), random.gauss(0, 1), float(numpy.random.normal()), torch.rand(5).tolist(), torch.randn(3).tolist()  # fmt: skip


def test_every_generator_goes_on_where_it_was():
    draws()
    state = json.loads(json.dumps(random_state(CPU)))
    expected = [draws() for _ in range(3)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    restore_random_state(state, CPU)
    assert [draws() for _ in range(3)] == expected
