"""One process of a job that `torchrun` started: it joins the others, and they check that all run the same thing."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv3.errors import RunError, UserError
from dsv3.parallel.activity import LostError
from dsv3.parallel.mesh import Mesh, make_mesh
from dsv3.parallel.watchdog import note, speaks, watching, whereabouts
from dsv3.recipe.parallel import check_world
from dsv3.recipe.schema import Recipe

TIMEOUT = timedelta(minutes=10)
"""How long one operation may wait for the other ranks before the job ends."""


@contextmanager
def launched(recipe: Recipe, timeout: timedelta = TIMEOUT) -> Iterator[Mesh]:
    """The mesh of this process, for as long as the context lasts; without `torchrun`, that of a process alone.

    Raises `UserError` where the recipe is for another number of processes, needs what this torch has not, or is not the same on
    all of them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(recipe.parallel, size)
    if size == 1:
        yield Mesh()
        return
    per_node, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
    on_gpu = recipe.training.device != "cpu" and gpus > 0
    if on_gpu and not dist.is_nccl_available():
        raise UserError(
            "this torch was built without NCCL, which GPUs talk through: install one with it, or training.device=cpu"
        )
    if on_gpu and per_node > gpus:
        raise UserError(
            f"torchrun started {per_node} processes on a machine of {gpus} GPUs: one each, with --nproc-per-node {gpus}, or "
            "training.device=cpu"
        )
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    found, rank, _ = next(rendezvous("env://", timeout=timeout))
    # After a restart by `torchrun --max-restarts` the store may still hold addresses of ranks that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        mesh = make_mesh(recipe.parallel, per_node)
        check_same(mesh, recipe)
        with watching(mesh, timeout, store):
            yield mesh
            mesh.world.objects(None)
    except (UserError, RunError) as error:
        if not speaks(store):
            time.sleep(1)  # torchrun ends the others as soon as one ends: the one with the message goes first
            sys.exit(2 if isinstance(error, UserError) else 1)
        if isinstance(error, LostError):
            note(mesh, store)
            raise RunError(f"{error} {whereabouts(store, size)}") from error
        raise
    # Not after an error: the others may be gone, and destroying the group would wait for them.
    dist.destroy_process_group()


def check_same(mesh: Mesh, recipe: Recipe) -> None:
    """`UserError` on every rank where one has another recipe, version of dsv3's code, or torch than the first."""
    own = {
        "recipe": digest(repr(recipe.to_dict()).encode()),
        "code of dsv3": digest(*(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))),
        "version of torch": torch.__version__,
    }
    ranks = mesh.world.objects(own)
    for what, expected in ranks[0].items():
        if others := [rank for rank, each in enumerate(ranks) if each[what] != expected]:
            raise UserError(
                f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others[:8]))} of {len(ranks)} "
                f"{'have' if len(others) > 1 else 'has'} another {what} than rank 0 ({ranks[others[0]][what]}, not "
                f"{expected}): start all ranks with the same command, in the same checkout"
            )


def digest(*contents: bytes) -> str:
    """The first twelve digits of their SHA-256."""
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]
