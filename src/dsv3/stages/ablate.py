"""Several recipes with several seeds each: one process a run, some at once, over one tokenizer and one set of shards.

Those are made first, in `OUT/shared`, and linked into each run's directory, so that a run there looks like any other and is
continued like any other (`dsv3 pretrain ... --resume`).
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.errors import RunError, UserError
from dsv3.recipe.differences import differences
from dsv3.recipe.schema import Recipe
from dsv3.stages.context import RunContext
from dsv3.stages.pretrain import pretraining_stages
from dsv3.stages.runner import Stage, finished, run_stages
from dsv3.training.trainer import Progress

SECONDS_BETWEEN_LOOKS = 0.1
FIRST = "baseline.toml"
"""The recipe of a directory that comes first: what the others are compared with."""


@dataclass(frozen=True)
class Job:
    """One run."""

    path: Path
    """Its recipe."""
    overrides: tuple[str, ...]
    """With the seed's among them."""
    out: Path

    def stages(self, out: Path) -> list[Stage]:
        """Its stages, in a directory."""
        return pretraining_stages(RunContext(Recipe.load(self.path, self.overrides), out))

    @property
    def command(self) -> list[str]:
        """The command line that starts or resumes it."""
        return [
            *(sys.executable, "-m", "dsv3", "pretrain", str(self.path), *self.overrides),
            *("--out", str(self.out), "--resume"),
        ]


def find_recipes(paths: Sequence[Path]) -> list[Path]:
    """The recipes in the order given; a directory stands for those in it, by name but with `FIRST` first."""
    found = [
        recipe
        for path in paths
        for recipe in (
            sorted(path.glob("*.toml"), key=lambda each: (each.name != FIRST, each)) if path.is_dir() else [path]
        )
    ]
    stems = [path.stem for path in found]
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no recipe is there; expected .toml files")
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise UserError(
            f"two recipes are called {sorted(twice)[0]}: expected different names, because runs are named so"
        )
    return found


def ablate(
    recipes: Sequence[Path],
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    jobs: int,
    progress: Progress,
    note: Callable[[str], None],
) -> list[Path]:
    """Runs every recipe with every seed, at most `jobs` at once; returns the runs' directories, by recipe and seed.

    Finished runs are skipped, interrupted ones continued. Raises `UserError` for recipes whose shards differ, and for a run
    that another process is training; `RunError` when runs failed, after the others have ended.
    """
    every = [
        Job(path, (*overrides, f"training.seed={seed}"), out / f"{path.stem}-seed{seed}")
        for path in recipes
        for seed in seeds
    ]
    check_shared(every)
    shared = out / "shared"
    context = RunContext(Recipe.load(every[0].path, every[0].overrides), shared, progress, note)
    *preparing, _ = pretraining_stages(context)
    run_stages(preparing, shared, note, replace=False)
    for job in every:
        link(preparing, shared, job.out)
    waiting = deque(job for job in every if not finished(job.stages(job.out), job.out))
    if skipped := len(every) - len(waiting):
        note(f"runs that are finished: {skipped} of {len(every)}")
    failed = run_jobs(waiting, len(every), jobs, progress, note)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(every)} runs failed: {'; '.join(failed)}. Run this again when the cause is gone: what is done is kept."
        )
    return [job.out for job in every]


def check_shared(jobs: Sequence[Job]) -> None:
    """Refuses recipes that do not make the same tokenizer and shards."""
    inputs = [[stage.inputs for stage in job.stages(Path())[:-1]] for job in jobs]
    for job, found in zip(jobs, inputs, strict=True):
        if changed := differences({"": inputs[0]}, {"": found}):
            raise UserError(
                f"{jobs[0].out.name} and {job.out.name} need different tokenizers or shards: {'; '.join(changed)}. Expected "
                "recipes that share both; data.seed keeps them apart from training.seed"
            )


def link(stages: Sequence[Stage], shared: Path, out: Path) -> None:
    """Links the shared outputs into a run's directory, and copies the records that they are done."""
    (out / "stages").mkdir(parents=True, exist_ok=True)
    for stage in stages:
        place = out / stage.output.relative_to(shared)
        if not place.is_symlink():
            if place.exists():
                raise UserError(f"{place} is there already and was not made by this command; choose another --out")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(stage.output, place.parent))
        record = f"stages/{stage.name}.json"
        shutil.copyfile(shared / record, out / record)


def run_jobs(waiting: deque[Job], total: int, jobs: int, progress: Progress, note: Callable[[str], None]) -> list[str]:
    """Runs the jobs, some at once and spread over the GPUs; says of each that failed where to look.

    On Ctrl-C, running jobs save and end.
    """
    environment, gpus = {**os.environ}, visible_gpus()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    free = deque(gpus[slot % len(gpus)] for slot in range(jobs))
    running: dict[Path, tuple[subprocess.Popen[bytes], float, str]] = {}
    done, failed = total - len(waiting), []
    try:
        while waiting or running:
            while waiting and free:
                job, gpu = waiting.popleft(), free.popleft()
                here = {**environment, "CUDA_VISIBLE_DEVICES": gpu} if len(gpus) > 1 else environment
                running[job.out] = (start(job, here), time.monotonic(), gpu)
                note(f"{job.out.name}: started")
                progress(stage="runs", done=done, total=total, at_once=len(running))
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for out, (process, started, gpu) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[out]
                free.append(gpu)
                done += 1
                note(f"{out.name}: {'failed' if process.returncode else 'done'} in {time.monotonic() - started:.0f} s")
                if process.returncode:
                    failed.append(f"{out.name} ({last_line(out / 'log.txt')}; see {out / 'log.txt'})")
                progress(stage="runs", done=done, total=total, at_once=len(running))
    finally:
        for process, *_ in running.values():
            process.send_signal(signal.SIGINT)
        for process, *_ in running.values():
            process.wait()
    return failed


def visible_gpus() -> list[str]:
    """Their names for `CUDA_VISIBLE_DEVICES`; one empty name where there is none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())] or [""]


def start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts one run in a session of its own, where Ctrl-C does not reach it twice.

    Its log is locked for as long as it lives, even when this process is killed: two may not train in one directory.
    """
    with (job.out / "log.txt").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{job.out} is being trained by another process: wait for it, or end it") from None
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def last_line(path: Path) -> str:
    """The last line of a log that is not blank."""
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
