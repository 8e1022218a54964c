import os

import pytest
import torch

# Where there is no GPU, Triton interprets kernels; it looks when a kernel's file is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices are tiny here: a second thread mostly waits, and for long where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class GrowingCache:
    """A latent cache that keeps what it is given in dicts: the few-line twin of the engine's."""

    def __init__(self):
        self.held, self.position, self.seen = {}, torch.empty(1, 0, dtype=torch.long), 0

    def begin(self, positions):
        """Announces the positions [B or 1, T] of the next pass, and returns them."""
        self.seen, self.query = self.position.shape[1], positions
        self.position = torch.cat((self.position.expand(len(positions), -1), positions), dim=1)
        return positions

    def store(self, block, latent, key):
        new = torch.cat((latent, key), dim=-1)
        self.held[block] = torch.cat((self.held[block], new), dim=1) if block in self.held else new

    def read(self, block):
        if self.seen == 0:
            return None
        held = self.held[block]
        hidden = self.position.unsqueeze(1) > self.query.unsqueeze(2)
        return held, torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).expand(len(held), -1, -1)


@pytest.fixture
def growing_cache():
    """The class itself: a test may need several."""
    return GrowingCache
