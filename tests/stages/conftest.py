"""A made-up run directory: curves such as a real run leaves, without the run."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BLOCKS = ("1", "2", "3", "mtp.0")
EXPERTS = 8


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run


def write_run(path: Path, steps: int = 930, planned: int = 930, hostile: str = "") -> Path:
    """Writes `path` as a run of `planned` steps that has done `steps`; `hostile` goes into every string from outside."""
    home = path / "pretrain"
    home.mkdir(parents=True)
    rng = random.Random(1)
    skill = {block: [rng.gauss(0, 0.5) for _ in range(EXPERTS)] for block in BLOCKS}
    home.joinpath("run.json").write_text(json.dumps(about(planned, hostile)))
    with home.joinpath("metrics.jsonl").open("w") as lines:
        for step in range(1, steps + 1):
            lines.write(json.dumps(metrics_row(step, planned, skill, rng)) + "\n")
    with home.joinpath("evaluations.jsonl").open("w") as lines:
        for step in (0, 310, 620, 930):
            if step <= steps:
                lines.write(json.dumps(evaluation_row(step, hostile)) + "\n")
    ending = hostile.replace("/", "").encode("utf-8", "replace").decode()
    checkpoint = home / "checkpoints" / f"step-{steps:08d}{ending}"
    checkpoint.mkdir(parents=True)
    checkpoint.with_name("latest").write_text(checkpoint.name + "\n")
    return path


def about(planned: int, hostile: str) -> dict[str, Any]:
    return {
        "recipe": {
            "model": {"preset": "tiny", "rope_scaling": None},
            "data": {
                "sequence_length": 256,
                "sources": [
                    {"name": "stdlib", "uri": "builtin:stdlib", "weight": 0.5},
                    {"name": "tinypy" + hostile, "uri": "builtin:tinypy", "weight": 0.5},
                ],
            },
            "optimizer": {"kind": "muon", "betas": [0.9, 0.95]},
            "training": {"tokens": planned * 2048, "seed": 0},
        },
        "derived": {
            "optimizer" + hostile: "Muon for matrices: it reached 1.9 in half of AdamW's tokens",
            "parameters": 2812416,
        },
        "machine": {"processor": "2 cores" + hostile, "memory": "7.7 GB", "threads": 2},
        "versions": {"dsv3": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        "command": "dsv3 quickstart",
    }


def metrics_row(step: int, planned: int, skill: dict[str, list[float]], rng: random.Random) -> dict[str, Any]:
    done = step / planned
    load, violation = {}, {}
    for block in BLOCKS:
        raw = [math.exp(s * math.exp(-6 * done) + rng.gauss(0, 0.06)) for s in skill[block]]
        load[block] = [share / sum(raw) for share in raw]
        violation[block] = max(load[block]) * EXPERTS - 1
    loss = 1.9 + 5.7 * math.exp(-9 * done) + rng.gauss(0, 0.07)
    row: dict[str, Any] = {
        "step": step,
        "tokens": step * 2048,
        "seconds": 0.3 * step,
        "loss": loss,
        "mtp_losses": [loss + 0.6 + rng.gauss(0, 0.05)],
        "balance_loss": 1e-4,
        "grad_norm": 0.6 + 3 * math.exp(-20 * done) + abs(rng.gauss(0, 0.1)),
        "learning_rate": 0.012 * min(1.0, step / 50, 4 * (1.001 - done)),
        "mtp_weight": 0.3,
        "bias_update_speed": 0.001,
        "batch_size": 8,
        "tokens_per_second": 6800 + rng.gauss(0, 250),
        "max_vio": violation,
        "bias_magnitude": {block: 0.05 * (1 - math.exp(-5 * done)) for block in BLOCKS},
        "dead_experts": dict.fromkeys(BLOCKS, 0),
    }
    if step % 10 == 1:
        row["load"] = load
    return row


def evaluation_row(step: int, hostile: str) -> dict[str, Any]:
    done = step / 930
    trained = "    with open(path) as file:\n        return file.read()\n" if step else "ô\x00é ·tion self ret)(:: de"
    middle = "    total = 0\n    for x in xs:\n" if step else "q)]] == the in"
    return {
        "step": step,
        "tokens": step * 2048,
        "seconds": 0.3 * step + 4,
        "bits_per_byte": {
            "stdlib": 1.84 + 1.57 * math.exp(-6 * done),
            "tinypy" + hostile: 0.31 + 3 * math.exp(-9 * done),
        },
        "pass_at_1": {"tinypy": {"passed": round(186 * done), "total": 300}},
        "samples": [
            {"prompt": "def read_file(path):\n", "kind": "plain", "suffix": "", "text": trained + hostile},
            {
                "prompt": "def add(xs):\n" + hostile,
                "kind": "fim",
                "suffix": "        total += x\n    return total\n",
                "text": middle,
            },
            {
                "prompt": "The function returns",
                "kind": "plain",
                "suffix": "",
                "text": " the value of the given option, or None.",
            },
            {
                "prompt": "class Queue:\n    def __init__(self):\n",
                "kind": "plain",
                "suffix": "",
                "text": "        self.items = []\n",
            },
        ],
    }
