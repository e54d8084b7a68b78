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
import torch

from mas_core.config import Model, Settings, outside, settings, stream
from mas_core.federated import state_bytes
from mas_core.methods import Part
from mas_core.models import build
from mas_core.records.store import Affinities, Store, open_store
from mas_core.records.study import measuring_seconds
from mas_core.records.training import is_done
from mas_core.records.trajectory import Trajectory

from ..run.engine import with_ancestors
from .experiments import chosen, recipes_of

TASKONOMY_IMAGES = 10_000  # assumed images a building: the paper's hold 4,000 to 16,000
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)


class AssumedStore(Store):
    """A store that makes up the results that are absent, so that recipes run to their end.

    The groups that recipes then choose are some groups of that number, not the real ones.
    Reads every record once.
    """

    def __init__(self, results: Path | str, preset: str) -> None:
        super().__init__(results, preset)
        self._results: dict[str, dict[str, Any]] = {}
        self._rounds: dict[str, pd.DataFrame] = {}
        names = ("seconds", "affinity_seconds", "joules", "samples", "bytes_down", "bytes_up")
        self._nothing = pd.DataFrame({name: [0.0] for name in ("round", *names)})

    def affinities(self, trajectory: Trajectory | str) -> Affinities:
        rounds, n = np.arange(trajectory.fl.measure_rounds), len(trajectory.tasks)
        if (self.folder(trajectory) / "affinity.csv").exists():
            values = super().affinities(trajectory).values
        else:
            draw = stream(trajectory.seed, "assumed", trajectory.tasks)
            values = draw.normal(size=(1, 1, n, n))
        values = values[np.arange(len(rounds)) % len(values)]
        return Affinities(rounds, *(np.zeros(values.shape[:2]),) * 2, values)

    def result(self, trajectory: Trajectory | str) -> dict[str, Any]:
        id_ = trajectory if isinstance(trajectory, str) else trajectory.id
        if id_ not in self._results:
            found = super().result(trajectory)
            if found is None:
                draw = stream(trajectory.seed, "assumed", trajectory.tasks)
                losses = {a: draw.uniform(0.3, 0.4) for a in trajectory.tasks}
                found = {"test_best": losses, "test_last": losses}
            # Made-up results name no images, so they can be joined with those on record.
            self._results[id_] = found | {"data": None}
        return self._results[id_]

    def validation_losses(self, trajectory: Trajectory, last: bool = False) -> dict[str, float]:
        if super().result(trajectory) is None:
            return self.result(trajectory)["test_best"]
        return super().validation_losses(trajectory, last)

    def rounds(self, trajectory: Trajectory | str) -> pd.DataFrame:
        id_ = trajectory if isinstance(trajectory, str) else trajectory.id
        if id_ not in self._rounds:
            found = super().rounds(trajectory)
            self._rounds[id_] = found if len(found) else self._nothing
        return self._rounds[id_]


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
            t = store.trajectory(id_)
            extra = measuring_seconds(store, t, rows, result["device"]).sum()
            found.append((result["device"], len(t.tasks), *rows[["samples", "seconds"]].sum(),
                          extra, measuring["seconds"].sum()))
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
    if data.source != "taskonomy":  # a source from outside deals the views of rooms anew
        from mas_core.data.rooms.render import view_counts

        counts = view_counts(data.buildings, data.views, data.render_seed)
    else:
        counts = [TASKONOMY_IMAGES] * data.buildings
    share = 1.0 if data.split == "released" else 0.8
    sizes = [share * counts[k] for k in (fl.clients or range(data.buildings))]
    full = [n - n % fl.batch_size if n >= fl.batch_size else n for n in sizes]  # whole batches
    return fl.clients_per_round * fl.local_epochs * float(np.mean(full))


@cache
def _state_bytes(tasks: str, model: Model, table: str, part: str = "") -> int:
    """Bytes of a network, or of its encoder or decoders, counted without making weights."""
    with torch.device("meta"):
        net = build(tasks, model, table=outside(table))
    return state_bytes(net.get_submodule(part).state_dict())


def _network_bytes(t: Trajectory) -> int:
    if ":" in t.model.size:  # a network from outside need not be an encoder and decoders
        return _state_bytes(t.tasks, t.model, t.data.tasks)
    decoders = [_state_bytes(a, t.model, t.data.tasks, "decoders") for a in t.tasks]
    return _state_bytes(t.tasks[0], t.model, t.data.tasks, "encoder") + sum(decoders)


def _amount(t: Trajectory, begin: int, end: int, measured: int | None, speed: Speed) -> np.ndarray:
    """Rounds, training images, bytes both ways and seconds (or units) of a stretch.

    Affinities are measured in rounds < `measured` (None: as the trajectory is configured).
    """
    rounds, travelling = end - begin, _network_bytes(t)
    measuring = min(t.fl.measure_rounds if measured is None else measured, end) - begin
    weighed = rounds + speed.extra * max(0, measuring) * (len(t.tasks) > 1)
    images = images_a_round(t)
    seconds = (speed.a + speed.b * len(t.tasks)) * images * weighed
    return np.array(
        [rounds, rounds * images, 2 * rounds * t.fl.clients_per_round * travelling, seconds]
    )


@dataclass
class _Schedule:
    """Trajectories given to equal workers, one after the other."""

    work: dict[str, float]
    span: dict[str, tuple[int, int]]
    after: dict[str, set[frozenset]]
    began: dict[str, float] = field(default_factory=dict)
    ready: dict[str, tuple[float, str | None]] = field(default_factory=dict)  # and what held it up

    def held_up(self) -> dict[str, float]:
        """The work of the longest chain that follows each trajectory, its own included."""
        follows = defaultdict(set)
        for id_, choices in self.after.items():
            for other, _ in min(choices, key=len):
                follows[other].add(id_)

        @cache
        def tail(id_: str) -> float:
            return self.work[id_] + max((tail(f) for f in follows[id_]), default=0.0)

        return {id_: tail(id_) for id_ in self.work}

    def reached(self, id_: str, round_: int) -> float:
        """When a trajectory that has begun reaches a round."""
        first, end = self.span[id_]
        return self.began[id_] + self.work[id_] * (round_ - first) / max(1, end - first)

    def look(self, id_: str) -> None:
        """Note from when on a trajectory can start, once all that one choice needs has begun."""
        times = [
            max(((self.reached(*n), n[0]) for n in choice), default=(0.0, None))
            for choice in self.after[id_]
            if all(other in self.began for other, _ in choice)
        ]
        if times:
            self.ready[id_] = min(times, key=lambda found: found[0])

    def end(self, id_: str) -> float:
        return self.began[id_] + self.work[id_]

    def chain(self) -> list[str]:
        """The trajectories, each waiting for the one before, that end last."""
        chain = [max(self.began, key=self.end)]
        while (before := self.ready[chain[0]][1]) is not None:
            chain.insert(0, before)
        return chain


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
    made = _Schedule(work, span, after)
    first = made.held_up()
    waiting, free = sorted(work, key=first.get, reverse=True), [0.0] * workers
    while waiting:
        now = heapq.heappop(free)
        for id_ in waiting:
            if id_ not in made.ready:
                made.look(id_)
        starts = {id_: max(now, made.ready[id_][0]) for id_ in waiting if id_ in made.ready}
        pick = min(starts, key=starts.get)
        waiting.remove(pick)
        made.began[pick] = starts[pick]
        heapq.heappush(free, made.end(pick))
    chain = made.chain()
    return made.end(chain[-1]), chain


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
    done = {i for i, t in asked.trajectories.items() if is_done(t, asked.until[i], store)}
    head = (f"{len(stems)} notebooks, preset {preset}, seeds {' '.join(map(str, seeds))}: "
            f"{len(asked.until)} trajectories, {len(done)} on record")  # fmt: skip
    if not asked.until:
        return head + "; nothing to train"
    speed = recorded_speed(store)
    if images_per_second:
        unit = 1 / images_per_second / 6  # as if an encoder and five decoders cost the same each
        speed = Speed(unit, unit, speed.extra, f"{images_per_second:g} images a second, as given")
    span = {i: (asked.trajectories[i].start_round, asked.until[i]) for i in sorted(asked.until)}
    each = {i: _amount(asked.trajectories[i], *span[i], None, speed) for i in span}
    lines = [head, *_assumptions(asked, base), "", *_costs(asked, each, done, store, speed)]
    claims = results / "paper" / "claims.csv"
    if preset == "paper" and claims.exists():
        hours = float(pd.read_csv(claims, index_col="id").loc["gpu_hours", "value"])
        lines += [f"the paper     {hours:,.0f} V100 hours, without sharing, three seeds for most"]
    work = {i: float(amount[3]) for i, amount in each.items()}
    return "\n".join([*lines, *_scaling(asked, work, span, base, speed)])


def _assumptions(asked: Asked, base: Settings) -> list[str]:
    shared_by = pd.Series([len(asked.notebooks[i]) for i in asked.until]).value_counts()
    numbers = ", ".join(f"{n}: {m}" for n, m in shared_by.sort_index().items())
    lines = [f"asked for     by {numbers} (number of notebooks: trajectories)"]
    if asked.assumed:
        lines += [f"assumed       the groups of {asked.assumed} recipes, as their affinities or "
                  "losses are not on record"]  # fmt: skip
    if base.data.source == "taskonomy":
        lines += [f"assumed       {TASKONOMY_IMAGES:,} images a building (the paper: 4,000 to "
                  "16,000)"]  # fmt: skip
    return lines


def _costs(
    asked: Asked, each: dict[str, np.ndarray], done: set[str], store: Store, speed: Speed
) -> list[str]:
    """The table of rounds, images, bytes and hours: alone, shared, left."""
    alone = sum(_amount(p.trajectory, p.begin, p.end, p.affinity_rounds, speed)
                for method in asked.methods for p in method)  # fmt: skip
    left = np.zeros(4)
    for i in each.keys() - done:
        t, end = asked.trajectories[i], asked.until[i]
        left += _amount(t, min(store.rounds_done(t), end), end, None, speed)
    table = pd.DataFrame(
        {"every method alone": alone, "shared": sum(each.values()), "not on record": left},
        index=["rounds", "training images (M)", "communicated (GB)", "core or GPU hours"],
    ).div([1, 1e6, 1e9, 3600], axis=0)
    rows = table if speed.source else table.iloc[:3]
    factor = alone[1] / sum(each.values())[1]
    timed = "not timed     no record of this preset to time by; name --images-per-second"
    if speed.source:
        timed = f"timed by      {speed.source}; training only, no validation"
    return [
        rows.map(lambda v: f"{v:,.2f}").to_string(),
        "",
        f"sharing       {factor:.2f} times as many images if {len(asked.methods)} distinct "
        "methods ran alone,",
        "              groups in several partitions of one method counted once",
        timed,
    ]


def _scaling(
    asked: Asked, work: dict[str, float], span: dict[str, tuple[int, int]], base: Settings,
    speed: Speed,
) -> list[str]:  # fmt: skip
    """The longest chain, and how a schedule on more workers gets faster."""
    longest, chain = schedule(work, span, asked.after, len(work))
    steps = ", then ".join(f"{_named(asked.trajectories[i], base)} to {span[i][1]}" for i in chain)
    times = np.array([schedule(work, span, asked.after, n)[0] for n in WORKERS])
    curve = pd.DataFrame([times / 3600, times[0] / times], ["hours", "speed-up"], map(str, WORKERS))
    curve = curve if speed.source else curve.iloc[1:]
    return [f"longest chain {steps}: {longest / sum(work.values()):.1%} of the work", "",
            "simulated schedule from nothing, by number of equal workers",
            curve.map(lambda v: f"{v:,.2f}").to_string()]  # fmt: skip


def _named(t: Trajectory, base: Settings) -> str:
    """A trajectory's tasks, and where its federated training differs from the preset's."""
    shown = ("method", "local_epochs", "clients_per_round", "clients", "encoder_grad_scale")
    other = [f"{k}={getattr(t.fl, k)}" for k in shown if getattr(t.fl, k) != getattr(base.fl, k)]
    return " ".join([t.tasks, *other])
