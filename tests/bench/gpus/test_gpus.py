"""The wiring of the measurements on several GPUs, on CPU ranks at the size of a toy; what is timed there is timed on GPUs."""

import json
from dataclasses import asdict

import pytest
import torch

from dsv3.bench.gpus import ranks
from dsv3.bench.gpus.findings import Figure, Findings, Part
from dsv3.bench.gpus.pipeline import TORCH
from dsv3.bench.gpus.rank import Rank
from dsv3.bench.gpus.sizes import Size, Sizes
from dsv3.bench.measure import Spread
from dsv3.cli import main
from dsv3.cli.bench_gpus import print_findings
from dsv3.errors import RunError, UserError
from tests.distributed.conftest import two_ranks as two_ranks

MOE = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "vocab_size": 64}
FP8 = {
    "hidden_size": 128, "moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
TINY = Sizes(
    overlap=Size("debug", {**MOE, **FP8}, 24, 2),
    pipeline=Size("debug", {"num_hidden_layers": 5, "first_k_dense_replace": 5}, 16, 6),
    zero=Size("debug", {"num_hidden_layers": 2}, 16, 1),
    scaling=Size("debug", {"num_hidden_layers": 2}, 16, 2, 2),
    rounds=1,
    device="cpu",
    threads=1,
)


def measure(part, number=None):
    found = ranks.measured(part, Rank(torch.distributed.get_rank(), 2, torch.device("cpu"), 1), TINY)
    return [asdict(each) for each in found]


def test_overlapped_pairs_compute_what_passes_one_after_the_other_do(two_ranks):
    found, _ = two_ranks.run(measure, "overlap")
    assert [each["shapes"]["precision"] for each in found] == ["bf16", "fp8"]
    for each in found:
        sides = ("overlapped{}", "overlapped{}, nothing exchanged", "dispatch and combine alone{}")
        kinds = [side.format(kind) for side in sides for kind in ("", ", bounded")]
        assert set(each["times"]) == {"one after the other", *kinds}
        assert [figure["target"] for figure in each["figures"]] == [0.9, None, None] * 2
        assert set(each["checks"].values()) == {"outputs 0 and gradients of inputs 0 of a token's norm apart at most"}
    for place in (2, 5):
        wide, narrow = (each["figures"][place]["value"]["median"] for each in found)
        assert 0 < narrow < wide


def test_all_schedules_find_the_same_loss(two_ranks):
    (found,), _ = two_ranks.run(measure, "pipeline")
    left_out = {"torch DualPipeV"} if TORCH < (2, 13) else set()
    assert set(found["times"]) == {"dsv3 DualPipeV", "dsv3 1F1B", "torch DualPipeV", "torch 1F1B"} - left_out
    assert len(found["figures"]) == 4 - len(left_out)
    assert len(found["checks"]) == 4


def test_memory_is_that_of_the_formula(two_ranks):
    for (found,) in two_ranks.run(measure, "zero"):
        figures = {each["name"]: each["value"]["median"] for each in found["figures"]}
        alone, shared = (figures[f"moments, moments in bf16, data = {n}"] for n in (1, 2))
        assert 0.49 < shared / alone < 0.52
        assert all(abs(float(each) - 1) < 0.02 for each in found["checks"].values())


def test_layouts_begin_with_the_same_loss(two_ranks):
    (found,), _ = two_ranks.run(measure, "scaling")
    assert [each["target"] for each in found["figures"]] == [None] * 4 + [0.95] * 3
    assert len(set(found["checks"].values())) == 1


@pytest.mark.prove
def test_ranks_are_started_and_what_one_fails_with_is_told():
    told = []
    found = ranks.bench_gpus(2, ["zero"], TINY, tell=told.append)
    assert [each.name for each in found.parts] == ["zero"]
    assert told == found.parts
    json.dumps(asdict(found))
    broken = Sizes(zero=Size("debug", {"num_hidden_layers": 0}, 16, 1), device="cpu", threads=1)
    with pytest.raises(RunError, match=r"rank [01] failed in zero: UserError: model.num_hidden_layers"):
        ranks.bench_gpus(2, ["zero"], broken)


def test_a_machine_with_too_few_gpus_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main.run(["bench", "train", "--gpus", "2"]) == 2
    assert "expected 2 or more, and this machine has 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="--gpus 1 measures"):
        ranks.bench_gpus(1)
    assert main.run(["bench", "train", "--gpus", "2", "--only", "zerro"]) == 2
    assert "did you mean 'zero'?" in capsys.readouterr().err


def test_figures_stand_beside_their_targets(capsys):
    figures = [Figure("hidden", Spread(0.93, 0.9, 0.95), "%", 0.9), Figure("memory", Spread.of([12.5]), "GB")]
    part = Part(
        "overlap", "experts over 2 GPUs", {}, {"overlapped": Spread(20.0, 19.0, 21.0)}, figures, {"output": "equal"}
    )
    print_findings(Findings(2, [part], {"device": "H200"}, {}, "dsv3", 99.0))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["overlapped", "20.00", "ms", "19.00", "-", "21.00"] in lines
    assert ["hidden", "93.0%", "90.0%", "-", "95.0%", "90.0%:", "met"] in lines
    assert ["memory", "12.50", "GB"] in lines
