"""Output tokens a second of `dsv3 serve` and of vLLM on this machine's CPU, serving the same network in FP32 to the same clients.

    make interop-speed

Servers take turns, in which a number of clients ask at once over HTTP, each for one greedy answer to a
prompt of random tokens that nobody has asked before. Each turn comes after one that is not timed, and after a pause in which the
others come to rest. Exits with 1 where a server gives fewer tokens than were asked for.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from dsv3.bench.decode import SERVED
from dsv3.bench.measure import Result, Row, Spread, Work, ratio, take_turns
from dsv3.cli.bench import print_result
from dsv3.cli.ui import Progress
from dsv3.errors import RunError
from tools.interop.network import train_and_export
from tools.interop.server import MODEL, ask, check_vllm, dsv3, run, vllm

OURS = "dsv3"
TARGET = 2.0
PAUSE = 2.0
"""Seconds between turns: vLLM's worker keeps a core busy for one after its last request."""


def turn(url: str, draw: Callable[[], Tensor], new: int) -> None:
    """Prompts drawn anew, all at once, each from a client of its own; `RunError` for an answer of another length."""

    def one(prompt: Sequence[int]) -> int:
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        return int(ask(f"{url}/v1/completions", asked)["usage"]["completion_tokens"])

    prompts = draw().tolist()
    with ThreadPoolExecutor(len(prompts)) as clients:
        counts = list(clients.map(one, prompts))
    if counts != [new] * len(prompts):
        raise RunError(f"{url} gave {counts} tokens, and was asked for {new} each")


@click.command(help=__doc__)
@click.option("--vllm", "environment", type=click.Path(path_type=Path), required=True, help="vLLM's environment.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/interop"), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), help="Also write the result to this file.")
def main(environment: Path, out: Path, rounds: int, result: Path | None) -> None:
    """See the module's docstring."""
    check_vllm(environment)
    export = train_and_export(out)
    config = json.loads((export / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    length = max(before + new for _, before, new in SERVED) + 8
    rows, ratios = list[Row](), []
    with ExitStack() as servers, Progress() as progress:
        start = servers.enter_context
        urls = {OURS: start(dsv3(export, length, out / "dsv3.log"))}
        urls["vLLM"] = start(vllm(environment, export, length, out / "vllm-eager.log"))
        urls["vLLM, compiled"] = start(vllm(environment, export, length, out / "vllm-compiled.log", compiled=True))
        versions = {"vLLM": str(ask(f"{urls['vLLM']}/version")["version"])}
        for count, before, new in SERVED:
            group = f"{count} requests, {before}/{new}"
            draw = partial(torch.randint, config["vocab_size"], (count, before), generator=generator)
            sides = {name: partial(turn, url, draw, new) for name, url in urls.items()}

            def prepare(name: str, sides: Mapping[str, Work] = sides) -> None:
                time.sleep(PAUSE)
                sides[name]()

            seconds = take_turns(sides, rounds, progress, group, prepare=prepare)
            for name, each in seconds.items():
                speed = Spread.of([count * new / elapsed for elapsed in each])
                rows.append(Row(name, group, speed, {"ms a token": 1000 * count / speed.median}))
            ratios.append(
                ratio(f"{group}, against vLLM", seconds, OURS, [name for name in urls if name != OURS], TARGET)
            )
    shapes = {name: config[name] for name in ("num_hidden_layers", "hidden_size", "n_routed_experts", "vocab_size")}
    found = Result("serving", shapes, rows, ratios, versions, command="make interop-speed")
    print_result(found, result)


if __name__ == "__main__":
    run(main, "interop-speed")
