"""Trains the trajectories that recipes ask for, on any concurrent.futures.Executor.

The unit of work is the trajectory. The driver hands out what no unfinished trajectory precedes,
resumes every recipe whose needs are on record, and goes on until all have returned. Nothing but
the store is shared: a driver or worker that dies costs the rounds since the last checkpoint.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mas_core.config import Data, UserError
from mas_core.federated import TrainingDiverged
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.training import is_done, train
from mas_core.records.trajectory import Trajectory

from .cuda_graph import CapturedSteps
from .meters import Meter
from .progress import Progress

Recipes = dict[Any, Generator[list[Need], None, Any]]
KEPT = "what was done is kept, the same command continues"


class EngineError(RuntimeError):
    """Some trajectories failed, or the workers are gone; the message says which and why."""


class OutOfTime(Exception):
    """A trajectory stopped between two rounds, for want of time for another."""


def train_job(
    trajectory: Trajectory,
    until: int,
    results: str,
    preset: str,
    data_folder: str,
    device: str,
    threads: int | None,
    stop_at: float | None = None,
) -> None:
    """Train one trajectory in this process; all arguments can be sent to another process.

    `threads` of PyTorch (None: as many as there are set). With `stop_at`, seconds since 1970, it
    raises OutOfTime before a round that, by the last one's seconds, would end later.
    """
    before, last = torch.get_num_threads(), [time.time()]

    def in_time(round_: int) -> None:
        now, began = time.time(), last[0]
        last[0] = now
        if stop_at is not None and round_ < until and now + (now - began) > stop_at:
            raise OutOfTime(f"{trajectory.id} stopped at round {round_}")

    store, capture = Store(results, preset), CapturedSteps()
    torch.set_num_threads(threads or before)
    if torch.device(device).type == "cuda":  # float32 is float32; large images use bfloat16
        torch.backends.cudnn.allow_tf32 = False
    try:
        train(trajectory, until, store, Path(data_folder), device, in_time, capture, Meter)
    finally:
        torch.set_num_threads(before)


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
    recipes: Recipes,
    store: Store,
    data_folder: Path | Callable[[Data], Path],
    device: str = "cpu",
    executor: Executor | None = None,
    threads: int | None = None,
    slots: int | Callable[[], int] = 1,
    progress: Progress | None = None,
    resubmit: tuple[type[BaseException], ...] = (),
    stop_at: float | None = None,
) -> dict[Any, Any]:
    """Drive recipes to their end; returns what each returned, by name.

    A trajectory that several recipes need is trained once. At most `slots` jobs are out at a time
    (a function where workers come and go), parents before children, each on `threads` threads
    (None: PyTorch's setting). `resubmit` names errors that mean a worker was lost, not that a job
    failed: such a job is handed out again and resumes, if it got a round further. When a trajectory
    fails, the recipes that need it stop, the others go on, and an EngineError ends the run.

    `data_folder` may give the folder of each `Data`, where trajectories differ in their images.

    With `stop_at`, seconds since 1970, the recipes are in order of worth: what the first ones need
    is trained first, and no round is begun that would end later. Recipes that did not finish
    are missing from what is returned.
    """
    driver = Driver(
        recipes,
        store,
        data_folder if callable(data_folder) else lambda data: data_folder,
        executor or InProcess(),
        lambda: slots() if callable(slots) else slots,
        Progress() if progress is None else progress,
        resubmit,
        stop_at,
    )
    return driver.run((device, threads, *([stop_at] if stop_at else [])))


@dataclass
class Out:
    """A job that is out."""

    need: Need
    had: int  # rounds on record when it was handed out
    since: float  # seconds since 1970


@dataclass
class Driver:
    """One run: what its recipes need, which jobs are out, what failed."""

    recipes: Recipes
    store: Store
    folder_of: Callable[[Data], Path]
    executor: Executor
    slots: Callable[[], int]
    progress: Progress
    resubmit: tuple[type[BaseException], ...]
    stop_at: float | None
    results: dict[Any, Any] = field(default_factory=dict)
    needs: dict[Any, list[Need]] = field(default_factory=dict)  # of the recipes that go on
    failed: dict[str, BaseException] = field(default_factory=dict)  # by trajectory id
    out: dict[Future, Out] = field(default_factory=dict)
    seen: set[tuple[str, int]] = field(default_factory=set)  # (id, round) known to be on record
    pace: float = 0.0  # seconds that a unit of work took, in the slowest job so far

    def run(self, how: tuple) -> dict[Any, Any]:
        """Until every recipe returned, or stopped at a failure; `how` ends a job's arguments."""
        for name in self.recipes:
            self.resume(name)
        while self.needs:
            self.stop_what_failed()
            self.progress.workers = self.slots()
            todo = self.ready()
            self.hand_out(todo, how)
            if not self.out and not any(map(self.all_satisfied, self.needs)):
                if not todo or self.progress.workers:  # nothing left, or nothing in time
                    break
                time.sleep(1.0)  # until there is a worker
            self.take_back()
            for name in [name for name in self.needs if self.all_satisfied(name)]:
                self.resume(name)
            self.progress.failed = len(self.failed)
            self.progress.running = [job.need for job in self.out.values()]
        wait(self.out)  # a job may still be returning whose record is already complete
        self.progress.waiting = [n for n in self.progress.waiting if not self.satisfied(n)]
        self.progress.running = []
        if self.failed:
            raise _failure(self.failed)
        return {name: self.results[name] for name in self.recipes if name in self.results}

    def resume(self, name: Any) -> None:
        """Advance a recipe until it needs something that is not on record."""
        while True:
            try:
                self.needs[name] = next(self.recipes[name])
            except StopIteration as end:
                self.results[name] = end.value
                self.needs.pop(name, None)
                return
            if not self.all_satisfied(name):
                return

    def satisfied(self, need: Need) -> bool:
        known = (need.trajectory.id, need.until)
        if known not in self.seen and is_done(need.trajectory, need.until, self.store):
            self.seen.add(known)
            self.progress.done = len({id_ for id_, _ in self.seen})
        return known in self.seen

    def all_satisfied(self, name: Any) -> bool:
        return all(map(self.satisfied, self.needs[name]))

    def stop_what_failed(self) -> None:
        """End the recipes that need a trajectory that failed, or one of its children."""
        for name in list(self.needs):
            needed = [n for need in self.needs[name] for n in with_ancestors(need)]
            failing = [n for n in needed if n.trajectory.id in self.failed]
            if not all(is_done(n.trajectory, n.until, self.store) for n in failing):
                self.recipes[name].close()
                del self.needs[name]

    def ready(self) -> list[Need]:
        """What could be trained now: one Need a trajectory, to the furthest round asked for.

        Longest first, so that no long one starts when all else is done; with `stop_at` in the
        order of the recipes.
        """
        wanted: dict[str, Need] = {}
        for need in [n for some in self.needs.values() for n in some]:
            for n in with_ancestors(need):
                known = wanted.get(n.trajectory.id)
                if (known is None or known.until < n.until) and not self.satisfied(n):
                    wanted[n.trajectory.id] = n
        busy = {job.need.trajectory.id for job in self.out.values()}
        left = [n for n in wanted.values() if n.trajectory.id not in busy]
        if self.stop_at is None:
            left.sort(key=self.work_left, reverse=True)
        self.progress.waiting = left
        return [
            n
            for n in left
            if n.trajectory.id not in self.failed
            and (n.trajectory.parent is None or n.trajectory.parent.id not in wanted
                 or is_done(n.trajectory.parent, n.trajectory.start_round, self.store))
        ]  # fmt: skip

    def work_left(self, need: Need) -> int:
        rounds = need.until - self.store.rounds_done(need.trajectory)
        return rounds * work_of_a_round(need.trajectory)

    def hand_out(self, todo: list[Need], how: tuple) -> None:
        """Submit as many of them as there are free slots."""
        free = max(0, self.progress.workers - len(self.out))
        todo = [need for need in todo if self.in_time(need)][:free]
        for need in todo:
            t, had = need.trajectory, self.store.rounds_done(need.trajectory)
            self.progress.begun.setdefault(t.id, had)
            self.progress.running = [*(job.need for job in self.out.values()), need]
            # Workers elsewhere have their own working directory.
            where = (os.path.abspath(self.store.results), self.store.preset,
                     os.path.abspath(self.folder_of(t.data)))  # fmt: skip
            begun = time.time()
            try:
                future = self.executor.submit(train_job, t, need.until, *where, *how)
            except BrokenExecutor:
                raise _worker_killed() from None
            self.out[future] = Out(need, had, begun)

    def in_time(self, need: Need) -> bool:
        """Whether a first round would end before `stop_at`, by the slowest job so far."""
        if self.stop_at is None:
            return True
        return time.time() + self.pace * work_of_a_round(need.trajectory) < self.stop_at

    def take_back(self) -> None:
        """Note the jobs that ended within a second, and what failed for good."""
        finished, _ = wait(self.out, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in finished:
            job = self.out.pop(future)
            if future.cancelled():
                raise EngineError(f"the scheduler of the workers is gone; {KEPT}")
            error = future.exception()
            t, rounds = job.need.trajectory, self.store.rounds_done(job.need.trajectory) - job.had
            if rounds > 0:
                took = (time.time() - job.since) / rounds
                self.pace = max(self.pace, took / work_of_a_round(t))
            lost = isinstance(error, self.resubmit) and rounds > 0
            if isinstance(error, BrokenExecutor) and not lost:
                raise _worker_killed() from None
            if error is not None and not lost and not isinstance(error, OutOfTime):
                self.failed[t.id] = error


def work_of_a_round(t: Trajectory) -> int:
    """In passes of an encoder or decoder over a client's data: K E (1 + n)."""
    return t.fl.clients_per_round * t.fl.local_epochs * (1 + len(t.tasks))


def _worker_killed() -> EngineError:
    return EngineError(f"a worker process was killed, perhaps for want of memory; {KEPT}; "
                       "try fewer --workers")  # fmt: skip


def _failure(failed: dict[str, BaseException]) -> Exception:
    """Foreseen failures in a line each; below them the tracebacks of the others."""
    foreseen = {id_: isinstance(e, UserError | TrainingDiverged) for id_, e in failed.items()}
    if all(isinstance(error, UserError) for error in failed.values()):
        return next(iter(failed.values()))
    lines = [f"{len(failed)} trajector{'y' if len(failed) == 1 else 'ies'} failed:"]
    for id_, error in failed.items():
        lines.append(f"  {id_}: {error}" if foreseen[id_]
                     else f"  {id_}: {type(error).__name__}, see below")  # fmt: skip
    for id_ in (id_ for id_ in failed if not foreseen[id_]):
        lines += ["", f"{id_}:", "".join(traceback.format_exception(failed[id_])).rstrip()]
    return EngineError("\n".join(lines))


def with_ancestors(need: Need) -> list[Need]:
    """The trajectory's ancestors, each to the round it is branched at, then itself."""
    if need.trajectory.parent is None:
        return [need]
    return [*with_ancestors(Need(need.trajectory.parent, need.trajectory.start_round)), need]


def collect(recipes: Recipes, store: Store) -> tuple[dict[Any, Any], list[Need]]:
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
