"""How `dsv3 info checkpoint` shows what it found: for people, and for programs."""

from typing import Any

import click

from dsv3.cli.ui import print_table
from dsv3.weights.describe import Description, Share

SHOWN = 3
"""Names of a long list that are printed."""
LISTED = 20
"""Names of a long list in JSON."""


def print_description(found: Description) -> None:
    """A line about the network, a table of what is stored, and a line for whatever is wrong."""
    config, say, files = found.config, click.echo, len(found.files)
    say(f"{found.path}: {found.layout}, {files} file{'s' * (files != 1)}, {found.file_bytes:,} bytes")
    say(
        f"{config.num_hidden_layers} layers ({config.num_dense_layers} dense), {config.n_shared_experts} + "
        f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token, "
        f"MTP depth {config.num_nextn_predict_layers}, vocabulary {config.vocab_size:,}, "
        f"context {config.max_position_embeddings:,}"
    )
    sections = [[[name, *(f"{value:,}" for value in share)] for name, share in part.items()] for part in rows(found)]
    print_table(["", "tensors", "parameters", "bytes"], sections)
    say(f"quantised: {quantization_line(found)}")
    say(f"tokenizer: {'there' if found.tokenizer else 'none'}")
    for title, names in listed(found).items():
        if names:
            more = ", ..." if len(names) > SHOWN else ""
            say(f"{title}: {len(names):,} ({', '.join(names[:SHOWN])}{more})")
    for problem in found.problems[:SHOWN]:
        say(f"problem: {problem}")
    if len(found.problems) > SHOWN:
        say(f"problems in all: {len(found.problems):,}")


def rows(found: Description) -> list[dict[str, Share]]:
    """The table, section by section."""
    parts = {"main model": found.main, **({"MTP modules": found.mtp} if found.mtp.tensors else {})}
    return [
        parts,
        found.dtypes,
        {"all": found.total},
        {f"beside: {name}": each for name, each in found.beside.items()},
    ]


def listed(found: Description) -> dict[str, list[str]]:
    """Tensors that are not as the config wants them."""
    fit = found.fit
    return {"missing": fit.missing, "unexpected": fit.unexpected, "of another kind": list(fit.misfits.values())}


def quantization_line(found: Description) -> str:
    """Format, blocks and scales."""
    how = found.quantization
    if how is None:
        return "no"
    block = f"blocks of {' x '.join(map(str, how['block']))}" if isinstance(how["block"], list) else "blocks not stated"
    powers = how["scale_format"] == "ue8m0"
    scales = "scales are powers of two (ue8m0)" if powers else f"scales in {how['scale_format']}"
    return f"{how['tensors']:,} tensors, {how['method'] or 'method not stated'} {how['format']}, {block}, {scales}"


def values(found: Description) -> dict[str, Any]:
    """Everything printed, as numbers; of long lists the count and the first names."""
    config = found.config
    return {
        "path": str(found.path),
        "layout": found.layout,
        "architecture": {
            "layers": config.num_hidden_layers,
            "dense_layers": config.num_dense_layers,
            "routed_experts": config.n_routed_experts,
            "shared_experts": config.n_shared_experts,
            "experts_per_token": config.num_experts_per_tok,
            "mtp_depth": config.num_nextn_predict_layers,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "context": config.max_position_embeddings,
        },
        **{name: getattr(found, name)._asdict() for name in ("total", "main", "mtp")},
        **{
            part: {name: each._asdict() for name, each in getattr(found, part).items()} for part in ("dtypes", "beside")
        },
        "quantization": found.quantization,
        "files": {"count": len(found.files), "bytes": found.file_bytes},
        "tokenizer": found.tokenizer,
        **{
            title.replace("of another kind", "misfits"): {"count": len(names), "first": names[:LISTED]}
            for title, names in {**listed(found), "problems": found.problems}.items()
        },
    }
