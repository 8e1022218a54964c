"""What DeepSeek's `inference/convert.py` makes of released tensors, written from its description."""

import re

from safetensors.torch import save_file

BY_ROWS = ("embed_tokens", "q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head")
BY_COLUMNS = ("o_proj", "down_proj")
THEIRS = {
    "embed_tokens": "embed", "lm_head": "head", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
    "up_proj": "w3", "self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias",
}  # fmt: skip


def split(released, directory, ranks, experts, mtp):
    """Writes the files of `--model-parallel {ranks}` into a new directory; tensors whose names begin with `mtp` are left out."""
    directory.mkdir()
    files = [{} for _ in range(ranks)]
    for name, tensor in released.items():
        if name.startswith(mtp):
            continue
        parts = name.removeprefix("model.").split(".")
        theirs, module = ".".join(THEIRS.get(part, part) for part in parts), parts[-2]
        expert = re.search(r"\.experts\.(\d+)\.", name)
        for rank, held in enumerate(files):
            if expert:
                if int(expert[1]) // (experts // ranks) == rank:
                    held[theirs] = tensor
            elif module in BY_ROWS:
                held[theirs] = tensor.chunk(ranks, 0)[rank].contiguous()
            elif module in BY_COLUMNS:
                held[theirs] = tensor.chunk(ranks, 1)[rank].contiguous()
            else:
                held[theirs] = tensor
    for rank, held in enumerate(files):
        save_file(held, directory / f"model{rank}-mp{ranks}.safetensors")
    return directory
