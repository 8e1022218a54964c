"""`python -m tools.support`: writes the support matrix of `docs/parallel.md`, which is what the recipe's validator says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.errors import UserError
from dsv3.recipe.schema import Recipe

DOCUMENT = Path(__file__).parents[1] / "docs" / "parallel.md"
BEGIN, END = "<!-- what follows is written by `python -m tools.support` -->\n", "<!-- end of what it writes -->\n"
CONTENT: dict[str, Any] = {
    "model": {"preset": "tiny", "num_hidden_layers": 8},
    "data": {"sources": [{"name": "text", "uri": "builtin:stdlib"}], "sequence_length": 256},
    "schedule": {"learning_rate": 1e-3, "batch_size": 32},
    "training": {"tokens": "1M", "micro_batch_size": 1},
}
PIPELINE = ("parallel.pipeline=4", "parallel.data=2", "parallel.expert=2")
LAYOUTS = {
    "data": ("parallel.data=8",),
    "data, expert": ("parallel.data=8", "parallel.expert=4"),
    **{f"`{name}`": (*PIPELINE, f"parallel.schedule={name}") for name in ("one_f_one_b", "zero_bubble", "dual_pipe", "dual_pipe_v")},
}  # fmt: skip
RAMP = """schedule.batch_size=[{{kind="linear", from={}, to=32, tokens="100K"}}, {{kind="constant", value=32}}]"""
FEATURES: dict[str, Sequence[str]] = {
    "`training.precision = \"fp32\"`": ["training.precision=fp32"],
    "`training.precision = \"bf16\"`": ["training.precision=bf16"],
    "`training.precision = \"fp8\"`": ["training.precision=fp8"],
    "`optimizer.kind = \"muon\"`": ["optimizer.kind=muon"],
    "`optimizer.moments = \"bf16\"`": ["optimizer.moments=bf16"],
    "`training.recompute`": ['training.recompute=["norms", "mla_up", "swiglu"]'],
    "`training.ema_decay`": ["training.ema_decay=0.99"],
    "`training.balance = \"sequence\"`": ["training.balance=sequence", "training.balance_alpha=0.003"],
    "`training.balance = \"batch\"`": ["training.balance=batch", "training.balance_alpha=0.003"],
    "`data.document_mask`": ["data.document_mask=true"],
    "no MTP": ["model.num_nextn_predict_layers=0"],
    "two MTP modules": ["model.num_nextn_predict_layers=2"],
    "`[extension]`": ["extension.initial_from=runs/short", "extension.from_length=128"],
    "evaluation while training": ["training.evaluate_every_steps=5"],
    "as many layers as ranks of the pipeline": ["model.num_hidden_layers=4"],
    "fewer layers": ["model.num_hidden_layers=3"],
    "three ranks in the pipeline": ["parallel.pipeline=3"],
    "experts no multiple of `parallel.expert`": ["parallel.data=6", "parallel.expert=3", "schedule.batch_size=48"],
    "batches from 16 to 32, any multiple of 8": [RAMP.format(16), "schedule.batch_size_multiple=8"],
    "batches from 8": [RAMP.format(8), "schedule.batch_size_multiple=8"],
    "batches from 8, `parallel.schedule_below`": [
        RAMP.format(8), "schedule.batch_size_multiple=8", "parallel.schedule_below=one_f_one_b",
    ],
}  # fmt: skip


def matrix() -> str:
    """The table, with what the validator says of what it refuses below it."""
    reasons: list[str] = []
    lines = [f"| | {' | '.join(LAYOUTS)} |", f"| --- |{' :---: |' * len(LAYOUTS)}"]
    for feature, changes in FEATURES.items():
        cells = []
        for layout in LAYOUTS.values():
            said = refusal([*layout, *(each for each in changes if not irrelevant(each, layout))])
            if said and said not in reasons:
                reasons.append(said)
            cells.append(f"no ({reasons.index(said) + 1})" if said else "yes")
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {said}" for number, said in enumerate(reasons, start=1))]) + "\n"


def irrelevant(change: str, layout: Sequence[str]) -> bool:
    """Whether a change is to a pipeline that the layout has not."""
    return change.startswith("parallel.pipeline") and PIPELINE[0] not in layout


def refusal(overrides: Sequence[str]) -> str:
    """What the validator says, without where; nothing where it accepts."""
    try:
        Recipe.from_dict(CONTENT, overrides)
    except UserError as error:
        return str(error).partition(": ")[2] if str(error).startswith("override") else str(error)
    return ""


def written(document: str) -> str:
    """The document with the matrix of today."""
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
