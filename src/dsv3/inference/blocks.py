"""Blocks of the latent cache: who holds which, and which hold a prefix that another sequence begins with."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

Key = bytes
"""Names a full block by its tokens and all before them."""


def key_after(before: Key, tokens: Sequence[int]) -> Key:
    """The key of a block's tokens behind those that `before` names."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


def root_key(salt: str) -> Key:
    """What comes before the first block: sequences with different salts share nothing."""
    return hashlib.sha256(salt.encode()).digest()


@dataclass
class Block:
    """One block; `key` and `tokens` are those of a full one that may be found again."""

    users: int = 0
    key: Key | None = None
    tokens: tuple[int, ...] = ()


class BlockPool:
    """Hands out blocks by number. One whose last user left keeps its content until it is the least recently used."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free: dict[int, None] = dict.fromkeys(range(num_blocks))
        """In the order in which they are handed out: a dict, for any of them may leave in constant time."""
        self.known: dict[Key, int] = {}

    @property
    def usage(self) -> float:
        """The share of the blocks that is in use."""
        return 1 - len(self.free) / len(self.blocks)

    def take(self) -> int:
        """A block for one user, its content forgotten. Only when some are free."""
        number = next(iter(self.free))
        del self.free[number]
        self.forget(number)
        self.blocks[number].users = 1
        return number

    def find(self, keys: Sequence[Key], tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of these tokens, as far as keys are given; each has one user more now."""
        size = self.block_size
        found: list[int] = []
        for k, key in enumerate(keys):
            number = self.known.get(key)
            if number is None or self.blocks[number].tokens != tuple(tokens[k * size : (k + 1) * size]):
                break
            if not self.blocks[number].users:
                del self.free[number]
            self.blocks[number].users += 1
            found.append(number)
        return found

    def remember(self, number: int, key: Key, tokens: Sequence[int]) -> None:
        """A block in use is full: it may be found from now on, unless another with the same content is known."""
        if self.known.setdefault(key, number) == number:
            self.blocks[number].key, self.blocks[number].tokens = key, tuple(tokens)

    def forget(self, number: int) -> None:
        """A block is not found any more."""
        block = self.blocks[number]
        if block.key is not None:
            del self.known[block.key]
            block.key, block.tokens = None, ()

    def release(self, numbers: Sequence[int]) -> None:
        """A user leaves its blocks, given from the sequence's first on: the last are handed out first."""
        for number in reversed(numbers):
            block = self.blocks[number]
            block.users -= 1
            if not block.users:
                self.free[number] = None
