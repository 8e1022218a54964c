"""How many parameters a network has, by arithmetic on its config: the sums of the matrices of the report, section 2.

Exact: for the `deepseek-v3` preset they reproduce the published checkpoint to the last parameter. An expert's correction
bias counts as a parameter, as it does in that checkpoint.
"""

from dataclasses import dataclass

from dsv3.model.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one network. `*_active` counts what one token passes through: its chosen experts alone."""

    attention: int
    """MLA of one block, with the norms of its two latents."""
    expert: int
    """One routed expert."""
    gate: int
    """The router of one block: a row an expert, and the biases."""
    dense_block: int
    """A block with a dense feed-forward, its two norms included."""
    moe_block: int
    """A block with experts, its two norms included."""
    moe_block_active: int
    embedding: int
    """The input embedding; the output head has as many."""
    mtp_module: int
    """One MTP module without the embedding and head it shares: block, `eh_proj`, three norms."""
    mtp_module_active: int
    main: int
    """The whole network without MTP, once with embedding and head."""
    active: int
    """Of `main`, what one token uses: all but the experts not chosen, with embedding and head."""
    mtp: int
    """All MTP modules."""
    mtp_active: int

    @property
    def active_with_head(self) -> int:
        """`active` without the embedding, of which a token reads one row: the count that FLOPs follow."""
        return self.active - self.embedding

    @property
    def active_in_blocks(self) -> int:
        """`active` without embedding and head."""
        return self.active - 2 * self.embedding

    @property
    def trained(self) -> int:
        """Main network and MTP modules, which share embedding and head."""
        return self.main + self.mtp


def count_parameters(config: ModelConfig) -> Parameters:
    """The counts for `config`."""
    hidden, dense_layers = config.hidden_size, config.num_dense_layers
    moe_layers = config.num_hidden_layers - dense_layers
    attention = attention_parameters(config)
    expert = 3 * hidden * config.moe_intermediate_size
    shared = config.n_shared_experts * expert
    gate = config.n_routed_experts * (hidden + 1)
    around = attention + 2 * hidden
    dense_block = around + 3 * hidden * config.intermediate_size
    moe_block = around + gate + shared + config.n_routed_experts * expert
    moe_block_active = around + gate + shared + config.num_experts_per_tok * expert
    embedding = config.vocab_size * hidden
    outside = 2 * embedding + hidden
    joint = 2 * hidden * hidden + 3 * hidden
    depth = config.num_nextn_predict_layers
    return Parameters(
        attention=attention,
        expert=expert,
        gate=gate,
        dense_block=dense_block,
        moe_block=moe_block,
        moe_block_active=moe_block_active,
        embedding=embedding,
        mtp_module=moe_block + joint,
        mtp_module_active=moe_block_active + joint,
        main=dense_layers * dense_block + moe_layers * moe_block + outside,
        active=dense_layers * dense_block + moe_layers * moe_block_active + outside,
        mtp=depth * (moe_block + joint),
        mtp_active=depth * (moe_block_active + joint),
    )


def attention_parameters(config: ModelConfig) -> int:
    """MLA of one block (equations 1 to 11) with the norms of its latents."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    queries = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query = hidden * queries
    else:
        query = hidden * config.q_lora_rank + config.q_lora_rank + config.q_lora_rank * queries
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    expansion = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    output = heads * config.v_head_dim * hidden
    return query + latent + expansion + output


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token keeps in the cache of the main network: a latent and a rotated key a layer, in BF16."""
    return 2 * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
