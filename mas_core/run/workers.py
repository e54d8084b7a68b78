"""Training recipes where it was asked for: here, on local processes, on Dask or on Slurm."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any

from ..data.clients import ensure_rooms
from . import engine
from .progress import progress_bar


def train_recipes(
    recipes: dict[Any, Any],
    study: Any,
    data: Path | None,
    workers: int,
    device: str | None,
    dask: str | None = None,
    slurm: str | None = None,
) -> dict[Any, Any]:
    """Drive recipes with a progress bar; on local processes, Dask or Slurm where asked for."""
    elsewhere = bool(dask or slurm)  # where a GPU here says nothing
    device = (device or "cuda") if elsewhere else engine.choose_device(device)
    folder = ensure_rooms(study.settings.data, data)
    with contextlib.ExitStack() as stack:
        executor, threads, slots, resubmit = None, None, workers, ()
        if elsewhere:
            from .cluster import dask_workers, slurm_workers

            at = (device, study.store.results, folder)
            opened = dask_workers(dask, *at) if dask else slurm_workers(slurm, workers, *at)
            executor, slots, resubmit = stack.enter_context(opened)
        elif workers > 1:
            executor = stack.enter_context(engine.local_workers(workers))
            threads = engine.threads_per_worker(workers)
        shown = stack.enter_context(progress_bar(study.store))
        try:
            return engine.run(recipes, study.store, folder, device, executor, threads, slots,
                              shown, resubmit)  # fmt: skip
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
