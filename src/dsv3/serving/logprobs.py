"""Logprobs in OpenAI's two forms."""

from collections.abc import Sequence
from typing import Any

from dsv3.data.tokenizer import Tokenizer
from dsv3.inference.plan import TokenLogprobs

Json = dict[str, Any]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text; a part of a character as `bytes:\xe4\xb8`."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> Json:
    """For a chat completion: a list with each token, its bytes and its likeliest alternatives."""

    def entry(token: int, logprob: float) -> Json:
        return {
            "token": token_text(tokenizer, token),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return {
        "content": [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*pair) for pair in each.top.items()]}
            for each in tokens
        ]
    }


class CompletionLogprobs:
    """For a completion: parallel lists. Offsets count the characters of the returned text before a token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._offset = 0

    def shape(self, tokens: Sequence[TokenLogprobs | None], first: int | None = None) -> Json:
        """The lists for the next tokens; a prompt's first token has no logprob: it is None, and `first` its id."""
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in tokens:
            token = each.token_id if each is not None else first
            assert token is not None, "only a prompt's first token has no logprob"
            out["tokens"].append(token_text(self._tokenizer, token))
            out["text_offset"].append(self._offset)
            out["token_logprobs"].append(finite(each.logprob) if each is not None else None)
            out["top_logprobs"].append(self._top(each) if each is not None else None)
            if token != self._tokenizer.bos_id:
                self._offset += len(self._stream.push(token))
        return out

    def _top(self, each: TokenLogprobs) -> Json:
        top = {**each.top, each.token_id: each.logprob}
        return {token_text(self._tokenizer, token): finite(logprob) for token, logprob in top.items()}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is impossible."""
    return max(logprob, -9999.0)
