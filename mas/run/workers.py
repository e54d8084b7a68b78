"""Recipes trained on what a user asks for: this process, processes here, Dask or Slurm."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mas_core.config import Data, Settings, UserError
from mas_core.data.processes import local_workers
from mas_core.data.rooms.folder import ensure_rooms, rooms_folder
from mas_core.records.store import Store

from .engine import Recipes, choose_device, run
from .progress import shown_progress

ON_ONE_THREAD = ("tiny", "small")  # sizes whose operators are too small to be shared out


@dataclass(frozen=True)
class Compute:
    """Where to train. Dask and Slurm workers have a GPU each unless the device is "cpu"."""

    workers: int = 1  # processes on this machine; jobs with Slurm
    device: str | None = None  # None: a GPU where there is one
    threads: int | None = None  # of each process; None: one for small networks
    dask: str | None = None  # a scheduler's address, or its scheduler file
    slurm: str | None = None  # a partition

    def __post_init__(self) -> None:
        for name, what in (("dask", "the scheduler's address or file"), ("slurm", "a partition")):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise UserError(f"--{name} is empty; allowed: {what}")


def default_threads(size: str, workers: int = 1, elsewhere: bool = False) -> int | None:
    """PyTorch's threads for networks of this size: one for a small one, else a worker's cores.

    A second thread makes a step of a small network hardly faster, and many times slower as soon as
    another process wants its core. None: as many as a worker elsewhere is set to.
    """
    if size in ON_ONE_THREAD:
        return 1
    return None if elsewhere else max(1, (os.cpu_count() or 1) // workers)


def train_recipes(
    recipes: Recipes,
    store: Store,
    settings: Settings,
    data: Path | str | None,
    compute: Compute,
    **how: Any,
) -> dict[Any, Any]:
    """Drive recipes to their end with progress shown; rooms are rendered where there are none.

    `data` is the folder of the images that `settings` name (None: `rooms_folder`); `how` goes to
    `engine.run`.
    """
    elsewhere = bool(compute.dask or compute.slurm)  # a GPU here says nothing of theirs
    device = (compute.device or "cuda") if elsewhere else choose_device(compute.device)
    folder = ensure_rooms(settings.data, data)

    @cache
    def folder_of(own: Data) -> Path:
        """That folder, or another for images that an experiment renders differently."""
        same = rooms_folder(own) == rooms_folder(settings.data) or own.source != "rooms"
        return folder if same else ensure_rooms(own, None)

    threads = compute.threads or default_threads(settings.model.size, compute.workers, elsewhere)
    executor, slots, others = None, compute.workers, multiprocessing.active_children()
    with ExitStack() as stack:
        if elsewhere:
            from .cluster import dask_workers, slurm_workers

            at = (device, store.results, folder)
            opened = (dask_workers(compute.dask, *at) if compute.dask
                      else slurm_workers(compute.slurm, compute.workers, *at))  # fmt: skip
            executor, slots, how["resubmit"] = stack.enter_context(opened)
        elif compute.workers > 1:
            executor = stack.enter_context(local_workers(compute.workers))
        how["progress"] = stack.enter_context(shown_progress(store))
        try:
            return run(recipes, store, folder_of, device, executor, threads, slots, **how)
        except BaseException:  # do not wait for what still runs
            end_workers(others)
            raise


def end_workers(others: Iterable[BaseProcess]) -> None:
    """End this process's children but for those that were there before."""
    for worker in set(multiprocessing.active_children()) - set(others):
        worker.kill()
