"""Made-up finished runs of the ablations' recipes, with the figures that a test asks for."""

import json
from pathlib import Path
from typing import Any

from dsv3.recipe.schema import Recipe

ABLATIONS = Path(__file__).parents[2] / "recipes" / "ablations"


def write_run(
    path: Path, recipe: str, seed: int, *, stdlib: float = 1.8, passed: int = 150, vio: float = 0.2,
    overrides: tuple[str, ...] = (), evaluated: tuple[int, ...] = (0, 4000, 8000, 10000),
) -> Path:  # fmt: skip
    """A run of 10 steps of 1,000 tokens; figures improve to those given at the end of the training."""
    home = path / "pretrain"
    home.mkdir(parents=True)
    content = Recipe.load(ABLATIONS / f"{recipe}.toml", [f"training.seed={seed}", "training.tokens=10K", *overrides])
    blocks = ["1", "2", *([] if recipe == "mtp-off" else ["mtp.0"])]
    write(home / "run.json", [{"recipe": content.to_dict(), "machine": {"device": "a device"}}])
    write(
        home / "metrics.jsonl",
        [
            # The MTP module's figure, and those before the last fifth, are none that a mean may contain.
            {"step": i, "tokens": 1000 * i, "max_vio": {b: 9.0 if b[0] == "m" or i < 9 else vio for b in blocks}}
            for i in range(1, 11)
        ],
    )
    write(
        home / "evaluations.jsonl",
        [
            {
                "step": tokens // 1000, "tokens": tokens,
                "validation_loss": {"stdlib": 2 * stdlib + (10000 - tokens) / 1e4},
                "bits_per_byte": {"stdlib": stdlib + (10000 - tokens) / 1e4, "tinypy": 0.3},
                "pass_at_1": {"tinypy": {"passed": passed * tokens // 10000, "total": 300}},
            }
            for tokens in evaluated
        ],
    )  # fmt: skip
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
