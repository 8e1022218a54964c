"""How many floating-point operations training takes, by the accounting behind DeepSeek's own figures.

Six operations a parameter and token (two forward, four backward) for everything in a matrix product: all that a token
activates but the embedding. Six more for each query-key and attention-value product. Recomputation counts nothing.
With the published throughput this gives the published utilisation to within 0.3% ("Insights into DeepSeek-V3",
arXiv 2505.09343: 43.73% and 38.94%).
"""

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
