"""Bits per byte: how well a model predicts text, whatever its tokenizer.

Context rule: a document is its tokens behind one `bos`, cut into windows of `sequence_length` inputs that do not
overlap. Every token but `bos` is predicted exactly once, from what precedes it in its window; the first prediction of a
later window sees one token alone, the last target of the window before. Documents never see each other, and nothing is
predicted after a document's last token.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.mode import evaluating
from dsv3.ops.cross_entropy import IGNORE


@torch.inference_mode()
def bits_per_byte(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], *, sequence_length: int, batch_rows: int
) -> float:
    """The negative log2-likelihood of all `texts` together over their length in UTF-8; each is a document.

    `batch_rows` windows are read at a time. `model(tokens)` with tokens int64 `[B, T]` has `.logits` `[B, T, vocab]` and is
    causal, so that padding at the end of a row changes nothing. It runs in evaluation mode and is put back into its mode
    after. Log-likelihoods are taken in float32, whatever the logits' dtype, and summed in float64. Raises `UserError` when
    there is no byte to score.
    """
    bytes_ = sum(len(text.encode()) for text in texts)
    if bytes_ == 0:
        raise UserError(
            f"bits per byte of {len(texts)} texts without a byte: expected at least one character of held-out text"
        )
    windows = windows_of(texts, tokenizer, sequence_length)
    nats = 0.0
    with evaluating(model) as device:
        for inputs, targets in batches(windows, batch_rows, device):
            logits = model(inputs).logits.flatten(0, 1).float()
            losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
            nats += losses.double().sum().item()
    return nats / math.log(2) / bytes_


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[Sequence[int]]:
    """Those of all texts, the longest first: windows of like length share a batch, so that little of it is padding."""
    windows = [window for text in texts for window in cut([tokenizer.bos_id, *tokenizer.encode(text)], sequence_length)]
    return sorted(windows, key=len, reverse=True)


def cut(tokens: Sequence[int], sequence_length: int) -> list[Sequence[int]]:
    """Windows of up to `sequence_length + 1` tokens; each starts with the last token of the one before."""
    return [tokens[first : first + sequence_length + 1] for first in range(0, len(tokens) - 1, sequence_length)]


def batches(
    windows: Sequence[Sequence[int]], rows: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The windows in order, so many at a time, as `pad` makes them."""
    for first in range(0, len(windows), rows):
        inputs, targets = pad(windows[first : first + rows])
        yield inputs.to(device), targets.to(device)


def pad(windows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[B, T]`: windows without their last token, padded with 0; without their first, with `IGNORE`."""
    width = max(map(len, windows)) - 1
    inputs = torch.zeros(len(windows), width, dtype=torch.int64)
    targets = torch.full((len(windows), width), IGNORE)
    for row, window in enumerate(windows):
        inputs[row, : len(window) - 1] = torch.tensor(window[:-1])
        targets[row, : len(window) - 1] = torch.tensor(window[1:])
    return inputs, targets
