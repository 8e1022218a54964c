"""The tokenizer's ids, several times faster: the pre-tokenizer as one regular expression, and every word encoded once.

Nearly all of `tokenizers`' time goes into the three splits of DeepSeek-V3's pre-tokenizer. Here Python's `re` makes the
same words in one pass, a table numbers them, `tokenizers` merges the bytes of new ones, and NumPy turns the numbers of
a batch into ids at once.
That is done for characters whose class has been the same since Unicode 3.2, and so is the same in every library.
Lines with any other character (emoji, control characters) go to `tokenizers` whole: no word reaches past a line break
that a visible character follows.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count, islice, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from dsv3.data.tokenizer import HAN_AND_KANA, Tokenizer, pre_tokenizer

TABLE_CHARACTERS = 1 << 24
"""Of words whose ids are kept, with 64 counted for the rest of an entry: some 50 MB. Past that the table starts again."""


class Patterns(NamedTuple):
    """Regular expressions over the characters whose class never changed."""

    words: re.Pattern[str]
    """Finds the words of a text of such characters one after another, with nothing between them."""
    other: re.Pattern[str]
    """A character that is none of them."""
    cut: re.Pattern[str]
    """A line break behind which a text may be cut."""


class WordEncoder:
    """`encode_batch` as `Tokenizer.encode_batch` without special tokens, id for id.

    `fast` says whether the tokenizer has DeepSeek-V3's pre-tokenizer, and no normalizer; any other does all the work itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        plain = tokenizer.plain
        found = one_form(plain.normalizer, plain.pre_tokenizer)
        self._merges = tokenizers.Tokenizer(plain.model)
        self._merges.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        digits = next((most for most in (1, 2, 3) if found == one_form(None, pre_tokenizer(most))), None)
        self.fast = digits is not None
        self._tokenizer = tokenizer
        self._patterns = patterns(digits or 1)
        self._start_again()

    def _start_again(self) -> None:
        self._room = TABLE_CHARACTERS
        # The number of each unit, a word or a line that is encoded whole: the next free one for a new unit.
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)
        # The ids of all units in that order, and where each begins, with the end of the last.
        self._ids, self._starts = np.empty(0, dtype=np.uint32), np.zeros(1, dtype=np.intp)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """The token ids of each text, uint32; `UserError` for a string that has no UTF-8 form (lone surrogates)."""
        if not self.fast:
            return [np.array(ids, dtype=np.uint32) for ids in self._tokenizer.encode_batch(texts)]
        parts = [list(parts_of(text, self._patterns)) for text in texts]
        self._learn_lines({part for each in parts for known, part in each if not known})
        words, number = self._patterns.words.findall, self._numbers.__getitem__
        # Word by word through C alone, and a text's words at a time, while its strings are in the processor's cache.
        units = [
            np.fromiter(
                map(number, chain.from_iterable(words(part) if known else [part] for known, part in each)), np.intp
            )
            for each in parts
        ]
        self._learn_words()
        ids, ends = self._gather(np.concatenate([np.empty(0, dtype=np.intp), *units]))
        cuts = ends[np.cumsum([0, *map(len, units)])].tolist()
        if self._room < 0:
            self._start_again()
        return [ids[start:end] for start, end in pairwise(cuts)]

    def _learn_lines(self, lines: set[str]) -> None:
        new = list(lines.difference(self._numbers))
        found = self._tokenizer.encode_batch(new)
        for line in new:
            self._numbers[line]
        self._append(new, chain.from_iterable(found), map(len, found))

    def _learn_words(self) -> None:
        new = list(islice(self._numbers, len(self._starts) - 1, None))
        found = self._merges.encode(new, is_pretokenized=True, add_special_tokens=False)
        self._append(new, found.ids, np.bincount(np.array(found.word_ids, dtype=np.intp), minlength=len(new)))

    def _append(self, units: list[str], ids: Iterable[int], counts: Iterable[int]) -> None:
        """Adds the last units of the table: their ids one after another, and how many each has."""
        self._room -= sum(map(len, units)) + 64 * len(units)
        ends = self._starts[-1] + np.cumsum(np.fromiter(counts, np.intp))
        self._ids = np.concatenate([self._ids, np.fromiter(ids, np.uint32)])
        self._starts = np.concatenate([self._starts, ends])

    def _gather(self, units: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.intp]]:
        """The ids of these units one after another; for any number of the first units, how many ids they have."""
        first, counts = self._starts[units], np.diff(self._starts)[units]
        ends = np.concatenate([[0], np.cumsum(counts)])
        return self._ids[np.repeat(first - ends[:-1], counts) + np.arange(ends[-1])], ends


def parts_of(text: str, patterns: Patterns) -> Iterator[tuple[bool, str]]:
    """The text in pieces: (whether all characters are known, piece), cut behind line breaks."""
    start = 0
    while (other := patterns.other.search(text, start)) is not None:
        line = text.rfind("\n", start, other.start())
        while line >= 0 and not patterns.cut.match(text, line):
            line = text.rfind("\n", start, line)
        if line >= 0:
            yield True, text[start : line + 1]
            start = line + 1
        cut = patterns.cut.search(text, other.end())
        end = len(text) if cut is None else cut.end()
        yield False, text[start:end]
        start = end
    yield True, text[start:]


@cache
def patterns(digits: int) -> Patterns:
    """The three splits one inside the other, for at most `digits` digits a token.

    A split sees the pieces of the one before it: digits and Han are in no other class here, and end a run of white space
    as the end of the text does. Of two branches that may start alike, the order is that of `WORDS`. Where what follows is in
    another class, no repetition (`++`) has to be ready to give characters back.
    """
    kinds = unchanged_classes()
    han = set(re.findall(HAN_AND_KANA.removesuffix("+"), "".join(kinds.values())))
    rest = {kind: ranges(set(found) - han) for kind, found in kinds.items()}
    letters, marks, numbers, visible, spaces = rest["L"], rest["M"], rest["N"], rest["P"] + rest["S"], rest["Z"]
    words = (
        rf"[{spaces}\t]?+[{letters}{marks}]++"
        r"|[!-/:-@\[-`{-~][A-Za-z]++"
        rf"| ?+[{visible}]++[\r\n]*+"
        rf"|[{numbers}]{{1,{digits}}}+|[{ranges(han)}]++"
        rf"|\s*[\r\n]++|\s+(?![{letters}{marks}{visible}])|\s++"
    )
    shown = letters + numbers + visible + ranges(han)
    return Patterns(re.compile(words), re.compile(rf"[^\t\r\n{shown}{marks}{spaces}]"), re.compile(rf"\n(?=[{shown}])"))


def unchanged_classes() -> dict[str, str]:
    """Letters, marks, numbers, punctuation, symbols and spaces below U+10000 that have been that since Unicode 3.2."""
    old = unicodedata.ucd_3_2_0
    kinds = dict.fromkeys("LMNPSZ", "")
    for character in map(chr, range(0x10000)):
        kind, before = unicodedata.category(character), old.category(character)
        if kind[0] == before[0] and (kind[0] in "LMNPS" or kind == before == "Zs"):
            kinds[kind[0]] += character
    return kinds


def ranges(characters: set[str]) -> str:
    """The inside of a character class."""
    found: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in found)


def one_form(normalizer: normalizers.Normalizer | None, words: pre_tokenizers.PreTokenizer | None) -> str:
    """Both as JSON, with line breaks in the patterns written one way: the released file holds the characters themselves."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.normalizer, whole.pre_tokenizer = normalizer, words
    found = json.loads(whole.to_str())
    nothing = found["normalizer"] in (None, {"type": "Sequence", "normalizers": []})
    steps = json.dumps([None if nothing else found["normalizer"], found["pre_tokenizer"]], sort_keys=True)
    return steps.replace(r"\\r", r"\r").replace(r"\\n", r"\n")
