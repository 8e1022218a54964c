"""The training loop on one device, or on one of many: batches in, weights out.

A step: gradients of the batch's micro-batches, one optimizer step, the routing biases moved by the whole batch's loads,
one line of figures. Everything that the next step depends on is in the checkpoint. The host never waits for the step under
way: its figures are read while the next one computes.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.data.loader import Batch, Loader
from dsv3.errors import RunError
from dsv3.evaluation.mode import evaluating
from dsv3.model.device import pick_device
from dsv3.model.transformer import DeepSeekV3
from dsv3.parallel.copies import symmetric
from dsv3.parallel.dispatch import ExpertParallel
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline.parts import spread
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe
from dsv3.training.balance import routing_biases, update_biases
from dsv3.training.device import COMPUTE_DTYPES
from dsv3.training.ema import Average
from dsv3.training.gradients import Passes, batch_gradients, passes
from dsv3.training.health import Health
from dsv3.training.interrupt import Interrupted, stopping_on_interrupt
from dsv3.training.metrics import Metrics
from dsv3.training.not_finite import first_not_finite
from dsv3.training.optimizer import Optimizer
from dsv3.training.pipelined import Pipelined
from dsv3.training.records import Recorder, Step
from dsv3.training.replay import Replay
from dsv3.training.resume import find_continuation, refuse
from dsv3.training.rng import random_state, restore_random_state
from dsv3.training.saver import Saver
from dsv3.training.sinks import check_sinks, open_sinks
from dsv3.training.timing import timed
from dsv3.training.transfer import Transfer, moment
from dsv3.weights.checkpoint import EMA, EMA_GROUP, MODEL_GROUP, flatten, latest_checkpoint, load_checkpoint
from dsv3.weights.parts import Place

log = logging.getLogger(__name__)
Progress = Callable[..., None]
"""Called as `progress(stage=..., done=..., total=..., **figures)` once a step."""
Evaluate = Callable[[DeepSeekV3], dict[str, Any]]
"""Makes a record of `evaluations.jsonl`, but for step, tokens and seconds."""

NAMED_DOCUMENTS = 50
"""Most documents that a message names."""


class Trainer:
    """One model, from a recipe and a loader to checkpoints in `directory/checkpoints`.

    `files` (name -> path), the tokenizer among them, are copied into each checkpoint. Each rank of `mesh` has a trainer and a loader
    of its slice of the batches; the first writes the records.
    """

    def __init__(
        self,
        recipe: Recipe,
        loader: Loader,
        directory: Path,
        *,
        files: dict[str, Path],
        progress: Progress = lambda **_: None,
        evaluate: Evaluate | None = None,
        mesh: Mesh | None = None,
    ):
        self.recipe, self.loader, self.directory, self.files = recipe, loader, directory, files
        self.mesh = mesh or Mesh()
        self.progress, self.evaluate = progress, evaluate
        training = recipe.training
        check_sinks(recipe.logging)
        self.schedules = Schedules.resolve(recipe)
        self.device = pick_device(training.device)
        if self.device.type == "cuda":
            if self.mesh.world.size > 1:
                self.device = torch.device("cuda", torch.cuda.current_device())  # as `parallel.launch` has set it
            torch.cuda.set_device(self.device)
        self.dtype = COMPUTE_DTYPES[training.precision]
        self.pipelined, gradients, holders = None, None, None
        if self.mesh.pipeline.size > 1:
            self.pipelined = Pipelined(recipe, self.mesh.pipeline, self.skeleton)
            gradients, holders = self.pipelined.gradients, self.pipelined.holders
        model = self.skeleton() if self.pipelined is None else self.pipelined.own()
        self.model = model.to_empty(device=self.device).initialize(training.initialization, training.seed)
        self.model.recompute(training.recompute)
        if training.precision == "fp8":
            self.model.compute_in_fp8(gradients, training.fp8_scaling)
        self.optimizer = Optimizer(self.model, recipe.optimizer, self.dtype, self.mesh, holders)
        self.passes: Passes = passes
        if training.cuda_graphs and self.device.type == "cuda" and training.precision != "fp32":
            if self.mesh.world.size == 1:
                self.passes, self.optimizer.keep_gradients = Replay(), True
            elif self.mesh.first:
                log.warning("training.cuda_graphs: passes are not recorded on several ranks, whose hosts read sizes")
        shares = self.optimizer.shares
        self.weights = shares.masters(self.model.state_dict())
        """What is trained, in FP32: whole, or this rank's rows of what is whole only in BF16."""
        self.average = None
        if training.ema_decay is not None:
            self.average = Average(self.weights, training.ema_decay, shares.spread_masters)
        self.saver = Saver(training.keep_last, training.keep_every_steps, self.mesh.saving)
        self.health = Health()
        self.recorder = Recorder(recipe, self.device)
        self.step_count, self.token_count, self.row_count, self.seconds = 0, 0, 0, 0.0
        self.pending: deque[Step] = deque()
        """Steps whose figures are not read yet."""
        self.delay = 1 if self.device.type == "cuda" else 0
        """How many steps later they are read."""
        self.last: dict[str, Any] = {}
        """The newest record."""
        self.changes: list[str] = []
        """Accepted differences from the recipe of the checkpoint that this run continues from."""
        self.stop = False
        self.spent: dict[str, float] = {}
        """Seconds spent outside the step itself, by what for; see `dsv3 bench train --overhead`."""

    def skeleton(self) -> DeepSeekV3:
        """The recipe's whole network, on the meta device."""
        fp8, parallel = self.recipe.training.precision == "fp8", self.recipe.parallel
        experts = None
        if self.mesh.expert.size > 1:
            copies = symmetric if parallel.transport == "copy" else None
            experts = ExpertParallel(self.mesh, fp8, parallel.bounded_exchange, copies)
        with torch.device("meta"):
            return DeepSeekV3(self.recipe.model.config(), self.dtype, experts)

    def run(self) -> None:
        """Trains to the recipe's last token. Ctrl-C finishes the step, saves and raises `Interrupted`."""
        training = self.recipe.training
        self.directory.mkdir(parents=True, exist_ok=True)
        self.model.train()
        fresh = self.step_count == 0
        if fresh and self.average is not None:
            self.average.restart()  # the weights may have come from elsewhere by now
        first = self.step_count + 1
        with self.metrics() as metrics, self.saver, stopping_on_interrupt(self.request_stop):
            if fresh:
                self.run_evaluation(metrics)
            while self.token_count < training.tokens:
                self.saver.check()
                self.step()
                if self.step_count == first:
                    self.saver.prepare(self.tensors())
                last = self.token_count >= training.tokens
                # On all ranks if on one. Read once a step, as Ctrl-C may come while we save.
                stop = bool(self.mesh.world.sum_(torch.tensor(int(self.stop))))
                score = last or due(self.step_count, training.evaluate_every_steps)
                save = last or stop or due(self.step_count, training.checkpoint_every_steps)
                self.record(metrics, 0 if score or save else self.delay)
                if score:
                    self.run_evaluation(metrics)
                if save:
                    self.save()
                self.show()
                if stop and not last:
                    self.saver.finish()
                    raise Interrupted(f"stopped after step {self.step_count}; saved in {self.checkpoint_directory}")

    def metrics(self) -> AbstractContextManager[Metrics | None]:
        """Where the records of this run go; None on all ranks but the first."""
        if not self.mesh.first:
            return nullcontext()
        sinks = open_sinks(self.recipe.logging, self.directory.resolve().parent.name, self.recipe.to_dict())
        return Metrics(self.directory, self.step_count or None, sinks)

    def request_stop(self) -> None:
        """Has the run stop after this step, as Ctrl-C does."""
        self.stop = True

    def step(self) -> None:
        """One optimizer step; its figures join `pending`."""
        self.mesh.activity.begin(f"step {self.step_count + 1}")
        started, began = time.perf_counter(), moment(self.device)
        at = (self.step_count, self.token_count)
        size = self.schedules.batch_size.at(*at)
        learning_rate = self.schedules.learning_rate.at(*at)
        speed = self.schedules.bias_update_speed.at(*at) if self.recipe.training.balance == "bias" else 0.0
        mtp_weight = self.schedules.mtp_weight.at(*at)
        with timed(self.spent, "data"):
            batch = self.loader.batch(self.row_count, size)
        losses, load = self.gradients(batch, mtp_weight, self.passes)
        norms = self.optimizer.clip()
        keep = losses[0].isfinite() & norms["all"].isfinite()
        if self.average is not None:
            self.average.before_change()
        self.optimizer.step(learning_rate, ~keep)
        update_biases(self.model, load, speed, keep)
        if self.average is not None:
            with timed(self.spent, "average"):
                self.average.update()
        first_row = self.row_count
        self.step_count, self.row_count = self.step_count + 1, self.row_count + size
        self.token_count += size * self.recipe.data.sequence_length
        with timed(self.spent, "metrics"):
            measured = {"losses": losses, "skipped": ~keep}
            biases = routing_biases(self.model, load, self.mesh.pipeline)
            for kind, values in (("norm", norms), ("load", load), ("bias", biases)):
                measured |= {f"{kind} {name}": value for name, value in values.items()}
            scheduled = {
                "learning_rate": learning_rate, "mtp_weight": mtp_weight, "bias_update_speed": speed, "batch_size": size,
            }  # fmt: skip
            transfer = Transfer(measured, began)
            self.pending.append(Step(self.step_count, self.token_count, first_row, scheduled, transfer))
        self.seconds += time.perf_counter() - started

    def gradients(self, batch: Batch, mtp_weight: float, run: Passes = passes) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch_gradients` as the recipe has it."""
        training, masked = self.recipe.training, self.recipe.data.document_mask
        return batch_gradients(
            self.model, batch, training.micro_batch_size,
            document_mask=masked, mtp_weight=mtp_weight, balance_alpha=training.balance_alpha,
            batch_wise=training.balance == "batch", run=run, data=self.mesh.data,
            together=None if self.pipelined is None else self.pipelined.passes,
        )  # fmt: skip

    def record(self, metrics: Metrics | None, delay: int) -> None:
        """Writes the figures of all steps but the `delay` newest; `RunError` where too many in a row were skipped."""
        while len(self.pending) > delay:
            step, started = self.pending.popleft(), time.perf_counter()
            values = step.transfer.read()
            self.seconds += time.perf_counter() - started
            with timed(self.spent, "metrics"):
                self.last = self.recorder.record(step, values, self.health, self.seconds)
            if metrics is not None:
                with timed(self.spent, "logging"):
                    metrics.step(self.last)
            first = self.health.skipped_from
            if first is None:
                continue
            why = self.named(step)
            if self.mesh.first:
                log.warning("step %d was skipped: loss or gradient is not finite. %s", step.number, why)
            if step.number - first >= self.recipe.training.max_skipped_steps:
                raise RunError(self.not_finite(step, first, why))

    def show(self) -> None:
        """Reports progress."""
        if not self.mesh.first:
            return
        figures = {key: self.last[key] for key in ("loss", "tokens_per_second") if self.last.get(key) is not None}
        if self.health.skipped:
            figures["skipped"] = self.health.skipped
        with timed(self.spent, "logging"):
            self.progress(
                stage=self.directory.name, done=self.token_count, total=self.recipe.training.tokens, step=self.step_count,
                **figures,
            )  # fmt: skip

    def run_evaluation(self, metrics: Metrics | None) -> None:
        """Runs the evaluation that was handed in, on the weights and on their average, and writes the result."""
        if self.evaluate is None:
            return
        self.mesh.activity.begin("evaluation")
        found = self.scores(self.evaluate)
        if self.average is not None and self.step_count:
            with self.average.in_place():
                found = {**found, "ema": self.scores(self.evaluate)}
        if metrics is not None:
            at = {"step": self.step_count, "tokens": self.token_count, "seconds": round(self.seconds, 3)}
            metrics.evaluation({**at, **found})

    def scores(self, evaluate: Evaluate) -> dict[str, Any]:
        """The evaluation's result for the current weights, computed by the first data-parallel rank of every pipeline stage; with
        experts spread over ranks, by all of them, as each computes its experts for all. Other ranks wait."""
        found = dict[str, Any]()
        if self.mesh.data.rank == 0 or self.mesh.expert.size > 1:
            model = self.model
            if self.pipelined is not None:
                model = spread(self.model, self.skeleton(), self.pipelined.holders, self.mesh.pipeline)
            with evaluating(self.model), evaluating(model):
                found = evaluate(model)
        self.mesh.world.objects(None)
        return found

    @property
    def checkpoint_directory(self) -> Path:
        """Where this step's checkpoint is, or would be."""
        return self.directory / "checkpoints" / f"step-{self.step_count:08d}"

    def save(self) -> None:
        """Starts writing a checkpoint; `RunError` when the one before could not be written."""
        state = {
            "step": self.step_count, "tokens": self.token_count, "rows": self.row_count, "seconds": self.seconds,
            "updates of the average": 0 if self.average is None else self.average.updates,
            "random": random_state(self.device), "health": self.health.state(),
            "recipe": self.recipe.to_dict(), "model": self.recipe.model.config().to_hf(),
        }  # fmt: skip
        with timed(self.spent, "checkpoints"):
            self.saver.save(self.checkpoint_directory, self.tensors(), state, self.files, self.places())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint."""
        tensors = {MODEL_GROUP: self.weights, "optimizer": self.optimizer.tensors()}
        return tensors if self.average is None else {**tensors, EMA_GROUP: self.average.tensors()}

    def places(self) -> dict[str, Place] | None:
        """Where each of `tensors` lies in what all ranks have together, by its name in a checkpoint; None for a rank alone."""
        if self.mesh.world.size == 1:
            return None
        shares = self.optimizer.shares
        model = {
            name: shares.place(name) if name in shares.narrow else shares.whole_place(name, each)
            for name, each in self.weights.items()
        }
        groups = {MODEL_GROUP: model, "optimizer": self.optimizer.places()}
        if self.average is not None:
            groups[EMA_GROUP] = model
        return {f"{group}.{name}": place for group, places in groups.items() for name, place in places.items()}

    def resume(self, allow: Sequence[str] = ()) -> bool:
        """Continues from the newest checkpoint of the run's directory; False where there is none.

        `allow` names keys or sections of the recipe that may differ although they change the result. Raises `UserError` when
        the checkpoint holds another network, or was trained with another recipe than may go on.
        """
        found = self.mesh.on_first(lambda: find_continuation(self.directory / "checkpoints", self.recipe, allow))
        if found is None:
            return False
        if found.refused:
            raise refuse(found.directory, found.refused)
        state, tensors = found.state, self.tensors()
        averaged = Recipe.from_dict(state["recipe"]).training.ema_decay is not None
        if self.average is not None and not averaged:
            del tensors[EMA_GROUP]
        leave = [] if self.average is not None else [EMA]
        elsewhere = {name for names in self.mesh.world.objects(list(flatten(tensors))) for name in names}
        load_checkpoint(found.directory, tensors, leave, self.places(), elsewhere)
        self.optimizer.shares.spread_masters()
        if self.average is not None and averaged:
            self.average.updates = state["updates of the average"]
        elif self.average is not None:
            self.average.restart()
        self.step_count, self.token_count = state["step"], state["tokens"]
        self.row_count, self.seconds = state["rows"], state["seconds"]
        self.health, self.recorder.before = Health(state["health"]), state["seconds"]
        restore_random_state(state["random"], self.device)
        self.changes = found.accepted
        return True

    def named(self, step: Step) -> str:
        """Which tensor of a skipped step is the first that is not finite, and which rows and documents the step had."""
        size = step.scheduled["batch_size"]
        batch, last = self.loader.rows(step.first_row, size), step.first_row + size - 1
        found = None
        if self.mesh.world.size > 1:
            first = "A run of several ranks does not look for what was so first"
        else:
            first = "Computed again with the weights of now, all of it is finite"
            found = first_not_finite(self.model, lambda: self.gradients(batch, step.scheduled["mtp_weight"])[0])
        if isinstance(self.passes, Replay):
            self.passes = Replay()  # the recording adds to gradients that are gone
        if found is not None:
            first = f"The first that is not is {found.what}"
        if found is not None and found.place is not None:
            micro, (row, position) = self.recipe.training.micro_batch_size or size, found.place
            row += found.micro_batch * micro % size  # balance over the batch takes every micro-batch twice
            segment = int(batch.segment_ids[row, position])
            inside = self.loader.describe(replace(batch, documents=[batch.documents[row][segment : segment + 1]]))
            first += f", from position {position} of row {step.first_row + row} on ({', '.join(inside) or 'padding'})"
        documents = self.loader.describe(batch)
        more = f" and {len(documents) - NAMED_DOCUMENTS:,} more" if len(documents) > NAMED_DOCUMENTS else ""
        return (
            f"{first}. Its batch holds rows {step.first_row} to {last}, with the documents "
            f"{', '.join(documents[:NAMED_DOCUMENTS])}{more}"
        )

    def not_finite(self, step: Step, first: int, why: str) -> str:
        """The message for a loss or a gradient that is not finite in `step` and all steps from `first` on; see `named`."""
        self.saver.wait()
        what = "loss" if self.last["loss"] is None else "gradient"
        kept = latest_checkpoint(self.directory / "checkpoints")
        since = f", as in every step since {first}; these were skipped" if step.number > first else ""
        return (
            f"the {what} of step {step.number} is not finite{since}. {why}. The last good "
            f"checkpoint is {kept or 'none: none was written yet'}. Lower the learning rate, or look at these documents."
        )


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0
