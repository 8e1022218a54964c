"""Output tokens a second of `dsv3 serve` and of vLLM on this machine's CPU, serving the same network in FP32 to the same clients.

    make interop-speed

Servers take turns, in which the others stand still: in each a number of clients ask at once over HTTP, each for one greedy answer to a prompt of random tokens that
nobody has asked before. Exits with 1 where a server gives fewer tokens than were asked for.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import torch

from dsv3.bench.decode import SERVED
from dsv3.bench.measure import Result, Row, Spread, ratio, take_turns
from dsv3.cli.bench import print_result
from dsv3.cli.ui import Progress
from dsv3.errors import RunError, UserError
from tools.interop.network import train_and_export
from tools.interop.server import MODEL, Server, ask, dsv3, vllm

OURS = "dsv3"
TARGET = 2.0


class Prompts:
    """Random token ids, others at each call."""

    def __init__(self, vocabulary: int):
        self.vocabulary, self.generator = vocabulary, torch.Generator().manual_seed(0)

    def answered(self, url: str, count: int, tokens: int, new: int) -> None:
        """One turn of a server: `count` clients."""
        answer_all(url, torch.randint(self.vocabulary, (count, tokens), generator=self.generator).tolist(), new)


def answer_all(url: str, prompts: Sequence[Sequence[int]], new: int) -> None:
    """All prompts at once, each from a client of its own; `RunError` for an answer of another length."""

    def one(prompt: Sequence[int]) -> int:
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        return int(ask(f"{url}/v1/completions", asked)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(len(prompts)) as clients:
        counts = list(clients.map(one, prompts))
    if counts != [new] * len(prompts):
        raise RunError(f"{url} gave {counts} tokens, and was asked for {new} each")


def turn(server: Server, running: Sequence[Server], prompts: Prompts, sizes: tuple[int, int, int]) -> None:
    """One server answers, while the others stand still."""
    with ExitStack() as others:
        for each in running:
            if each is not server:
                others.enter_context(each.paused())
        prompts.answered(server.url, *sizes)


@click.command(help=__doc__)
@click.option("--vllm", "environment", type=click.Path(path_type=Path), required=True, help="vLLM's environment.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/interop"), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), help="Also write the result to this file.")
def main(environment: Path, out: Path, rounds: int, result: Path | None) -> None:
    """See the module's docstring."""
    if not (environment / "bin" / "vllm").is_file():
        raise UserError(f"{environment} has no vLLM: run `make interop`, which installs it there")
    export = train_and_export(out)
    config = json.loads((export / "config.json").read_text())
    prompts = Prompts(config["vocab_size"])
    length = max(before + new for _, before, new in SERVED) + 8
    rows, ratios = list[Row](), []
    with ExitStack() as servers, Progress() as progress:
        start = servers.enter_context
        running = {OURS: start(dsv3(export, length, out / "dsv3.log"))}
        running["vLLM"] = start(vllm(environment, export, length, out / "vllm-eager.log"))
        running["vLLM, compiled"] = start(vllm(environment, export, length, out / "vllm-compiled.log", compiled=True))
        versions = {"vLLM": str(ask(f"{running['vLLM'].url}/version")["version"])}
        for count, before, new in SERVED:
            group = f"{count} requests, {before}/{new}"
            sides = {
                name: partial(turn, server, list(running.values()), prompts, (count, before, new))
                for name, server in running.items()
            }
            seconds = take_turns(sides, rounds, progress, group)
            for name, each in seconds.items():
                speed = Spread.of([count * new / turn for turn in each])
                rows.append(Row(name, group, speed, {"ms a token": 1000 * count / speed.median}))
            ratios.append(
                ratio(f"{group}, against vLLM", seconds, OURS, [name for name in running if name != OURS], TARGET)
            )
    shapes = {name: config[name] for name in ("num_hidden_layers", "hidden_size", "n_routed_experts", "vocab_size")}
    found = Result("serving", shapes, rows, ratios, versions, command="make interop-speed")
    print_result(found, result)


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunError) as error:
        print(f"speed: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
