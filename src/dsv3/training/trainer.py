"""The training loop on one device: batches in, weights out.

A step: gradients of the batch's micro-batches, one optimizer step, the routing biases moved by the whole batch's loads,
one line of figures. Everything that the next step depends on is in the checkpoint.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dsv3.data.loader import Batch, Loader
from dsv3.errors import RunError, UserError
from dsv3.model.transformer import DeepSeekV3, Losses, targets
from dsv3.ops.cross_entropy import IGNORE
from dsv3.recipe.differences import differences
from dsv3.recipe.schedule import Schedules
from dsv3.recipe.schema import Recipe
from dsv3.training.balance import balance_figures, mean_by_block, update_biases
from dsv3.training.metrics import Metrics
from dsv3.training.optimizer import Optimizer
from dsv3.weights.checkpoint import latest_checkpoint, load_checkpoint, read_state, save_checkpoint

Progress = Callable[..., None]
"""Called as `progress(stage=..., done=..., total=..., **figures)` once a step."""
Evaluate = Callable[[DeepSeekV3], dict[str, Any]]
"""What `evaluations.jsonl` holds beside step, tokens and seconds."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written; the message names it."""


class Trainer:
    """One model on one device, from a recipe and a loader to checkpoints in `directory/checkpoints`.

    `files` (name -> path) are copied into each checkpoint, the tokenizer among them.
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
    ):
        self.recipe, self.loader, self.directory, self.files = recipe, loader, directory, files
        self.progress, self.evaluate = progress, evaluate
        self.schedules = Schedules.resolve(recipe)
        self.device = pick_device(recipe.training.device)
        dtype = DTYPES[recipe.training.precision]
        model = DeepSeekV3(recipe.model.config(), compute_dtype=dtype)
        self.model = model.initialize(recipe.training.initialization, recipe.training.seed).to(self.device)
        self.optimizer = Optimizer(self.model, recipe.optimizer, muon_dtype=dtype)
        self.step_count, self.token_count, self.row_count, self.seconds = 0, 0, 0, 0.0
        self.stop = False

    def run(self) -> None:
        """Trains to the recipe's last token. Ctrl-C finishes the step, saves and raises `Interrupted`."""
        training = self.recipe.training
        self.directory.mkdir(parents=True, exist_ok=True)
        self.model.train()
        fresh = self.step_count == 0
        with Metrics(self.directory, None if fresh else self.step_count) as metrics, self.stopping_on_interrupt():
            if fresh:
                self.run_evaluation(metrics)
            while self.token_count < training.tokens:
                record = self.step()
                metrics.step(record)
                last = self.token_count >= training.tokens
                if last or due(self.step_count, training.evaluate_every_steps):
                    self.run_evaluation(metrics)
                stop = self.stop  # read once: Ctrl-C may come while we save
                if last or stop or due(self.step_count, training.checkpoint_every_steps):
                    self.save()
                self.progress(
                    stage=self.directory.name, done=self.token_count, total=training.tokens,
                    step=self.step_count, loss=record["loss"], tokens_per_second=record["tokens_per_second"],
                )  # fmt: skip
                if stop and not last:
                    raise Interrupted(f"stopped after step {self.step_count}; saved in {self.checkpoint_directory}")

    def step(self) -> dict[str, Any]:
        """One optimizer step; its figures, as `metrics.jsonl` holds them."""
        started = time.perf_counter()
        at = (self.step_count, self.token_count)
        size = self.schedules.batch_size.at(*at)
        learning_rate = self.schedules.learning_rate.at(*at)
        speed = self.schedules.bias_update_speed.at(*at) if self.recipe.training.balance == "bias" else 0.0
        mtp_weight = self.schedules.mtp_weight.at(*at)
        batch = self.loader.batch(self.row_count, size)
        loss, mtp, balance, load = self.gradients(batch, mtp_weight)
        grad_norm = self.optimizer.clip()
        for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
            if not math.isfinite(value):
                raise RunError(self.not_finite(what, value, batch))
        self.optimizer.step(learning_rate)
        update_biases(self.model, load, speed)
        self.step_count, self.row_count = self.step_count + 1, self.row_count + size
        self.token_count += size * self.recipe.data.sequence_length
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        figures = {name: asdict(each) for name, each in balance_figures(self.model, load).items()}
        record = {
            "step": self.step_count, "tokens": self.token_count, "seconds": round(self.seconds, 3),
            "loss": loss, "mtp_losses": mtp, "balance_loss": balance, "grad_norm": grad_norm,
            "learning_rate": learning_rate, "mtp_weight": mtp_weight, "bias_update_speed": speed, "batch_size": size,
            "tokens_per_second": size * self.recipe.data.sequence_length / elapsed,
        }  # fmt: skip
        for key in ("max_vio", "bias_magnitude", "dead_experts"):
            record[key] = {name: each[key] for name, each in figures.items()}
        if due(self.step_count, self.recipe.training.load_every_steps):
            record["load"] = {name: [round(x, 5) for x in each["load"]] for name, each in figures.items()}
        return record

    def gradients(self, batch: Batch, mtp_weight: float) -> tuple[float, list[float], float, dict[str, Tensor]]:
        """Accumulates the batch's gradients; (loss, MTP losses, balance loss, load by block) of the whole batch."""
        rows, training = len(batch.tokens), self.recipe.training
        micro = training.micro_batch_size or rows
        count = rows // micro
        batch_wise = training.balance == "batch"
        segments = batch.segment_ids if self.recipe.data.document_mask else None
        divisor = float((targets(batch.tokens, 1, batch.valid, segments) != IGNORE).sum()) / count

        def forward(start: int, frequency: dict[str, Tensor]) -> Losses:
            part = slice(start, start + micro)
            return self.model.loss(
                batch.tokens[part].to(self.device),
                valid=batch.valid[part].to(self.device),
                positions=batch.positions[part].to(self.device),
                segment_ids=None if segments is None else segments[part].to(self.device),
                mtp_weight=mtp_weight,
                balance_alpha=training.balance_alpha,
                batch_wise=batch_wise,
                frequency=frequency,
                scale=1 / count,
                divisor=divisor,
            )

        starts, frequency = range(0, rows, micro), dict[str, Tensor]()
        if batch_wise and count > 1:
            # The first micro-batch's gradient needs the loads of the last one: they are counted in a pass of their own.
            with torch.no_grad():
                frequency = mean_by_block([forward(start, {}).frequency for start in starts])
        figures, load = [], dict[str, Tensor]()
        for start in starts:
            losses = forward(start, frequency)
            losses.total.backward()
            figures.append(torch.stack([losses.main, losses.balance, *losses.mtp]))
            for name, each in losses.load.items():
                load[name] = load[name] + each if name in load else each
        main, balance, *mtp = torch.stack(figures).mean(0).tolist()
        return main, mtp, balance, load

    def run_evaluation(self, metrics: Metrics) -> None:
        """Calls the evaluation that was handed in and writes what it found."""
        if self.evaluate is None:
            return
        self.model.eval()
        found = self.evaluate(self.model)
        self.model.train()
        at = {"step": self.step_count, "tokens": self.token_count, "seconds": round(self.seconds, 3)}
        metrics.evaluation({**at, **found})

    @property
    def checkpoint_directory(self) -> Path:
        """Where this step's checkpoint is, or would be."""
        return self.directory / "checkpoints" / f"step-{self.step_count:08d}"

    def save(self) -> None:
        """Writes a checkpoint; `RunError` when that fails, with nothing left that looks whole."""
        state = {
            "step": self.step_count, "tokens": self.token_count, "rows": self.row_count, "seconds": self.seconds,
            "recipe": self.recipe.to_dict(), "model": self.recipe.model.config().to_hf(),
        }  # fmt: skip
        save_checkpoint(self.checkpoint_directory, self.tensors(), state, self.files)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of a checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.tensors()}

    def resume(self) -> bool:
        """Continues from the newest checkpoint of the run's directory; False where there is none.

        Raises `UserError` when it holds another network or another recipe than this one.
        """
        found = latest_checkpoint(self.directory / "checkpoints")
        if found is None:
            return False
        state = read_state(found)
        changed = differences(Recipe.from_dict(state["recipe"]).content(), self.recipe.content())
        if changed:
            raise UserError(
                f"{found} was trained with another recipe: {'; '.join(changed)}. Continue with the recipe it was "
                "trained with, or start in another directory."
            )
        load_checkpoint(found, self.tensors())
        self.step_count, self.token_count = state["step"], state["tokens"]
        self.row_count, self.seconds = state["rows"], state["seconds"]
        return True

    def not_finite(self, what: str, value: float, batch: Batch) -> str:
        """What to say of a loss or a gradient that is not finite."""
        kept = latest_checkpoint(self.directory / "checkpoints")
        documents = ", ".join(self.loader.describe(batch))
        return (
            f"the {what} of step {self.step_count + 1} is {value}. Its batch holds rows {self.row_count} to "
            f"{self.row_count + len(batch.tokens) - 1}, with the documents {documents}. The last good checkpoint is "
            f"{kept or 'none: none was written yet'}. Lower the learning rate, or look at these documents."
        )

    @contextmanager
    def stopping_on_interrupt(self) -> Iterator[None]:
        """Turns the first Ctrl-C into a request to stop after this step; a second one acts at once."""

        def request(number: int, frame: FrameType | None) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            before = signal.signal(signal.SIGINT, request)
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"training.device = {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:0'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"training.device = {name!r}, but torch finds no GPU here; use 'auto' or 'cpu'")
    return device
