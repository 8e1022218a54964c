"""The tokenizer: byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens (report, section 4.1).

The BPE itself is Hugging Face `tokenizers`; `transformers.AutoTokenizer` loads what `Tokenizer.save` writes and gives the
same ids.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsv3.errors import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK_BEGIN, THINK_END = "<think>", "</think>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"
USER, ASSISTANT, END_OF_TURN = "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"
TOOLS = (
    CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, OUTPUTS_BEGIN, OUTPUTS_END, OUTPUT_BEGIN, OUTPUT_END, TOOL_SEPARATOR
) = tuple(
    f"<｜tool▁{name}｜>"
    for name in (
        "calls▁begin", "calls▁end", "call▁begin", "call▁end", "outputs▁begin", "outputs▁end", "output▁begin",
        "output▁end", "sep",
    )
)  # fmt: skip

FIRST = (BOS, EOS, PAD)
"""Ids 0, 1, 2, as in the released tokenizer."""
LAST = (THINK_BEGIN, THINK_END, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, END_OF_TURN, *TOOLS)
"""The last ids of the vocabulary, in the released tokenizer's order (there 128798 to 128814)."""
SMALLEST = 256 + len(FIRST) + len(LAST)
"""Ids that every vocabulary holds: the bytes and the special tokens."""

HAN_AND_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The third split of the released tokenizer; its third branch makes the tokens that join punctuation with line breaks."""

LONG_RUN = re.compile(r"\S{256}|\s{256}")

CHAT_TEMPLATE = (
    "{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}"
    "{{ bos_token }}{{ system | join('\n\n') }}"
    "{%- for message in messages -%}"
    "{%- set answers = loop.previtem is defined and loop.previtem.role == 'tool' -%}"
    "{%- if message.role == 'user' -%}{{ '<｜User｜>' + message.content }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ '' if answers else '<｜Assistant｜>' }}{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}"
    "{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}"
    "{{ '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}"
    "{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}"
    "{%- endfor -%}{{ eos_token }}"
    "{%- elif message.role == 'tool' -%}"
    "{{ '' if answers else '<｜tool▁outputs▁begin｜>' }}"
    "{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}"
    "{{ '' if loop.nextitem is defined and loop.nextitem.role == 'tool' else '<｜tool▁outputs▁end｜>' }}"
    "{%- elif message.role != 'system' -%}{{ raise_exception('unknown role ' + message.role) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
)


def special(token: str) -> property:
    """The id of a special token, as a property; see `Tokenizer.id`."""
    return property(lambda tokenizer: tokenizer.id(token))


class Tokenizer:
    """Text <-> token ids. `json` is the content of a `tokenizer.json` whose model is byte-level BPE."""

    def __init__(self, text: str) -> None:
        self.json = text
        self._marked = tokenizers.Tokenizer.from_str(text)
        without = {**json.loads(text), "added_tokens": [], "post_processor": None}
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(without))
        """The same BPE with no token that is matched as a whole, as `tokenizers` has it."""

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads `directory/tokenizer.json`; `UserError` when it is missing or is not a tokenizer."""
        path = Path(directory) / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
            kind = json.loads(text)["model"]["type"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} does not exist; expected a directory written by `dsv3 tokenizer train`") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no tokenizer; expected the JSON of Hugging Face tokenizers") from None
        if kind != "BPE":
            raise UserError(f"{path} holds a {kind} tokenizer; expected byte-level BPE")
        return cls(text)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` (special tokens, chat template), creating the directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "chat_template": CHAT_TEMPLATE,
        }
        (directory / "tokenizer.json").write_text(self.json, encoding="utf-8", newline="\n")
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")

    @cached_property
    def hash(self) -> str:
        """sha256 of `tokenizer.json`, in hexadecimal: what shards and checkpoints are bound to."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self._marked.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts of all tokens that are matched as a whole."""
        return [token.content for token in self._marked.get_added_tokens_decoder().values()]

    def id(self, token: str) -> int:
        """The id of one special token, given as its text; `UserError` when the vocabulary lacks it."""
        found = self._marked.token_to_id(token)
        if found is None:
            raise UserError(f"this tokenizer has no token {token!r}; expected one with DeepSeek-V3's special tokens")
        return int(found)

    bos_id = special(BOS)
    """Starts every document."""
    eos_id = special(EOS)
    """Ends every document and every answer."""
    pad_id = special(PAD)
    """Fills rows; never a target."""
    fim_begin_id = special(FIM_BEGIN)
    """Comes before the prefix of a fill-in-the-middle document."""
    fim_hole_id = special(FIM_HOLE)
    """Stands for the missing middle, between prefix and suffix."""
    fim_end_id = special(FIM_END)
    """Comes after the suffix; the middle follows."""

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens left out of text for readers; markup of reasoning and tools is not among them."""
        return frozenset(i for i, token in self._marked.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Token ids of `text`, no bos and no eos added.

        The text of a special token becomes its id only with `specials`. Otherwise it is plain text, so that no document or
        message can end a turn or open a tool call.
        Raises `UserError` for a string that has no UTF-8 form (lone surrogates).
        """
        return self.encode_batch([text], specials=specials)[0]

    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        backend = self._marked if specials else self.plain
        try:
            return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"a text to tokenize has no UTF-8 form: {error}") from None
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens written out, invalid UTF-8 as U+FFFD, ids outside the vocabulary as nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes one id stands for: a part of a UTF-8 character is possible."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def stream(self) -> "TextStream":
        """A fresh incremental detokeniser."""
        return TextStream(self)

    @cached_property
    def _bytes(self) -> list[bytes]:
        tokens = (self._marked.id_to_token(i) for i in range(self.vocab_size))
        return [b"" if token is None else bytes_of(token) for token in tokens]


class TextStream:
    """Ids in, text out, as early as possible but never a part of a character.

    The concatenation of everything `push` and `flush` return is `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes: often its text, empty inside a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, digits: int = 3) -> Tokenizer:
    """Trains byte-level BPE; the same texts in the same order give the same file.

    `vocab_size` counts all ids: 256 bytes, 3 + 17 special tokens, merges; where the texts yield too few merges,
    placeholders fill it up, as in the released vocabulary. `digits` (1 to 3) is the most digits that one token joins:
    3 is DeepSeek-V3's, 1 gives each digit a token. Raises `UserError` below 256 + special tokens. Memory grows with the
    different words in `texts`; bound the bytes of text (`sources.sample`) where they may be many.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"vocab_size = {vocab_size}: expected at least {SMALLEST}, "
            f"256 bytes and {SMALLEST - 256} special tokens; a useful vocabulary starts at about 1000"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(digits)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        cut_long_runs(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(LAST),
            special_tokens=list(FIRST),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    missing = vocab_size - len(LAST) - backend.get_vocab_size()
    placeholders = [AddedToken(f"<｜place▁holder▁no▁{i}｜>", special=True, normalized=False) for i in range(missing)]
    # The released flags: markup stays visible where special tokens are left out of the text, and servers parse it.
    markup = [AddedToken(t, special=t == END_OF_TURN, normalized=False) for t in LAST]
    backend.add_tokens([*placeholders, *markup])
    # Hugging Face callers get the bos that the released tokenizer adds; `Tokenizer.encode` adds none.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return Tokenizer(backend.to_str(pretty=True))


def cut_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside every run of `LONG_RUN`: the trainer's time is quadratic in the length of a word."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def pre_tokenizer(digits: int) -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's, for at most `digits` digits a token."""
    splits = [rf"\p{{N}}{{1,{digits}}}", HAN_AND_KANA, WORDS]
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(b): b for b in PRINTABLE} | {chr(0x100 + k): b for k, b in enumerate(OTHERS)}
"""The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, others from U+0100."""


def bytes_of(token: str) -> bytes:
    """The bytes of one vocabulary entry; an entry that is not byte-level (special tokens) stands for its own text."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:
        return token.encode()
