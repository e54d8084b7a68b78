"""What a method works on, over records: its trajectories, their affinities, its result and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import Settings, UserError, outside
from ..fedavg import rule_of
from ..methods import Part
from ..tasks import TaskTable, check_tasks, sort_tasks
from .cost import JOULES_PER_KWH, Cost, estimated_kwh
from .store import Store
from .trajectory import Trajectory


@dataclass(frozen=True)
class Study:
    """A task set with its settings, a seed, and where records are; see `methods.Study`."""

    tasks: str  # in any order; trajectories and affinities have the table's order
    settings: Settings
    seed: int
    store: Store

    def __post_init__(self) -> None:
        check_tasks(self.tasks, self._table)
        if type(self.seed) is not int:
            raise UserError(f"seed={self.seed!r}; allowed: a whole number")
        fl, allowed = self.settings.fl, rule_of(self.settings.fl).options
        given = [name for name, _ in fl.options]
        for name in [n for n in given if n not in allowed or given.count(n) > 1]:
            raise UserError(f"fl.options: {fl.method} has no {name!r}{' twice' * (name in allowed)}"
                            f"; allowed: {', '.join(allowed) or 'none'}")  # fmt: skip

    @property
    def _table(self) -> Any:
        return outside(self.settings.data.tasks, TaskTable)

    @property
    def rounds(self) -> int:
        return self.settings.fl.rounds

    @property
    def split_round(self) -> int:
        """R0, after which groups go on from the all-in-one weights."""
        R0 = self.settings.mas.merge_rounds
        if R0 >= self.rounds:
            raise UserError(f"merge_rounds={R0}; allowed: 1 to {self.rounds - 1}")
        return R0

    def letters(self, group: Iterable[int]) -> str:
        """Indices of an affinity matrix as task letters."""
        return "".join(sort_tasks(self.tasks, self._table)[i] for i in group)

    def all_in_one(self) -> Trajectory:
        """The merged task, affinities measured on the way: the trunk of MAS and TAG."""
        s, fl = self.settings, self.settings.fl
        if len(self.tasks) == 1:  # nothing to measure: the same as one by one in a larger set
            fl = replace(fl, measure_rounds=0)
        return Trajectory(sort_tasks(self.tasks, self._table), self.seed, s.data, s.model, fl)

    def unmeasured(self, **changes: Any) -> Study:
        """The same without affinities, and with `changes` to its federated training."""
        fl = replace(self.settings.fl, measure_rounds=0, **changes)
        return replace(self, settings=replace(self.settings, fl=fl))

    def from_scratch(self, group: str) -> Trajectory:
        study = self if sorted(group) == sorted(self.tasks) else self.unmeasured()
        tasks = sort_tasks(group, self._table)
        return self.store.served_by(replace(study.all_in_one(), tasks=tasks))

    def from_all_in_one(self, group: str) -> Trajectory:
        start = self.split_round
        return replace(
            self.unmeasured().all_in_one(),
            tasks=sort_tasks(group, self._table),
            parent=self.all_in_one(),
            start_round=start,
            lr_from=start if self.settings.mas.lr_schedule == "restart" else 0,
        )

    def again(self, group: str) -> Trajectory:
        alone = replace(self.unmeasured().all_in_one(), tasks=sort_tasks(group, self._table))
        start = self.split_round
        return replace(alone, parent=alone, start_round=start, lr_from=start)

    def affinities(self, window: int, rounds: int | None = None, at: str = "mean") -> np.ndarray:
        """S-hat (n, n) that a split reads: the all-in-one affinities of rounds < window.

        Unweighted mean over steps (already taken), clients, then rounds, or with at="last" the last
        of these rounds alone; never of rounds from `rounds` on, where the split is made earlier.
        The diagonal is 0, not measured: Eq. 4 defines it. Raises UserError where the record or the
        settings hold fewer rounds than that.
        """
        trunk = self.all_in_one()
        measured = self.store.affinities(trunk)
        wanted = min(window, rounds or window)
        if wanted > trunk.fl.measure_rounds:
            raise UserError(f"affinities of {wanted} rounds are read, but fl.measure_rounds="
                            f"{trunk.fl.measure_rounds}; raise it, or read fewer")  # fmt: skip
        if measured.rounds[:wanted].tolist() != list(range(wanted)):
            raise UserError(f"{self.store.folder(trunk) / 'affinity.csv'} lacks rounds of the first"
                            f" {wanted}; restore it, or delete its record")  # fmt: skip
        per_round = measured.values[:wanted].mean(1)  # (T, K, n, n) -> (T, n, n)
        S = per_round[-1] if at == "last" else per_round.mean(0)
        np.fill_diagonal(S, 0.0)
        return S

    def deciding_losses(self, trajectory: Trajectory, last: bool = False) -> dict[str, float]:
        """The losses by task that decide between groups (`choice.by`).

        Of the model with the least validation loss, or of the last round's.
        """
        if self.settings.choice.by == "test":
            return self.store.result(trajectory)["test_last" if last else "test_best"]
        return self.store.validation_losses(trajectory, last)

    def result(
        self,
        name: str,
        groups: Sequence[str],
        trained: Sequence[Trajectory],
        parts: Sequence[Part],
        search: Sequence[Part] = (),
    ) -> MethodResult:
        """Every task's test loss, by the group that serves it best, and the costs."""
        found = [self.store.result(t) for t in trained]
        if len({result.get("data") for result in found}) > 1:
            ids = ", ".join(t.id for t in trained)
            raise UserError(f"{name} joins records trained on different images ({ids}); delete "
                            "those that are not of the data wanted")  # fmt: skip
        everything = (*search, *parts)
        costs = [part_cost(self.store, part, trained[0]) for part in everything]
        return MethodResult(
            method=name,
            tasks=self.tasks,
            seed=self.seed,
            groups=tuple(groups),
            losses=self._served(trained, [r["test_best"] for r in found], last=False),
            losses_last=self._served(trained, [r["test_last"] for r in found], last=True),
            cost=sum(costs),
            search_cost=sum(costs[: len(search)]) if search else None,
            parts=everything,
        )

    def _served(
        self, trained: Sequence[Trajectory], losses: list[dict[str, float]], last: bool
    ) -> dict[str, float]:
        """Each task's loss in its group; of several, the one with the lowest deciding loss."""
        serving: dict[str, float] = {}
        for a in self.tasks:
            having = [i for i, t in enumerate(trained) if a in t.tasks]
            if len(having) > 1:
                having.sort(key=lambda i: self.deciding_losses(trained[i], last)[a])  # noqa: B023
            serving[a] = losses[having[0]][a]
        return serving


@dataclass(frozen=True)
class MethodResult:
    """What every method returns. Losses are test losses, dimensionless, by task letter."""

    method: str
    tasks: str
    seed: int
    groups: tuple[str, ...]
    losses: dict[str, float]  # of the model with the least validation loss
    losses_last: dict[str, float]  # of the last round's model
    cost: Cost  # everything the method trains, its search included
    search_cost: Cost | None  # the share spent on finding the groups (HOA, TAG)
    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(self.losses.values())

    @property
    def total_last(self) -> float:
        return sum(self.losses_last.values())


_COUNTED = ("round", "seconds", "affinity_seconds", "joules", "samples", "bytes_down", "bytes_up")


def part_cost(store: Store, part: Part, like: Trajectory | None = None) -> Cost:
    """What a stretch of a trajectory cost when it was trained, by its record.

    A trajectory that was not trained to its end has no device on record; `like`'s is used. Where
    its rounds were trained on several devices, the source of the figures says so.

    Seconds are those of local training and averaging. Affinities are measured in more rounds than
    a method asks for; the time of those measurements is left out, and energy in proportion. On a
    CPU one backward pass through the encoder goes with each, which training needs anyway.
    """
    table = store.rounds(part.trajectory)
    paid = ((number := table["round"].to_numpy()) >= part.begin) & (number < part.end)
    rows = {name: table[name].to_numpy()[paid] for name in _COUNTED}
    result = store.result(part.trajectory) or store.result(like or part.trajectory) or {}
    extra = measuring_seconds(store, part.trajectory, rows, result.get("device", ", 1 thread"))
    extra = np.where(rows["round"] >= part.affinity_rounds, extra, 0.0)
    seconds = rows["seconds"] - extra
    with np.errstate(invalid="ignore"):  # a round planned, not trained, takes no time
        joules = rows["joules"].astype(float) * (seconds / rows["seconds"])
    estimate, source = estimated_kwh(seconds.sum(), result.get("device", ", 1 thread"))
    measured = np.isfinite(joules).all()
    devices = tuple(result.get("devices") or filter(None, [result.get("device")]))
    mixed = ", seconds of several devices" * (len(devices) > 1)
    return Cost(
        seconds=float(seconds.sum()),
        energy_kwh=float(joules.sum() / JOULES_PER_KWH) if measured else None,
        energy_kwh_estimated=estimate,
        energy_source=f"{result.get('energy_source', 'not measured')}; "
        f"estimated from {source}{mixed}",
        bytes_down=int(rows["bytes_down"].sum()),
        bytes_up=int(rows["bytes_up"].sum()),
        samples=int(rows["samples"].sum()),
        peak_memory_bytes=int(result.get("peak_memory_bytes") or 0),
        devices=devices,
    )


def measuring_seconds(store: Store, trajectory: Trajectory, rows: Any, device: str) -> np.ndarray:
    """Seconds that measuring affinities added to each of the rounds in `rows`.

    On a CPU they are on record. A GPU's record has all of the steps that measured; without
    measuring they would have taken as long as the others.
    """
    seconds, spent, samples = (np.asarray(rows[name], float) for name in
                               ("seconds", "affinity_seconds", "samples"))  # fmt: skip
    if "thread" in device or not spent.any():
        return spent
    found = store.affinities(trajectory)
    steps = dict(zip(found.rounds.tolist(), found.measurements.sum(1)))  # that measured
    share = np.array([steps.get(r, 0) for r in rows["round"]]) * trajectory.fl.batch_size / samples
    return spent - (seconds - spent) * share / np.maximum(1 - share, 0.01)
