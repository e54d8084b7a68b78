"""What a run is doing: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mas_core.methods import Need
from mas_core.records.store import Store

LINE_SECONDS = 30.0  # between two lines where there is no terminal


@dataclass
class Progress:
    """What a driver knows while it runs; another thread may read it to show it."""

    done: int = 0  # trajectories on record, counted when a recipe needs them
    failed: int = 0
    workers: int = 1  # how many jobs can be out at a time, by now
    running: list[Need] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)  # id -> rounds on record when handed out
    waiting: list[Need] = field(default_factory=list)


@dataclass
class Rounds:
    """Rounds done of all that were asked for so far, read from the records on disk."""

    store: Store
    progress: Progress
    seen: dict[str, Need] = field(default_factory=dict)  # id -> the furthest need of it
    known: dict[str, int] = field(default_factory=dict)  # id -> rounds on record

    def count(self) -> tuple[int, int, int]:
        """Rounds on record before this run, rounds now, rounds wanted."""
        progress = self.progress
        for need in [*progress.waiting, *progress.running]:
            id_ = need.trajectory.id
            if id_ not in self.seen or need.until > self.seen[id_].until:
                self.seen[id_] = need
        first = {id_: n.trajectory.start_round for id_, n in self.seen.items()}
        now = {id_: self._rounds(n) - first[id_] for id_, n in self.seen.items()}
        begun = {i: progress.begun.get(i, n.until) - first[i] for i, n in self.seen.items()}
        wanted = sum(n.until - first[id_] for id_, n in self.seen.items())
        return sum(min(now[i], begun[i]) for i in now), sum(now.values()), wanted

    def text(self) -> str:
        progress = self.progress
        now = [
            f"{n.trajectory.tasks} {self.store.rounds_done(n.trajectory)}/{n.until}"
            for n in progress.running
        ]
        left = len(progress.waiting) - sum(n in progress.waiting for n in progress.running)
        text = f"trajectories: {progress.done} done, {len(now)} running, {left} left"
        text += f", {progress.failed} failed" * bool(progress.failed)
        text += ", no worker yet" * (progress.workers == 0)
        return text + (f" ({', '.join(now)})" if now else "")

    def _rounds(self, need: Need) -> int:
        """Reads a record until it holds all that is needed."""
        id_ = need.trajectory.id
        if self.known.get(id_, 0) < need.until:
            self.known[id_] = self.store.rounds_done(need.trajectory)
        return max(need.trajectory.start_round, min(self.known[id_], need.until))


@contextmanager
def shown_progress(store: Store) -> Iterator[Progress]:
    """Progress that is shown on stderr while it is open; a thread reads the records."""
    rounds, stop = Rounds(store, Progress()), threading.Event()
    terminal = sys.stderr.isatty()
    thread = threading.Thread(target=_bar if terminal else _lines, args=(rounds, stop), daemon=True)
    thread.start()
    try:
        yield rounds.progress
    finally:
        stop.set()
        thread.join()  # what is printed next has its own line


def _bar(rounds: Rounds, stop: threading.Event) -> None:
    from tqdm import tqdm

    with tqdm(unit="round", desc="train", dynamic_ncols=True) as bar:
        ended = False
        while not ended:
            ended = stop.wait(1.0)
            bar.initial, bar.n, bar.total = rounds.count()  # speed is that of this run's rounds
            bar.set_postfix_str(rounds.text())


def _lines(rounds: Rounds, stop: threading.Event) -> None:
    began, ended = time.monotonic(), False
    said = began
    while not ended:
        ended = stop.wait(min(1.0, LINE_SECONDS))
        before, now, wanted = rounds.count()  # every second, to show short jobs, too
        if not ended and time.monotonic() < said + LINE_SECONDS:
            continue
        said = time.monotonic()
        text = f"train: {now}/{wanted} rounds, {rounds.text()}"
        if not ended and now > before:
            left = (time.monotonic() - began) * (wanted - now) / (now - before)
            text += f", about {left / 60:.0f} min left"
        if wanted:
            print(text, file=sys.stderr, flush=True)
