"""The mode in which a model is scored, and the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Puts a model into evaluation mode, and back into the mode it was in; gives the device that its inputs have to be on."""
    was_training = model.training
    model.eval()
    try:
        yield next((each.device for each in model.parameters()), torch.device("cpu"))
    finally:
        model.train(was_training)
