"""A progress bar over the rounds of all trajectories that a driver runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from .engine import Progress


@contextlib.contextmanager
def progress_bar(store: Any) -> Iterator[Any]:
    """A bar over rounds, with what is running and left; a thread reads the records on disk."""
    progress, stop, seen, known = Progress(), threading.Event(), {}, {}
    with tqdm(unit="round", desc="train", dynamic_ncols=True) as bar:

        def show() -> None:
            for need in [*progress.waiting, *progress.running]:
                id_ = need.trajectory.id
                if id_ not in seen or need.until > seen[id_].until:
                    seen[id_] = need
            # What was on record before is no part of the speed.
            bar.initial = sum(
                min(rounds_done(n), progress.begun.get(id_, n.until) - n.trajectory.start_round)
                for id_, n in seen.items()
            )
            bar.total = sum(n.until - n.trajectory.start_round for n in seen.values())
            bar.n = sum(rounds_done(n) for n in seen.values())
            now = [
                f"{n.trajectory.tasks} {store.rounds_done(n.trajectory)}/{n.until}"
                for n in progress.running
            ]
            left = len(progress.waiting) - sum(n in progress.waiting for n in progress.running)
            text = f"trajectories: {progress.done} done, {len(now)} running, {left} left"
            text += f", {progress.failed} failed" * bool(progress.failed)
            text += ", no worker yet" * (progress.workers == 0)
            bar.set_postfix_str(text + (f" ({', '.join(now)})" if now else ""))

        def rounds_done(need: Any) -> int:
            """Reads a record until it holds all that is needed."""
            id_, first = need.trajectory.id, need.trajectory.start_round
            if known.get(id_, 0) < need.until:
                known[id_] = store.rounds_done(need.trajectory)
            return max(0, min(known[id_], need.until) - first)

        def watch() -> None:
            while not stop.wait(1.0):
                show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            stop.set()
            thread.join()
            show()
