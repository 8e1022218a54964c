"""How often a draft of the MTP modules is what the main model predicts: the report's acceptance rate (section 5.4.3).

Held-out text stands in for generated text. At every position the main model reads the tokens up to it and predicts the next
one; MTP module k starts from the hidden state k positions before, and reads the true tokens in between. Draft k is accepted
where it and all shallower drafts of the same pass are what the main model would predict at temperature 0.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.evaluation.bits_per_byte import batches, windows_of
from dsv3.evaluation.mode import evaluating
from dsv3.model.block import Pass
from dsv3.model.micro_batch import default_positions
from dsv3.model.rope import rotations
from dsv3.model.transformer import DeepSeekV3
from dsv3.ops.cross_entropy import IGNORE


@torch.inference_mode()
def acceptance(
    model: DeepSeekV3, tokenizer: Tokenizer, texts: Sequence[str], *, sequence_length: int, batch_rows: int
) -> list[float]:
    """The share of positions where drafts 1 to k are accepted, for each depth k; windows are those of bits per byte.

    Raises `UserError` for a model without MTP modules, and for texts too short for a draft.
    """
    depth = len(model.mtp)
    if not depth:
        raise UserError("the model has no MTP modules (num_nextn_predict_layers = 0): leave mtp out of the tasks")
    windows = [each for each in windows_of(texts, tokenizer, sequence_length) if len(each) > depth + 1]
    if not windows:
        raise UserError(f"MTP acceptance: none of {len(texts)} texts has {depth + 1} tokens")
    with evaluating(model) as device:
        accepted, drafted = torch.zeros(depth, dtype=torch.int64, device=device), 0
        for inputs, targets in batches(windows, batch_rows, device):
            real = targets[:, depth:] != IGNORE
            accepted += (accepted_drafts(model, inputs) & real).sum((1, 2))
            drafted += int(real.sum())
    return [int(count) / drafted for count in accepted]


def accepted_drafts(model: DeepSeekV3, tokens_BT: torch.Tensor) -> torch.Tensor:
    """bool [D, B, T - D]: whether drafts 1 to k, made where each position's hidden state is known, are accepted."""
    rope, length, depth = rotations(model.config, default_positions(tokens_BT)), tokens_BT.shape[1], len(model.mtp)
    shared = Pass(rope)
    output = model.run(tokens_BT, shared)
    predicted, hidden = output.logits.argmax(-1), output.hidden
    found: list[torch.Tensor] = []
    for module in model.mtp:
        k = module.depth + 1
        part = replace(shared, rope=rope[:, : length - k])
        hidden, _ = module(hidden[:, : length - k], model.embed(tokens_BT[:, k:]), part)
        same = (model.head(hidden).argmax(-1) == predicted[:, k:])[:, : length - depth]
        found.append(same & found[-1] if found else same)
    return torch.stack(found)
