"""Who holds what in a parallel layout: the table at the start of a job, by arithmetic on its recipe."""

from dataclasses import dataclass

from dsv3.planning.parameters import count_parameters
from dsv3.recipe.schema import Recipe


@dataclass(frozen=True)
class Holding:
    """What some ranks of a job of one pipeline stage hold, each."""

    ranks: range
    layers: str
    experts: range
    """Of every MoE block."""
    parameters: int
    weights: int
    """Bytes in FP32."""
    gradients: int
    """Bytes in FP32."""
    moments: int
    """Bytes of Adam's two moments of this rank's share, to within a row a parameter; with Muon those of all that it holds, at most."""


def holdings(recipe: Recipe) -> list[Holding]:
    """Those with the same experts together; the correction biases of the router, which are no parameters, are left out."""
    config, parallel = recipe.model.config(), recipe.parallel
    counts, each = count_parameters(config), config.n_routed_experts // recipe.parallel.expert
    blocks = config.num_hidden_layers - config.num_dense_layers + config.num_nextn_predict_layers
    experts = blocks * each * counts.expert
    rest = counts.trained - blocks * config.n_routed_experts * (counts.expert + 1)
    size = 2 * (2 if recipe.optimizer.moments == "bf16" else 4)
    shares = experts * parallel.expert // parallel.data + rest // parallel.data
    updated = shares if recipe.optimizer.kind == "adamw" else experts + rest
    depth = config.num_nextn_predict_layers
    layers = f"0-{config.num_hidden_layers - 1}" + (f" and {depth} MTP" if depth else "")
    held = experts + rest
    return [
        Holding(
            range(rank, parallel.data, parallel.expert), layers, range(rank * each, (rank + 1) * each),
            held, 4 * held, 4 * held, size * updated,
        )
        for rank in range(parallel.expert)
    ]  # fmt: skip
