from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks
from tests.training.conftest import shard_directory as shard_directory


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[Ranks]:
    with Ranks(8) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks
