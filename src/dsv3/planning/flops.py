"""How many floating-point operations training takes, by the accounting behind DeepSeek's own figures.

Six operations a parameter and token (two forward, four backward) for everything in a matrix product: all that a token
activates but the embedding. Six more for each query-key and attention-value product. Recomputation counts nothing.
With the published throughput this gives the published utilisation to within 0.3% ("Insights into DeepSeek-V3",
arXiv 2505.09343: 43.73% and 38.94%).
"""

from collections.abc import Sequence

from dsv3.model.config import ModelConfig
from dsv3.planning.parameters import count_parameters


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, *, causal: bool = True, mtp: bool = False
) -> float:
    """FLOPs to train on one token of sequences of `sequence_length` tokens.

    `causal` counts the half of the attention matrix that is used, otherwise all of it. The published figures leave the
    MTP modules out; `mtp` adds them, with the pass of each through the shared head.
    """
    counted = count_parameters(config)
    parameters, layers = counted.active_with_head, config.num_hidden_layers
    if mtp:
        parameters += counted.mtp_active + config.num_nextn_predict_layers * counted.embedding
        layers += config.num_nextn_predict_layers
    pairs = sequence_length / 2 if causal else sequence_length
    products = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * (parameters + layers * products * pairs)


def block_flops(config: ModelConfig, blocks: Sequence[str], head: bool, length: int) -> float:
    """FLOPs a token, forward and backward, of blocks by their names, attention's causal half and MTP's heads included; with the
    main model's `head`, those of a last stage."""
    counted = count_parameters(config)
    attention = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * length / 2
    total = float(counted.embedding if head else 0)
    for name in blocks:
        mtp = counted.mtp_module_active + counted.embedding if name.startswith("mtp.") else counted.moe_block_active
        total += (counted.dense_block if is_dense(config, name) else mtp) + attention
    return 6 * total


def is_dense(config: ModelConfig, block: str) -> bool:
    """Whether a block, by its name, is one of the main model's without experts."""
    return block.isdigit() and int(block) < config.num_dense_layers
