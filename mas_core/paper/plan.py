"""What notebooks would train, what is on record and shared, what it costs: `mas plan`."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config import Model, Settings, settings, stream
from ..federated import state_bytes
from ..methods import Part
from ..models import MultiTaskNet
from ..records.store import Affinities, Store, open_store
from ..records.training import is_done
from ..records.trajectory import Trajectory
from ..run.engine import with_ancestors
from .experiments import chosen, recipes_of

TASKONOMY_IMAGES = 10_000  # assumed images a building: the paper's hold 4,000 to 16,000
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)


class AssumedStore(Store):
    """A store that makes up the results that are absent, so that recipes run to their end.

    The groups that they then choose stand for some groups of that number, not for the real ones.
    """

    def affinities(self, trajectory: Trajectory | str) -> Affinities:
        rounds, n = np.arange(trajectory.fl.measure_rounds), len(trajectory.tasks)
        if (self.folder(trajectory) / "affinity.csv").exists():
            values = super().affinities(trajectory).values
        else:
            draw = stream(trajectory.seed, "assumed", trajectory.tasks)
            values = draw.normal(size=(1, 1, n, n))
        values = values[np.arange(len(rounds)) % len(values)]
        return Affinities(rounds, np.zeros(values.shape[:2]), values)

    def result(self, trajectory: Trajectory | str) -> dict[str, Any]:
        found = super().result(trajectory)
        if found is None:
            draw = stream(trajectory.seed, "assumed", trajectory.tasks)
            losses = {a: draw.uniform(0.3, 0.4) for a in trajectory.tasks}
            found = {"test_best": losses, "test_last": losses}
        return found

    def validation_losses(self, trajectory: Trajectory, last: bool = False) -> dict[str, float]:
        if super().result(trajectory) is None:
            return self.result(trajectory)["test_best"]
        return super().validation_losses(trajectory, last)

    def rounds(self, trajectory: Trajectory | str) -> pd.DataFrame:
        found = super().rounds(trajectory)
        names = ("seconds", "affinity_seconds", "joules", "samples", "bytes_down", "bytes_up")
        return found if len(found) else pd.DataFrame({k: [0.0] for k in ("round", *names)})


@dataclass
class Asked:
    """What recipes ask for, run to their end on an AssumedStore."""

    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    until: dict[str, int] = field(default_factory=dict)  # the furthest round asked for
    notebooks: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    after: dict[str, set[frozenset]] = field(default_factory=lambda: defaultdict(set))
    methods: set[frozenset[Part]] = field(default_factory=set)  # each as it would run alone
    assumed: int = 0  # recipes that decided by results made up


def walk(
    stems: Iterable[str], store: AssumedStore, seeds: Iterable[int], overrides: dict[str, Any]
) -> Asked:
    """Run every recipe of the notebooks to its end, and note what it asks for and in what order."""
    asked, real = Asked(), Store(store.results, store.preset)
    for (stem, *_), recipe in recipes_of(stems, store, seeds, overrides).items():
        decided_by: frozenset = frozenset()
        made_up = False
        while True:
            try:
                needs = next(recipe)
            except StopIteration as end:
                results = end.value if isinstance(end.value, list) else [end.value]
                break
            if decided_by:
                made_up |= not all(is_done(asked.trajectories[i], r, real) for i, r in decided_by)
            for need in [n for asked_for in needs for n in with_ancestors(asked_for)]:
                t, id_ = need.trajectory, need.trajectory.id
                asked.trajectories[id_] = t
                asked.until[id_] = max(asked.until.get(id_, 0), need.until)
                asked.notebooks[id_].add(stem)
                start = {(t.parent.id, t.start_round)} if t.parent else set()
                asked.after[id_].add(frozenset(start | {d for d in decided_by if d[0] != id_}))
            decided_by = frozenset((n.trajectory.id, n.until) for n in needs)
        asked.assumed += made_up
        asked.methods.add(frozenset(part for result in results for part in result.parts))
    return asked


@dataclass(frozen=True)
class Speed:
    """Seconds an image costs: a + b tasks, times 1 + extra in rounds that measure affinities."""

    a: float = 1.0
    b: float = 1.0
    extra: float = 0.0
    source: str = ""  # empty: nothing was timed, the unit is arbitrary


def recorded_speed(store: Store) -> Speed:
    """The training speed that records tell, of the device that most of them name."""
    found = []
    for id_ in store.ids():
        rows, result = store.rounds(id_), store.result(id_)
        if result:
            measuring = rows[rows["affinity_seconds"] > 0]
            found.append((result["device"], len(store.trajectory(id_).tasks), *rows[
                ["samples", "seconds", "affinity_seconds"]].sum(), measuring["seconds"].sum()))
    if not found:
        return Speed()
    names = ["device", "tasks", "samples", "seconds", "affinity", "measuring"]
    table = pd.DataFrame(found, columns=names)
    device = table["device"].mode()[0]
    table = table[table["device"] == device]
    sums = table.groupby("tasks").sum(numeric_only=True)
    tasks = sums.index.to_numpy(float)
    seconds = ((sums["seconds"] - sums["affinity"]) / sums["samples"]).to_numpy()
    if len(tasks) > 1:
        b, a = np.polyfit(tasks, seconds, 1)
    else:  # as if an encoder and n decoders cost the same each
        a = b = seconds[0] / (1 + tasks[0])
    plain = max(1e-9, sums["measuring"].sum() - sums["affinity"].sum())
    extra = sums["affinity"].sum() / plain
    return Speed(a, b, extra, f"{device}, {len(table)} trajectories on record")


@cache
def images_a_round(t: Trajectory) -> float:
    """Training images of a round, in the mean over the clients that may be drawn: K E |D_k|."""
    data, fl = t.data, t.fl
    if data.source == "rooms":
        from ..data.rooms.render import view_counts

        counts = view_counts(data.buildings, data.views, data.render_seed)
    else:
        counts = [TASKONOMY_IMAGES] * data.buildings
    share = 1.0 if data.split == "released" else 0.8
    sizes = [share * counts[k] for k in (fl.clients or range(data.buildings))]
    full = [n - n % fl.batch_size if n >= fl.batch_size else n for n in sizes]  # whole batches
    return fl.clients_per_round * fl.local_epochs * float(np.mean(full))


@cache
def _network_bytes(tasks: str, model: Model) -> int:
    return state_bytes(MultiTaskNet(tasks, model.size, model.output_stride).state_dict())


def _amount(t: Trajectory, begin: int, end: int, measured: int | None, speed: Speed) -> np.ndarray:
    """Rounds, training images, bytes both ways and seconds (or units) of a stretch.

    Affinities are measured in rounds < `measured` (None: as the trajectory is configured).
    """
    rounds, travelling = end - begin, _network_bytes(t.tasks, t.model)
    measuring = min(t.fl.measure_rounds if measured is None else measured, end) - begin
    weighed = rounds + speed.extra * max(0, measuring) * (len(t.tasks) > 1)
    images = images_a_round(t)
    seconds = (speed.a + speed.b * len(t.tasks)) * images * weighed
    return np.array(
        [rounds, rounds * images, 2 * rounds * t.fl.clients_per_round * travelling, seconds]
    )


def schedule(
    work: dict[str, float],
    span: dict[str, tuple[int, int]],
    after: dict[str, set[frozenset]],
    workers: int,
) -> tuple[float, list[str]]:
    """List scheduling of trajectories on equal workers, what holds up the most work first.

    `span` holds each one's first round and end, `after` the sets of (trajectory, round) any one of
    which must be reached before it may start. Returns the time until all are done, and the chain
    of trajectories, each waiting for the one before, that ends last.
    """
    follows = defaultdict(set)
    for id_, choices in after.items():
        for other, _ in min(choices, key=len):
            follows[other].add(id_)

    @cache
    def tail(id_: str) -> float:
        return work[id_] + max((tail(f) for f in follows[id_]), default=0.0)

    began: dict[str, float] = {}
    ready: dict[str, tuple[float, str | None]] = {}
    waiting = sorted(work, key=tail, reverse=True)
    free = [0.0] * workers

    def reached(id_: str, round_: int) -> float:
        first, end = span[id_]
        return began[id_] + work[id_] * (round_ - first) / max(1, end - first)

    while waiting:
        now = heapq.heappop(free)
        for id_ in waiting:
            if id_ not in ready:
                times = [
                    max(((reached(*n), n[0]) for n in choice), default=(0.0, None))
                    for choice in after[id_]
                    if all(n[0] in began for n in choice)
                ]
                if times:
                    ready[id_] = min(times, key=lambda found: found[0])
        starts = {id_: max(now, ready[id_][0]) for id_ in waiting if id_ in ready}
        pick = min(starts, key=starts.get)
        waiting.remove(pick)
        began[pick] = starts[pick]
        heapq.heappush(free, began[pick] + work[pick])
    last = max(began, key=lambda id_: began[id_] + work[id_])
    chain = [last]
    while (before := ready[chain[0]][1]) is not None:
        chain.insert(0, before)
    return began[last] + work[last], chain


def plan(
    notebooks: Sequence[str],
    preset: str,
    seeds: Sequence[int],
    overrides: dict[str, Any],
    results: Path,
    images_per_second: float | None = None,
) -> str:
    """What notebooks would train, what is on record, what is shared, and the cost, as text.

    `images_per_second` of a five-task network times presets without records.
    """
    stems, store = chosen(notebooks), open_store(preset, results)
    base = settings(preset, overrides=overrides)
    asked = walk(stems, AssumedStore(results, preset), seeds, overrides)
    speed = recorded_speed(store)
    if images_per_second:
        unit = 1 / images_per_second / 6  # as if an encoder and five decoders cost the same each
        speed = Speed(unit, unit, speed.extra, f"{images_per_second:g} images a second, as given")
    all_ = {i: asked.trajectories[i] for i in sorted(asked.until)}
    span = {i: (t.start_round, asked.until[i]) for i, t in all_.items()}
    done = {i for i, t in all_.items() if is_done(t, asked.until[i], store)}
    lines = [f"{len(stems)} notebooks, preset {preset}, seeds {' '.join(map(str, seeds))}: "
             f"{len(all_)} trajectories, {len(done)} on record"]  # fmt: skip
    if not all_:
        return lines[0] + "; nothing to train"
    each = {i: _amount(t, *span[i], None, speed) for i, t in all_.items()}
    alone = sum(_amount(p.trajectory, p.begin, p.end, p.affinity_rounds, speed)
                for method in asked.methods for p in method)  # fmt: skip
    left = sum(_amount(t, min(store.rounds_done(t), span[i][1]), span[i][1], None, speed)
               for i, t in all_.items() if i not in done)  # fmt: skip
    table = pd.DataFrame(
        {"every method alone": alone, "shared": sum(each.values()), "not on record": left},
        index=["rounds", "training images (M)", "communicated (GB)", "core or GPU hours"],
    ).div([1, 1e6, 1e9, 3600], axis=0)
    shared_by = pd.Series([len(asked.notebooks[i]) for i in all_]).value_counts().sort_index()
    lines += [f"asked for     by {', '.join(f'{n}: {m}' for n, m in shared_by.items())} "
              "(number of notebooks: trajectories)"]  # fmt: skip
    if asked.assumed:
        lines += [f"assumed       the groups of {asked.assumed} recipes, as their affinities or "
                  "losses are not on record"]  # fmt: skip
    if base.data.source == "taskonomy":
        lines += [f"assumed       {TASKONOMY_IMAGES:,} images a building (the paper: 4,000 to "
                  "16,000)"]  # fmt: skip
    rows = table if speed.source else table.iloc[:3]
    factor = alone[1] / sum(each.values())[1]
    lines += ["", rows.map(lambda v: f"{v:,.2f}").to_string(), "",
              f"sharing       {factor:.2f} times as many images if {len(asked.methods)} distinct "
              "methods ran alone,",
              "              groups in several partitions of one method counted once"]  # fmt: skip
    if speed.source:
        lines += [f"timed by      {speed.source}; training only, no validation"]
    else:
        lines += ["not timed     no record of this preset: no hours (or name --images-per-second)"]
    claims = results / "paper" / "claims.csv"
    if preset == "paper" and claims.exists():
        hours = float(pd.read_csv(claims, index_col="id").loc["gpu_hours", "value"])
        lines += [f"the paper     {hours:,.0f} V100 hours, without sharing, three seeds for most"]
    work = {i: float(amount[3]) for i, amount in each.items()}
    longest, chain = schedule(work, span, asked.after, len(work))
    steps = ", then ".join(f"{_named(all_[i], base)} to {span[i][1]}" for i in chain)
    lines += [f"longest chain {steps}: {longest / sum(work.values()):.1%} of the work"]
    times = np.array([schedule(work, span, asked.after, n)[0] for n in WORKERS])
    curve = pd.DataFrame([times / 3600, times[0] / times], ["hours", "speed-up"], map(str, WORKERS))
    curve = curve if speed.source else curve.iloc[1:]
    lines += ["", "simulated schedule from nothing, by number of equal workers",
              curve.map(lambda v: f"{v:,.2f}").to_string()]  # fmt: skip
    return "\n".join(lines)


def _named(t: Trajectory, base: Settings) -> str:
    """A trajectory's tasks, and where its federated training differs from the preset's."""
    shown = ("method", "local_epochs", "clients_per_round", "clients", "encoder_grad_scale")
    other = [f"{k}={getattr(t.fl, k)}" for k in shown if getattr(t.fl, k) != getattr(base.fl, k)]
    return " ".join([t.tasks, *other])
