"""Trains the trajectories that recipes ask for, on any concurrent.futures.Executor.

The unit of work is the trajectory. The driver hands out what no unfinished trajectory precedes,
resumes every recipe whose needs are on record, and goes on until all have returned. Nothing but
the store is shared: a driver or worker that dies costs the rounds since the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..config import UserError
from ..methods import Need
from ..records.store import Store
from ..records.training import is_done, train
from ..records.trajectory import Trajectory
from .cuda_graph import CapturedSteps


class EngineError(RuntimeError):
    """Some trajectories failed; the message holds each traceback once."""


@dataclass
class Progress:
    """What a driver knows while it runs; another thread may read it to show it."""

    done: int = 0  # trajectories on record, counted when a recipe needs them
    failed: int = 0
    workers: int = 1  # how many jobs can be out at a time, by now
    running: list[Need] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)  # id -> rounds on record when handed out
    waiting: list[Need] = field(default_factory=list)


def train_job(
    trajectory: Trajectory,
    until: int,
    results: str,
    preset: str,
    data_folder: str,
    device: str,
    threads: int | None,
) -> None:
    """One trajectory in whatever process this is; everything it takes can be sent anywhere."""
    if threads:
        torch.set_num_threads(threads)
    store = Store(results, preset)
    train(trajectory, until, store, Path(data_folder), device, capture=CapturedSteps())


def choose_device(name: str | None = None) -> str:
    """The device named, or the GPU where there is one, else the CPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {name!r}: there is no GPU here; allowed: cpu")
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"unknown device {name!r}; for example: cpu, cuda, cuda:1") from None
    return name


def local_workers(workers: int) -> ProcessPoolExecutor:
    """Processes on this machine, each a fresh interpreter (CUDA allows no fork).

    They leave Ctrl-C to the driver, which tells the user once.
    """
    return ProcessPoolExecutor(
        workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )


def threads_per_worker(workers: int) -> int:
    """The machine's cores shared out, at least one each."""
    return max(1, (os.cpu_count() or 1) // workers)


class InProcess(Executor):
    """Runs a job when it is submitted, in this thread: the default, and the simplest to debug."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def run(
    recipes: dict[str, Generator[list[Need], None, Any]],
    store: Store,
    data_folder: Path,
    device: str = "cpu",
    executor: Executor | None = None,
    threads: int | None = None,
    slots: int | Callable[[], int] = 1,
    progress: Progress | None = None,
    resubmit: tuple[type[BaseException], ...] = (),
) -> dict[str, Any]:
    """Drive recipes to their end; returns what each returned, by name.

    A trajectory that several recipes need is trained once. At most `slots` jobs are out at a time
    (a function where workers come and go), parents before children. `resubmit` names errors that
    mean a worker was lost, not that a job failed: such a job is handed out again and resumes, if
    it got a round further. When a trajectory fails, the recipes that need it stop, the others go
    on, and an EngineError with every traceback ends the run.
    """
    executor = executor or InProcess()
    results: dict[str, Any] = {}
    needs: dict[str, list[Need]] = {}  # of the recipes that go on
    failed: dict[str, BaseException] = {}
    out: dict[Future, Need] = {}
    begun: dict[Future, int] = {}  # rounds on record when it was handed out
    # Workers elsewhere have their own working directory.
    where = (os.path.abspath(store.results), store.preset, os.path.abspath(data_folder))
    seen: set[tuple[str, int]] = set()
    progress = Progress() if progress is None else progress

    def resume(name: str) -> None:
        """Advance a recipe until it needs something that is not on record."""
        while True:
            try:
                needs[name] = next(recipes[name])
            except StopIteration as end:
                results[name] = end.value
                needs.pop(name, None)
                return
            if not all(map(_satisfied, needs[name])):
                return

    def _satisfied(need: Need) -> bool:
        known = (need.trajectory.id, need.until)
        if known not in seen and is_done(need.trajectory, need.until, store):
            seen.add(known)
            progress.done = len({id_ for id_, _ in seen})
        return known in seen

    def work_left(need: Need) -> int:
        """Rounds left times what one costs: no long one shall start when all else is done."""
        fl = need.trajectory.fl
        a_round = fl.clients_per_round * fl.local_epochs * (1 + len(need.trajectory.tasks))
        return (need.until - store.rounds_done(need.trajectory)) * a_round

    def ready() -> list[Need]:
        """What could be trained now, longest first: one Need a trajectory, to its last round."""
        wanted: dict[str, Need] = {}
        for n in [n for some in needs.values() for need in some for n in with_ancestors(need)]:
            known = wanted.get(n.trajectory.id)
            if (known is None or known.until < n.until) and not _satisfied(n):
                wanted[n.trajectory.id] = n
        busy = {need.trajectory.id for need in out.values()}
        left = [n for n in wanted.values() if n.trajectory.id not in busy]
        progress.waiting = sorted(left, key=work_left, reverse=True)
        return [
            n
            for n in progress.waiting
            if n.trajectory.id not in failed
            and (n.trajectory.parent is None or n.trajectory.parent.id not in wanted
                 or is_done(n.trajectory.parent, n.trajectory.start_round, store))
        ]  # fmt: skip

    for name in recipes:
        resume(name)
    while needs:
        for name in list(needs):
            needed = [n for need in needs[name] for n in with_ancestors(need)]
            failing = [n for n in needed if n.trajectory.id in failed]
            if not all(is_done(n.trajectory, n.until, store) for n in failing):
                recipes[name].close()
                del needs[name]
        progress.workers = slots() if callable(slots) else slots
        todo = ready()
        for need in todo[: max(0, progress.workers - len(out))]:
            had = store.rounds_done(need.trajectory)
            progress.begun.setdefault(need.trajectory.id, had)
            progress.running = [*out.values(), need]
            job = (need.trajectory, need.until, *where, device, threads)
            try:
                future = executor.submit(train_job, *job)
            except BrokenExecutor:
                raise EngineError("a worker process was killed, perhaps for want of memory; what "
                                  "was done is kept, the same command continues; --workers may "
                                  "be lower") from None  # fmt: skip
            out[future], begun[future] = need, had
        if not out and not todo and not any(all(map(_satisfied, n)) for n in needs.values()):
            break
        if todo and not out:
            time.sleep(1.0)  # until there is a worker
        finished, _ = wait(out, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in finished:
            need = out.pop(future)
            if future.cancelled():
                raise EngineError("the scheduler of the workers is gone; what was done is kept, "
                                  "the same command continues")  # fmt: skip
            error, further = future.exception(), store.rounds_done(need.trajectory) > begun[future]
            if error is not None and not (isinstance(error, resubmit) and further):
                failed[need.trajectory.id] = error
        for name in list(needs):
            if all(map(_satisfied, needs[name])):
                resume(name)
        progress.failed, progress.running = len(failed), list(out.values())
    wait(out)  # a job may still be returning whose record is already complete
    progress.waiting = [n for n in progress.waiting if not _satisfied(n)]
    progress.running = []
    if failed:
        if all(isinstance(error, UserError) for error in failed.values()):
            raise next(iter(failed.values()))
        texts = [f"{id_}:\n" + "".join(traceback.format_exception(e)) for id_, e in failed.items()]
        raise EngineError(f"{len(failed)} trajectories failed\n\n" + "\n".join(texts))
    return {name: results[name] for name in recipes}


def with_ancestors(need: Need) -> list[Need]:
    """The trajectory's ancestors, each to the round it is branched at, then itself."""
    if need.trajectory.parent is None:
        return [need]
    return [*with_ancestors(Need(need.trajectory.parent, need.trajectory.start_round)), need]


def collect(
    recipes: dict[Any, Generator[list[Need], None, Any]], store: Store
) -> tuple[dict[Any, Any], list[Need]]:
    """What recipes return from the records alone, and the needs that stop the others.

    A recipe that decides by results it does not have yet names only its first needs.
    """
    results, missing = {}, []
    for name, recipe in recipes.items():
        try:
            while True:
                absent = [n for n in next(recipe) if not is_done(n.trajectory, n.until, store)]
                if absent:
                    missing += absent
                    recipe.close()
                    break
        except StopIteration as end:
            results[name] = end.value
    return results, missing
