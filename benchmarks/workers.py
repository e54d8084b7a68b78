"""Trajectories per hour: two worker processes of one thread on two cores, against one.

Both sides run through `engine.run` on worker processes that are already up, so that starting
Python and importing PyTorch, once a run, is not counted. What two cores of this machine can do at
all (they share caches, memory and clock, virtual ones perhaps a core) is measured beside it: two
processes that train half of the trajectories each, with no engine.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from statistics import median

from mas.run.engine import run, train_job
from mas_core.data.processes import local_workers
from mas_core.methods import Need
from mas_core.records.store import Store
from mas_core.records.trajectory import Trajectory

from .scenes import prepared
from .timing import Row, compare, in_turns, main, wall


def measure(quick: bool, folder: Path) -> list[Row]:
    rounds, jobs = (1, 2) if quick else (3, 4)
    preset, rooms = prepared(quick, folder)
    fl = replace(preset.fl, rounds=rounds)
    trajectories = [Trajectory("sd", s, preset.data, preset.model, fl) for s in range(jobs)]

    def train_all(executor: Executor, workers: int) -> None:
        with tempfile.TemporaryDirectory() as results:
            recipes = {t.id: _recipe(t) for t in trajectories}
            run(recipes, Store(results, "bench"), rooms, "cpu", executor, 1, workers)

    def train_halves(executor: Executor) -> None:
        with tempfile.TemporaryDirectory() as results:
            at = (rounds, results, "bench", str(rooms), "cpu", 1)
            halves = (trajectories[::2], trajectories[1::2])
            for future in [executor.submit(_train_one_by_one, half, at) for half in halves]:
                future.result()

    with local_workers(2) as two, local_workers(1) as one:
        seconds = in_turns(
            {"two workers": lambda: train_all(two, 2), "one worker": lambda: train_all(one, 1),
             "two processes without an engine": lambda: train_halves(two)},
            1 if quick else 5,
            wall,
        )  # fmt: skip
    per_hour = jobs / median(seconds["two workers"]) * 3600
    note = f"trajectories of {rounds} rounds; {per_hour:.0f} an hour with two"
    return [
        compare(seconds, "two workers", "one worker", "speed", ">= 1.7", note),
        compare(seconds, "two processes without an engine", "one worker", "speed", "",
                "what the machine's two cores allow"),
        compare(seconds, "two workers", "two processes without an engine", "speed"),
    ]  # fmt: skip


def _train_one_by_one(trajectories: list[Trajectory], at: tuple) -> None:
    for trajectory in trajectories:
        train_job(trajectory, *at)


def _recipe(trajectory: Trajectory) -> Iterator[list[Need]]:
    yield [Need(trajectory, trajectory.fl.rounds)]


if __name__ == "__main__":
    main(measure)
