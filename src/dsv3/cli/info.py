"""`dsv3 info`: what a model is, what a directory of weights holds, and which implementations serve on this machine."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from dsv3.cli.options import PATH, device_option, json_option
from dsv3.cli.ui import print_table
from dsv3.errors import UserError, nearest
from dsv3.model.config import PRESETS, ModelConfig
from dsv3.planning.flops import training_flops_per_token
from dsv3.planning.parameters import count_parameters, kv_bytes_per_token

Row = tuple[str, ...]
"""A name, our figure, and what DeepSeek prints for DeepSeek-V3, with where."""


@click.group()
def info() -> None:
    """What a model is, what a directory of weights holds, what this machine will use."""


@info.command()
@click.argument("model", metavar="PRESET|DIR")
@json_option
def model(model: str, as_json: bool) -> None:
    """Parameters, cache and training FLOPs of a preset, or of a directory that holds a config.json."""
    config = find_config(model)
    if as_json:
        click.echo(json.dumps(model_figures(config), indent=2))
        return
    known = count_parameters(config) == count_parameters(ModelConfig.preset("deepseek-v3"))
    click.echo(
        f"{model}: {config.num_hidden_layers} layers, {config.n_shared_experts} + {config.n_routed_experts} experts, "
        f"{training_length(config)} tokens a training sequence"
    )
    head = ["", "dsv3", "DeepSeek says"] if known else ["", "dsv3"]
    print_table(head, [[row[: len(head)] for row in section] for section in rows(config)], left=(0, 2))
    if config.num_nextn_predict_layers:
        click.echo("Embedding and head are shared; the published files repeat them under every MTP module.")


@info.command()
@click.argument("path", metavar="DIR", type=PATH)
@json_option
def checkpoint(path: Path, as_json: bool) -> None:
    """What a directory of weights holds, and what it lacks; no tensor is read.

    DIR is a Hugging Face directory, a training checkpoint or a run, or a directory in the layout of DeepSeek's inference/.
    """
    from dsv3.cli.checkpoint_table import print_description, values
    from dsv3.weights.describe import describe

    found = describe(path)
    if as_json:
        click.echo(json.dumps(values(found), indent=2))
    else:
        print_description(found)


@info.command()
@device_option
@json_option
def ops(device: str, as_json: bool) -> None:
    """Which implementation of every operation serves on this machine, and why those before it do not.

    DSV3_OPS="grouped_gemm_fp8=reference,..." in the environment forces others.
    """
    from dsv3.bench.examples import calls
    from dsv3.model.device import pick_device
    from dsv3.training.device import device_name

    where = pick_device(device)
    found = {operation.name: operation.explain(*arguments) for operation, arguments in calls(where)}
    if as_json:
        click.echo(
            json.dumps({"device": device_name(where), "operations": {k: dict(v) for k, v in found.items()}}, indent=2)
        )
        return
    lines = []
    for name, implementations in found.items():
        number, serving = next((i, each) for i, (each, reason) in enumerate(implementations) if reason is None)
        before = implementations[:number] or [("", "")]
        for row, (faster, reason) in enumerate(before):
            lines.append([*((name, serving) if row == 0 else ("", "")), faster, reason or ""])
    click.echo(f"{device_name(where)}: calls in BF16 or FP8, as training makes them")
    print_table(["operation", "serves", "not", "because"], [lines], left=range(4))


def find_config(model: str) -> ModelConfig:
    """The config of a preset or a directory; `UserError` when `model` is neither."""
    if model in PRESETS:
        return ModelConfig.preset(model)
    if Path(model).exists():
        return ModelConfig.from_hf(model)
    raise UserError(f"{model!r} is neither a preset nor a directory with a config.json: {nearest(model, PRESETS)}")


def model_figures(config: ModelConfig) -> dict[str, object]:
    """Everything the table shows, as numbers; parameters by name, the cache in bytes of BF16."""
    counted, length = count_parameters(config), training_length(config)
    return {
        "parameters": {
            **asdict(counted),
            "active_with_head": counted.active_with_head,
            "active_in_blocks": counted.active_in_blocks,
            "trained": counted.trained,
        },
        "layers": {
            "dense": config.num_dense_layers,
            "moe": config.num_hidden_layers - config.num_dense_layers,
            "mtp": config.num_nextn_predict_layers,
        },
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "training_flops_per_token": {
            "sequence_length": length,
            "causal": training_flops_per_token(config, length),
            "full": training_flops_per_token(config, length, causal=False),
        },
        "config": config.to_hf(),
    }


def training_length(config: ModelConfig) -> int:
    """Tokens a sequence for the training FLOPs: the report's 4K (section 4.2), or the most the network takes."""
    return min(4096, config.max_position_embeddings)


def rows(config: ModelConfig) -> list[list[Row]]:
    """The table, section by section."""
    counted, length = count_parameters(config), training_length(config)
    dense, depth = config.num_dense_layers, config.num_nextn_predict_layers
    moe = config.num_hidden_layers - dense
    causal, full = (
        f"{training_flops_per_token(config, length, causal=causal) / 1e9:,.4g} GFLOP" for causal in (True, False)
    )
    network: list[Row] = [
        ("main model", f"{counted.main:,}", "671B (report, section 4.2)"),
        ("  active for one token", f"{counted.active:,}", "37B (report, section 4.2)"),
        ("    without the embedding", f"{counted.active_with_head:,}", "36.7B (README_WEIGHTS)"),
        ("    nor the head", f"{counted.active_in_blocks:,}"),
    ]
    beside = 2 * counted.embedding
    modules: list[Row] = [
        (f"MTP modules ({depth})", f"{counted.mtp:,}", "11.5B less eh_proj (same)"),
        ("  active with those two", f"{counted.mtp_active + beside:,}", "2.4B less eh_proj (same)"),
        ("all in the files", f"{counted.trained + depth * beside:,}", "685B with scales (README)"),
    ]
    blocks = [
        (f"dense block (x {dense})", f"{counted.dense_block:,}"),
        (f"MoE block (x {moe})", f"{counted.moe_block:,}"),
        (f"  active ({config.num_experts_per_tok} experts)", f"{counted.moe_block_active:,}"),
        ("  one expert", f"{counted.expert:,}"),
        ("  router and biases", f"{counted.gate:,}"),
        ("attention of a block", f"{counted.attention:,}"),
        ("embedding, and head", f"{counted.embedding:,}", "0.9B (README_WEIGHTS)"),
    ]
    costs = [
        ("cache a token, BF16", f"{kv_bytes_per_token(config):,} B", "70.272 KB (arXiv 2505.09343)"),
        ("training a token", causal, "250 GFLOP (arXiv 2505.09343)"),
        ("  all pairs counted", full),
    ]
    return [network, *([modules] if depth else []), blocks, costs]
