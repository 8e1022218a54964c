import os

import pytest
import torch

from dsv3.model.attention import Absorbed, Expanded
from dsv3.ops.latent_pages import PAGE

# Where there is no GPU, Triton interprets kernels; it looks when a kernel's file is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


LONG = ("tests/test_readme.py", "tests/cli/", "tests/stages/", "tests/distributed/", "tests/serving/")


def pytest_collection_modifyitems(items):
    """Files of whole commands first: one that begins last would have the other processes wait for it."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices are tiny here: a second thread mostly waits, and for long where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class GrowingCache:
    """A latent cache that keeps what it is given in dicts: the few-line twin of the engine's. The first pass is expanded."""

    def __init__(self):
        self.held, self.length = {}, 0

    def begin(self, positions):
        """Announces the positions [B or 1, T] of the next pass, and returns them."""
        self.before, self.length = self.length, self.length + positions.shape[1]
        self.batch = None
        return positions

    @property
    def parts(self):
        if not self.before:
            return [Expanded(slice(0, self.batch * self.length), self.batch)]
        pages = -(-self.length // PAGE)
        table = torch.arange(self.batch * pages, dtype=torch.int32).view(self.batch, pages)
        return [Absorbed(slice(None), table, torch.full((self.batch,), self.length, dtype=torch.int32))]

    def store(self, block, latent, key):
        new = torch.cat((latent, key), dim=-1)
        self.batch = len(new) // (self.length - self.before)
        new = new.unflatten(0, (self.batch, -1))
        self.held[block] = torch.cat((self.held[block], new), dim=1) if self.before else new

    def pages(self, block):
        held = self.held[block]
        padded = torch.nn.functional.pad(held, (0, 0, 0, -held.shape[1] % PAGE))
        return padded.unflatten(1, (-1, PAGE)).flatten(0, 1)


@pytest.fixture
def growing_cache():
    """The class itself: a test may need several."""
    return GrowingCache
