"""Blocks of the latent cache: which are in use, and which hold a prefix that another sequence can reuse."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

Key = bytes
"""Hash of a full block's tokens and of all before them."""


def key_after(before: Key, tokens: Sequence[int]) -> Key:
    """The key of the block that follows the one with key `before`."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


def root_key(salt: str) -> Key:
    """The key before the first block: sequences with different salts share nothing."""
    return hashlib.sha256(salt.encode()).digest()


@dataclass
class Block:
    """One block; `key` and `tokens` are set for a full one that may be reused."""

    users: int = 0
    key: Key | None = None
    tokens: tuple[int, ...] = ()


class BlockPool:
    """Allocates blocks by number. A freed block keeps its content until it is handed out again, the least recently used first."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free: dict[int, None] = dict.fromkeys(range(num_blocks))
        """In the order in which they are handed out: a dict, so that any can be removed in constant time."""
        self.known: dict[Key, int] = {}

    @property
    def usage(self) -> float:
        """The share of blocks in use."""
        return 1 - len(self.free) / len(self.blocks)

    def take(self) -> int:
        """Allocates a block and forgets its content; one has to be free."""
        number = next(iter(self.free))
        del self.free[number]
        self.forget(number)
        self.blocks[number].users = 1
        return number

    def find(self, keys: Sequence[Key], tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known prefix of these tokens, each with one more user now; `keys` are the blocks' own."""
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
        """Makes a full block findable, unless another with the same content is."""
        if self.known.setdefault(key, number) == number:
            self.blocks[number].key, self.blocks[number].tokens = key, tuple(tokens)

    def forget(self, number: int) -> None:
        """Makes a block unfindable."""
        block = self.blocks[number]
        if block.key is not None:
            del self.known[block.key]
            block.key, block.tokens = None, ()

    def release(self, numbers: Sequence[int]) -> None:
        """Frees a sequence's blocks, given in its order; the last are handed out first."""
        for number in reversed(numbers):
            block = self.blocks[number]
            block.users -= 1
            if not block.users:
                self.free[number] = None
