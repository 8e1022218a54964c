import pytest

from dsv3.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 22), [3, 444])\n",
    "class Shape:\n    def __init__(self, sides):\n        self.sides = sides;\n\n    def area(self):\n        return 0.5\n",
    "It is a truth universally acknowledged, that a tokenizer must be in want of text.\nYes.\n\nNo!\r\n",
    "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。\nこんにちは、世界。\n",
    "naïve café 😀 x² ½ 日本 2024-12-27\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 20, 480)
