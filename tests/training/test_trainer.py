import json
import random
import re

import numpy
import pytest
import torch

from dsv3.errors import RunError, UserError
from dsv3.planning.flops import training_flops_per_token
from dsv3.training.interrupt import Interrupted
from dsv3.weights.checkpoint import latest_checkpoint, read_state
from dsv3.weights.convert import export_weights
from dsv3.weights.opening import load_model


def records(directory, *without):
    without = {"seconds", "tokens_per_second", "flops_per_second", "peak_memory", "mfu", *without}
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in without} for line in lines]


def evaluations(directory):
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_equal_tensors(a, b):
    for group, tensors in a.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, b.tensors()[group][name]), f"{group}.{name}"


def stop_after(trainer, step):
    """What Ctrl-C does, at the end of a step."""

    def progress(**figures):
        trainer.stop = figures["step"] + 1 >= step

    trainer.progress = progress


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(tmp_path, make_trainer):
    runs = [make_trainer(tmp_path / name) for name in "ab"]
    for run in runs:
        run.run()
    other = make_trainer(tmp_path / "c", "training.seed=1")
    other.run()
    a, b, c = (records(tmp_path / name) for name in "abc")
    assert [each["step"] for each in a] == [1, 2, 3, 4, 5, 6]
    assert a == b
    assert_equal_tensors(*runs)
    assert [each["loss"] for each in a] != [each["loss"] for each in c]


@pytest.mark.parametrize("overrides", [[], ["data.document_mask=true"], ["training.balance=batch"]])
def test_micro_batches_give_the_whole_batchs_gradient_losses_and_loads(tmp_path, make_trainer, overrides):
    results = []
    for micro in (4, 2, 1):
        trainer = make_trainer(
            tmp_path, *overrides, f"training.micro_batch_size={micro}", "training.balance_alpha=0.05"
        )
        figures = trainer.gradients(trainer.loader.batch(0, 4), 0.3)
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        results.append((figures, gradients))
    (losses, load), whole = results[0]
    assert len(losses) == 3  # main, balance, one MTP module
    for (other_losses, other_load), gradients in results[1:]:
        assert other_losses.tolist() == pytest.approx(losses.tolist())
        assert all(torch.equal(other_load[name], load[name]) for name in load)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], atol=2e-6, rtol=2e-4, msg=name)


def test_an_auxiliary_loss_takes_the_biases_place(tmp_path, make_trainer):
    """Each keeps the loads more even than nothing does, and only the report's own way moves a bias."""
    uneven, moved = {}, {}
    for balance, alpha in (("nothing", 0.0), ("sequence", 1.0), ("batch", 1.0), ("bias", 0.0)):
        trainer = make_trainer(
            tmp_path / balance, "training.tokens=2560", "schedule.bias_update_speed=0.05", f"training.balance_alpha={alpha}",
            f"training.balance={'sequence' if balance == 'nothing' else balance}",
        )  # fmt: skip
        trainer.run()
        rows = records(tmp_path / balance)
        uneven[balance] = sum(sum(row["max_vio"].values()) for row in rows[-6:])
        moved[balance] = rows[-1]["bias_magnitude"], {row["bias_update_speed"] for row in rows}
    assert max(uneven[each] for each in ("sequence", "batch", "bias")) < 0.95 * uneven["nothing"]
    assert min(moved["bias"][0].values()) > 0
    for balance in ("sequence", "batch"):
        assert set(moved[balance][0].values()) == {0.0}
        assert moved[balance][1] == {0.0}


@pytest.mark.parametrize("mask", ["true", "false"])
def test_the_loss_is_the_mean_over_all_targets_of_the_batch(tmp_path, make_trainer, mask):
    """Against a loop over rows and positions; with a document mask the first token of a document is no target."""
    trainer = make_trainer(tmp_path, f"data.document_mask={mask}", "training.micro_batch_size=2")
    batch = trainer.loader.batch(3, 4)
    loss = float(trainer.gradients(batch, 0.0)[0][0])
    nats = []
    for row in range(4):
        spans = [(0, 33)]
        if mask == "true":
            ids = batch.segment_ids[row].tolist()
            starts = [i for i in range(33) if i == 0 or ids[i] != ids[i - 1]]
            spans = list(zip(starts, [*starts[1:], 33], strict=True))
        for start, end in spans:
            with torch.no_grad():
                logits = trainer.model(batch.tokens[row : row + 1, start:end]).logits[0].log_softmax(-1)
            nats += [
                -float(logits[i - start, batch.tokens[row, i + 1]])
                for i in range(start, end - 1)
                if batch.valid[row, i + 1]
            ]
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-4)


def draws():
    """The next numbers of every generator that code may draw from."""
    return random.random(), float(numpy.random.random()), torch.rand(3).tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.kind=adamw", "training.ema_decay=0.9"],
        ["optimizer.kind=muon", "training.precision=bf16", "schedule.mtp_weight=0"],
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, make_trainer, overrides):
    """Losses, weights, optimizer, average, order of the data, and what random generators give."""
    overrides = [*overrides, "training.evaluate_every_steps=1"]

    def evaluate(model):
        return {"drawn": draws(), "norm": float(model.lm_head.weight.detach().norm())}

    def run(trainer):
        rows, batch = [], trainer.loader.batch

        def recorded(first, size):
            rows.append((first, size))
            return batch(first, size)

        trainer.loader.batch = recorded
        trainer.run()
        return rows

    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    whole = make_trainer(tmp_path / "whole", *overrides, evaluate=evaluate)
    read = run(whole)
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    halted = make_trainer(tmp_path / "halted", *overrides, evaluate=evaluate)
    stop_after(halted, 3)
    with pytest.raises(Interrupted, match=r"stopped after step 3; saved in .*step-00000003"):
        halted.run()
    torch.manual_seed(6), random.seed(6), numpy.random.seed(6)
    resumed = make_trainer(tmp_path / "halted", *overrides, evaluate=evaluate)
    assert resumed.resume()
    assert (resumed.step_count, resumed.token_count, resumed.row_count) == (3, 3 * 4 * 32, 12)
    assert_equal_tensors(halted, resumed)
    assert run(resumed) == read[3:] == [(12, 4), (16, 4), (20, 4)]
    assert records(tmp_path / "halted") == records(tmp_path / "whole")
    scored = [evaluations(tmp_path / name) for name in ("halted", "whole")]
    assert scored[0] == scored[1]
    assert_equal_tensors(whole, resumed)
    moved = [b.moe.gate.e_score_correction_bias.abs().max() for b in resumed.model.layers if b.moe is not None]
    assert min(moved) > 0  # the biases are among what came back
    assert not make_trainer(tmp_path / "nothing").resume()


def test_both_the_weights_and_their_average_are_evaluated(tmp_path, make_trainer):
    seen = []

    def evaluate(model):
        seen.append({name: each.clone() for name, each in model.state_dict().items()})
        return {"norm": float(model.lm_head.weight.detach().norm())}

    trainer = make_trainer(tmp_path, "training.ema_decay=0.5", evaluate=evaluate)
    trainer.run()
    rows = evaluations(tmp_path)
    assert [("ema" in row, row["step"]) for row in rows] == [(False, 0), (True, 6)]
    assert rows[1]["norm"] != rows[1]["ema"]["norm"]
    _, weights, average = seen
    for name, each in trainer.model.state_dict().items():
        assert torch.equal(each, weights[name]), name  # its own again
    for name, each in trainer.average.tensors().items():
        assert torch.equal(each, average[name]), name


def test_ctrl_c_while_saving_counts_for_the_next_step(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path, "training.checkpoint_every_steps=1")
    save = trainer.save

    def save_and_stop():
        save()
        trainer.stop = True

    monkeypatch.setattr(trainer, "save", save_and_stop)
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert str(latest_checkpoint(tmp_path / "checkpoints")) in str(caught.value)
    assert trainer.step_count == 2


def test_a_crash_repeats_the_steps_since_the_checkpoint_once(tmp_path, make_trainer):
    """Evaluations and steps that were recorded after the newest checkpoint are recorded anew, not twice."""
    often = ["training.checkpoint_every_steps=2", "training.evaluate_every_steps=1"]
    whole = make_trainer(tmp_path / "whole", *often, evaluate=lambda model: {"score": 1.0})
    whole.run()
    crashed = make_trainer(tmp_path / "crashed", *often, evaluate=lambda model: {"score": 1.0})

    def crash(**figures):
        if figures["step"] == 3:
            raise ZeroDivisionError

    crashed.progress = crash
    with pytest.raises(ZeroDivisionError):
        crashed.run()
    assert len(records(tmp_path / "crashed")) == 3
    resumed = make_trainer(tmp_path / "crashed", *often, evaluate=lambda model: {"score": 1.0})
    assert resumed.resume()
    resumed.run()
    assert records(tmp_path / "crashed") == records(tmp_path / "whole")
    scored = [json.loads(line)["step"] for line in (tmp_path / "crashed/evaluations.jsonl").read_text().splitlines()]
    assert scored == [0, 1, 2, 3, 4, 5, 6]


def test_killed_before_the_first_checkpoint_it_begins_anew(tmp_path, make_trainer):
    first = make_trainer(tmp_path, evaluate=lambda model: {"score": 1.0})

    def crash(**_):
        raise ZeroDivisionError

    first.progress = crash
    with pytest.raises(ZeroDivisionError):
        first.run()
    again = make_trainer(tmp_path, evaluate=lambda model: {"score": 1.0})
    assert not again.resume()
    again.run()
    scored = [json.loads(line)["step"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert scored == [0, 6]
    assert [each["step"] for each in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_model_of_mtp_depth_three_trains(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, "model.num_nextn_predict_layers=3", "training.tokens=5120", "schedule.learning_rate=0.01")  # fmt: skip
    trainer.run()
    rows = records(tmp_path)
    assert len(rows) == 40
    for depth in range(3):
        losses = [row["mtp_losses"][depth] for row in rows]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), depth
    assert sum(row["loss"] for row in rows[-4:]) < 0.75 * sum(row["loss"] for row in rows[:4])
    assert set(rows[0]["max_vio"]) == {"1", "2", "mtp.0", "mtp.1", "mtp.2"}
    assert min(rows[-1]["bias_magnitude"].values()) > 0


def test_a_line_of_metrics_has_every_figure(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    trainer.run()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert row.keys() == {
        "step", "tokens", "seconds", "loss", "mtp_losses", "balance_loss", "grad_norm", "learning_rate", "mtp_weight",
        "bias_update_speed", "batch_size", "tokens_per_second", "max_vio", "bias_magnitude", "bias_drift", "dead_experts",
        "overloaded_experts", "load", "grad_norms", "loss_deviation", "grad_norm_deviation", "spike_score", "skipped_steps",
        "flops_per_second", "peak_memory",
    }  # fmt: skip
    flops = training_flops_per_token(trainer.model.config, 32)
    assert row["flops_per_second"] == pytest.approx(row["tokens_per_second"] * flops)
    groups = row["grad_norms"]
    assert groups.keys() == {"embedding", "head", "attention", "router", "experts", "shared", "dense", "norms", "mtp"}
    assert row["grad_norm"] == pytest.approx(sum(each**2 for each in groups.values()) ** 0.5)
    assert (row["step"], row["tokens"], row["batch_size"]) == (2, 256, 4)
    assert row["max_vio"].keys() == row["load"].keys() == {"1", "2", "mtp.0"}
    assert sum(row["load"]["mtp.0"]) == pytest.approx(1, abs=1e-3)
    assert "load" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_the_checkpoint_is_a_model_that_others_load(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    trainer.run()
    model, _ = load_model(tmp_path)
    for (name, a), b in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert read_state(latest_checkpoint(tmp_path / "checkpoints"))["recipe"]["training"]["tokens"] == 768


def test_the_average_is_a_model_that_others_load_and_export(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path / "run", "training.ema_decay=0.9")
    trainer.run()
    expected = trainer.average.tensors()
    assert not torch.equal(expected["lm_head.weight"], trainer.model.lm_head.weight)
    export_weights(tmp_path / "run", tmp_path / "exported", ema=True)
    for model in (load_model(tmp_path / "run", ema=True)[0], load_model(tmp_path / "exported")[0]):
        for name, each in model.state_dict().items():
            assert torch.equal(each, expected[name]), name
    assert torch.equal(load_model(tmp_path / "run")[0].lm_head.weight, trainer.model.lm_head.weight)
    with pytest.raises(UserError, match="only a training checkpoint has an average"):
        load_model(tmp_path / "exported", ema=True)
    make_trainer(tmp_path / "without", "training.tokens=128").run()
    with pytest.raises(UserError, match=r"holds no average of the weights: its run had no training\.ema_decay"):
        load_model(tmp_path / "without", ema=True)


def test_schedules_are_read_before_each_step(tmp_path, make_trainer):
    trainer = make_trainer(
        tmp_path,
        'schedule.learning_rate=[{kind="linear", from=0.0, to=3e-3, steps=3}, {kind="constant", value=1e-3}]',
        'schedule.batch_size=[{kind="constant", value=2, steps=2}, {kind="constant", value=6}]',
        'schedule.bias_update_speed=[{kind="constant", value=0.01, steps=1}, {kind="constant", value=0.0}]',
    )
    trainer.run()
    rows = records(tmp_path)
    assert [row["learning_rate"] for row in rows[:4]] == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])
    assert [row["batch_size"] for row in rows] == [2, 2, 6, 6, 6, 6][: len(rows)]
    assert [row["tokens"] for row in rows[:3]] == [64, 128, 320]
    assert trainer.row_count == sum(row["batch_size"] for row in rows)
    for row in rows:
        assert list(row["bias_magnitude"].values()) == pytest.approx([0.01] * 3)


def poison_after(trainer, step, poison):
    def progress(**figures):
        if figures["step"] == step:
            poison()

    trainer.progress = progress


def test_too_many_skipped_steps_end_the_run_with_step_documents_and_checkpoint(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, "training.checkpoint_every_steps=2", "training.max_skipped_steps=1")

    def poison():
        with torch.no_grad():
            trainer.model.norm.weight.fill_(float("nan"))

    poison_after(trainer, 2, poison)
    with pytest.raises(RunError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "the loss of step 4 is not finite, as in every step since 3; these were skipped" in message
    assert "rows 12 to 15" in message
    for document in trainer.loader.describe(trainer.loader.batch(12, 4)):
        assert document in message
    assert str(tmp_path / "checkpoints" / "step-00000002") in message
    rows = records(tmp_path)
    assert [(row["step"], row["loss"] is None, row["skipped_steps"]) for row in rows] == [
        (1, False, 0), (2, False, 0), (3, True, 1), (4, True, 2),
    ]  # fmt: skip


def test_without_leave_to_skip_the_first_gradient_that_is_not_finite_ends_the_run(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, "training.max_skipped_steps=0")
    poison_after(trainer, 2, lambda: trainer.model.lm_head.weight.register_hook(lambda g: g * float("inf")))
    with pytest.raises(RunError, match=r"the gradient of step 3 is not finite\..*none was written yet"):
        trainer.run()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("delay", [0, 1])
def test_a_bad_step_is_skipped_counted_and_the_run_goes_on(tmp_path, make_trainer, delay, caplog):
    """Weights, moments and biases stay; data and schedules move on; whenever the figures are read."""
    trainer = make_trainer(tmp_path, "training.ema_decay=0.5")
    trainer.delay = delay
    hooks, seen = [], {}

    def watch(**figures):
        seen[figures["step"]] = {
            f"{a}.{b}": x.clone() for a, part in trainer.tensors().items() for b, x in part.items()
        }
        if figures["step"] == 2:
            hooks.append(trainer.model.lm_head.weight.register_hook(lambda g: g * float("nan")))
        if figures["step"] == 3:
            hooks.pop().remove()

    trainer.progress = watch
    trainer.run()
    trained = [name for name in seen[2] if not name.startswith("ema.")]
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in trained)
    assert not torch.equal(seen[3]["model.lm_head.weight"], seen[4]["model.lm_head.weight"])
    rows = records(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, False, False]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[3]["tokens"] == 4 * 128
    assert re.search(r"step 3 was skipped: .* rows \d+ to \d+, with the documents \S+", caplog.text)
    assert caplog.text.count("was skipped") == 1
    assert all(value.isfinite().all() for value in seen[6].values() if value.is_floating_point())


def test_figures_read_late_are_the_same_figures(tmp_path, make_trainer):
    late = make_trainer(tmp_path / "late", "training.checkpoint_every_steps=4")
    late.delay = 2
    late.run()
    make_trainer(tmp_path / "soon", "training.checkpoint_every_steps=4").run()
    assert records(tmp_path / "late") == records(tmp_path / "soon")


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path, "training.checkpoint_every_steps=2", "training.tokens=1024")

    def full(*_):
        raise OSError(28, "No space left on device")

    poison_after(trainer, 3, lambda: monkeypatch.setattr("dsv3.weights.checkpoint.ChunkWriter.write", full))
    with pytest.raises(RunError, match=r"could not save the checkpoint .*step-00000004.*No space left"):
        trainer.run()
    monkeypatch.undo()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step-00000002"]
    resumed = make_trainer(tmp_path, "training.checkpoint_every_steps=2")
    assert resumed.resume()
    assert resumed.step_count == 2
    resumed.run()
    assert [each["step"] for each in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay was 0.1 and is 0.2"),
        ("optimizer.kind=muon", "optimizer.kind was 'adamw' and is 'muon'"),
        ("model.hidden_size=64", "model.hidden_size was 32 and is 64"),
        ("data.sources.0.weight=2.0", "data.sources.0.weight was 1.0 and is 2.0"),
    ],
)
def test_another_recipe_is_refused_naming_what_changed(tmp_path, make_trainer, override, said):
    make_trainer(tmp_path, "training.tokens=128").run()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path, "training.tokens=128", override).resume()
    assert said in str(caught.value)
    assert str(tmp_path / "checkpoints" / "step-00000001") in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_changes_no_result_may_change(tmp_path, make_trainer):
    make_trainer(tmp_path, "training.tokens=128", "notes.a=old").run()
    assert make_trainer(tmp_path, "training.tokens=128", "notes.b=new", "model.hidden_size=32").resume()


def test_a_longer_training_goes_on_where_the_shorter_one_ended(tmp_path, make_trainer):
    make_trainer(tmp_path / "short", "training.tokens=384").run()
    longer = make_trainer(tmp_path / "short", "training.checkpoint_every_steps=2")
    assert longer.resume()
    assert longer.changes == [
        "training.checkpoint_every_steps was None and is 2", "training.tokens was 384 and is 768",
    ]  # fmt: skip
    longer.run()
    whole = make_trainer(tmp_path / "whole")
    whole.run()
    assert records(tmp_path / "short") == records(tmp_path / "whole")
    assert_equal_tensors(longer, whole)


def test_a_schedule_that_would_have_begun_otherwise_is_refused(tmp_path, make_trainer):
    ramp = 'schedule.learning_rate=[{kind="linear", from=1e-3, to=0.0}]'
    make_trainer(tmp_path, "training.tokens=384", ramp).run()
    with pytest.raises(UserError, match=r"training.tokens was 384 and is 768\..*--allow training.tokens"):
        make_trainer(tmp_path, ramp).resume()


def test_what_is_allowed_by_name_may_change(tmp_path, make_trainer):
    make_trainer(tmp_path, "training.tokens=384").run()
    other = make_trainer(tmp_path, "optimizer.weight_decay=0.2", "training.ema_decay=0.9")
    assert other.resume(["optimizer.weight_decay", "training.ema_decay"])
    assert "optimizer.weight_decay was 0.1 and is 0.2 (allowed)" in other.changes
    for name, each in other.average.tensors().items():
        assert torch.equal(each, other.model.state_dict()[name]), name  # it begins here
    other.run()
    without = make_trainer(tmp_path, "optimizer.weight_decay=0.2")
    assert without.resume(["training"])
    assert without.average is None


def test_tensors_of_another_config_are_refused(tmp_path, make_trainer):
    """A state.json that belongs to another checkpoint; with checksums beside it, it would not be taken at all."""
    make_trainer(tmp_path / "small", "training.tokens=128").run()
    make_trainer(tmp_path / "large", "training.tokens=128", "model.intermediate_size=64").run()
    name = "checkpoints/step-00000001/state.json"
    (tmp_path / "small" / name).write_bytes((tmp_path / "large" / name).read_bytes())
    (tmp_path / "small" / name).with_name("sha256.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint of another config"):
        make_trainer(tmp_path / "small", "training.tokens=128", "model.intermediate_size=64").resume()


def test_an_evaluation_before_and_after_and_the_model_trains_on(tmp_path, make_trainer):
    modes = []

    def evaluate(model):
        model.eval()
        modes.append(model.training)
        return {"score": 0.5}

    trainer = make_trainer(tmp_path, evaluate=evaluate)
    trainer.run()
    assert modes == [False, False]
    assert trainer.model.training
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"], row["score"]) for row in rows] == [(0, 0, 0.5), (6, 768, 0.5)]


def test_checkpoints_of_which_none_is_whole_are_no_reason_to_start_afresh(tmp_path, make_trainer):
    make_trainer(tmp_path, "training.tokens=128").run()
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is whole"):
        make_trainer(tmp_path, "training.tokens=128").resume()
