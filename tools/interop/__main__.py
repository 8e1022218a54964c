"""`make interop`: what we export, vLLM and transformers continue as we do.

Exits with 1 when a promise is missed: all greedy tokens equal, logprobs within 1e-4, as many MTP drafts accepted as our own
MTP module gets right.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dsv3 import LLM
from dsv3.errors import RunError
from dsv3.stages.machine import machine, versions
from tools.interop.compare import Row, compare, expected_drafts, smallest_lead
from tools.interop.network import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Continuation,
    continue_all,
    describe,
    effects,
    make_prompts,
    train_and_export,
)
from tools.interop.server import TOP, Reply, ask, check_vllm, complete, draft_counts, run, vllm

RESULT = Path("docs/results/interop.json")


@click.command()
@click.option("--vllm", "environment", type=click.Path(path_type=Path), required=True, help="vLLM's environment.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/interop"), show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT, show_default=True)
def main(environment: Path, out: Path, result: Path) -> None:
    """Trains and exports a small network, and compares what engines make of the export with what we do."""
    check_vllm(environment)
    export = train_and_export(out)
    llm = LLM(export, device="cpu")
    ours = continue_all(llm, make_prompts(llm.tokenizer))
    rows = [compare(f"transformers {version('transformers')}, one pass", ours, transformers_replies(export, ours))]
    drafts = {
        "as trained": total(expected_drafts(each.tokens, each.drafts) for each in ours),
        "as vLLM": total(expected_drafts(each.tokens, each.drafts_as_vllm) for each in ours),
    }
    engine = ""
    for speculate in (False, True):
        log = out / f"vllm{'-mtp' if speculate else ''}.log"
        click.echo(f"vLLM starts{', with MTP' if speculate else ''}; its output is in {log}", err=True)
        with vllm(environment, export, PROMPT_TOKENS[-1] + NEW_TOKENS + 16, log, speculate=speculate) as url:
            engine = f"vLLM {ask(f'{url}/version')['version']}"
            replies = complete(url, [each.prompt for each in ours], NEW_TOKENS)
            counted = draft_counts(url)
        expected = drafts["as vLLM"] if speculate else (0, 0)
        rows.append(compare(f"{engine}{', MTP' if speculate else ''}", ours, replies, counted, expected))
    lead, moved = smallest_lead(ours), effects(llm.model, ours[-1])
    content: dict[str, Any] = {
        "command": "make interop",
        "machine": machine(torch.device("cpu")),
        "versions": {**versions(), "vllm": engine.removeprefix("vLLM ")},
        "shapes": describe(llm.model),
        "rows": [asdict(row) for row in rows],
        "smallest lead of a greedy token": lead,
        "drafts (drafted, accepted)": drafts,
        "largest logprob difference without": moved,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(content, indent=1) + "\n")
    show(rows, content["shapes"], lead, moved, drafts)
    click.echo(f"written: {result}")
    if problems := [problem for row in rows for problem in row.problems]:
        raise RunError("; ".join(problems))


def total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Pairs, summed."""
    drafted, accepted = (sum(each) for each in zip(*counts, strict=True))
    return drafted, accepted


@torch.inference_mode()
def transformers_replies(export: Path, ours: Sequence[Continuation]) -> list[Reply]:
    """What transformers finds most likely at each step of our sequences, from one pass over each."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    # Its report lists the MTP module's tensors, which it does not use.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = DeepseekV3ForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    replies = []
    for each in ours:
        logits = model(torch.tensor([[*each.prompt, *each.tokens]])).logits[0, len(each.prompt) - 1 : -1]
        best = logits.log_softmax(-1).topk(TOP)
        steps = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        replies.append(Reply(best.indices[:, 0].tolist(), [dict(zip(*step, strict=True)) for step in steps]))
    return replies


def show(
    rows: Sequence[Row],
    shapes: dict[str, Any],
    lead: float,
    moved: dict[str, float],
    drafts: dict[str, tuple[int, int]],
) -> None:
    """Prints what was found."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(", ".join(f"{name} {value}" for name, value in shapes.items()), highlight=False, soft_wrap=True)
    table = Table("", box=box.SIMPLE_HEAD)
    for name in ("greedy tokens", "largest logprob difference", "drafts accepted", "our MTP module says"):
        table.add_column(name, justify="right")
    for row in rows:
        speculated = (
            f"{row.accepted} of {row.drafted}" if row.drafted else "",
            f"{row.expected_accepted} of {row.expected_drafted}" if row.expected_drafted else "",
        )
        table.add_row(row.engine, f"{row.equal} of {row.total}", f"{row.logprob_difference:.1e}", *speculated)
    console.print(table)
    drafted, accepted = drafts["as trained"]
    for line in (
        f"The best token leads the second by {lead:.1e} nats at least.",
        f"Left out, each of these would show: {', '.join(f'{name} {value:.2g}' for name, value in moved.items())}.",
        f"With its first position's embedding, which vLLM blanks, our MTP module gets {accepted} of {drafted} right.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main, "interop")
