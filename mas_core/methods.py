"""The methods the paper compares, each a page-short recipe over trajectories.

A recipe is a generator: it yields the trajectories it needs next, as a list of `Need`, is resumed
once they are on record, and returns a `MethodResult`. `engine.run` drives one or many of them and
trains what they share once. What a method costs is counted as if it ran alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from .config import Settings, Trajectory, UserError
from .records.cost import JOULES_PER_KWH, Cost, estimated_kwh
from .records.store import Store
from .split import best_split, hoa_groups, partitions, tag_groups
from .tasks import check_tasks, sort_tasks


@dataclass(frozen=True)
class Need:
    """A trajectory, and the round it is needed to."""

    trajectory: Trajectory
    until: int


@dataclass(frozen=True)
class Study:
    """What a method works on: a task set with its settings, a seed, and where records are."""

    tasks: str  # in any order; trajectories and affinities have the table's order
    settings: Settings
    seed: int
    store: Store

    def __post_init__(self) -> None:
        check_tasks(self.tasks)

    @property
    def rounds(self) -> int:
        return self.settings.fl.rounds

    def letters(self, group: Iterable[int]) -> str:
        """Indices of an affinity matrix as task letters."""
        return "".join(sort_tasks(self.tasks)[i] for i in group)

    def all_in_one(self) -> Trajectory:
        """The merged task, affinities measured on the way: the trunk of MAS and TAG."""
        data, model, fl = self.settings.data, self.settings.model, self.settings.fl
        if len(self.tasks) == 1:  # nothing to measure: the same as one by one in a larger set
            fl = replace(fl, measure_rounds=0)
        return Trajectory(sort_tasks(self.tasks), self.seed, data, model, fl)

    def unmeasured(self, **changes: Any) -> Study:
        """The same without affinities, and with `changes` to its federated training."""
        fl = replace(self.settings.fl, measure_rounds=0, **changes)
        return replace(self, settings=replace(self.settings, fl=fl))

    def from_scratch(self, group: str) -> Trajectory:
        """The tasks of `group` trained from the seed's initial weights."""
        study = self if sorted(group) == sorted(self.tasks) else self.unmeasured()
        return replace(study.all_in_one(), tasks=sort_tasks(group))

    def from_all_in_one(self, group: str) -> Trajectory:
        """The tasks of `group` continued from the all-in-one weights of round R0."""
        start = self.settings.mas.merge_rounds
        if start >= self.rounds:
            raise UserError(f"merge_rounds={start}; allowed: 1 to {self.rounds - 1}")
        return replace(
            self.unmeasured().all_in_one(),
            tasks=sort_tasks(group),
            parent=self.all_in_one(),
            start_round=start,
            lr_from=start if self.settings.mas.lr_schedule == "restart" else 0,
        )


@dataclass(frozen=True)
class Part:
    """A stretch of a trajectory that a method pays for."""

    trajectory: Trajectory
    begin: int
    end: int
    affinity_rounds: int = 0  # affinities of rounds before this one belong to the method


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


Recipe = Generator[list[Need], None, MethodResult]


def one_by_one(study: Study) -> Recipe:
    """Every task alone, one after the other (Bonawitz et al., 2019; MAS, section 1)."""
    return (yield from _train_groups("one-by-one", study, study.tasks))


def all_in_one(study: Study) -> Recipe:
    """All tasks in one multi-task network by FedAvg: min sum_i L_i (MAS, Eq. 2)."""
    return (yield from _train_groups("all-in-one", study, [study.tasks]))


def fedprox(study: Study, mu: float = 0.004) -> Recipe:
    """All-in-one with FedProx's mu/2 |theta - theta_server|^2 on every client (Li et al., 2020)."""
    study = study.unmeasured(method="fedprox", prox_mu=mu)
    return (yield from _train_groups("fedprox", study, [study.tasks]))


def gradnorm(study: Study, alpha: float = 1.5, lr: float = 0.025) -> Recipe:
    """All-in-one with GradNorm's loss weights on the shared representation (Chen et al., 2018)."""
    study = study.unmeasured(method="gradnorm", gradnorm_alpha=alpha, gradnorm_lr=lr)
    return (yield from _train_groups("gradnorm", study, [study.tasks]))


def merge_and_split(study: Study, splits: int = 2) -> Recipe:
    """MAS-x (Algorithm 1): merge, measure, split into exactly x groups, continue each group.

    All-in-one for R0 rounds; the split with the highest total affinity (Eq. 3, 4); every group
    from the all-in-one weights for the remaining R - R0 rounds.
    """
    check_splits(study, splits)
    check_measured(study)
    R0, trunk = study.settings.mas.merge_rounds, study.all_in_one()
    study.from_all_in_one(study.tasks)  # an R0 that cannot be is told before anything is trained
    yield [Need(trunk, R0)]
    split = best_split(affinity_before_split(study, R0), splits)
    groups = [study.letters(g) for g in split.groups]
    branches = [study.from_all_in_one(group) for group in groups]
    yield [Need(branch, study.rounds) for branch in branches]
    parts = [Part(trunk, 0, R0, study.settings.mas.affinity_rounds)]
    parts += [Part(branch, R0, study.rounds) for branch in branches]
    return _result(f"MAS-{splits}", study, groups, branches, parts)


def tag(study: Study, splits: int = 2) -> Recipe:
    """TAG-x (Fifty et al., 2021): groups that may overlap, from all-in-one's affinities.

    All-in-one for R rounds, the best grouping (`split.tag_groups`), every group from scratch; a
    task in several groups takes its best result, by test loss.
    """
    check_splits(study, splits)
    check_measured(study)
    trunk = study.all_in_one()
    yield [Need(trunk, study.rounds)]
    chosen = tag_groups(affinity_before_split(study), splits)
    groups = [study.letters(g) for g in chosen.groups]
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    search = [Part(trunk, 0, study.rounds, study.settings.mas.affinity_rounds)]
    parts = [Part(t, 0, study.rounds) for t in trained if t != trunk]
    return _result(f"TAG-{splits}", study, groups, trained, parts, search)


def hoa(study: Study, splits: int = 2) -> Recipe:
    """HOA-x (Standley et al., 2020): groups from the losses of all single tasks and pairs.

    A larger group's loss of a task is estimated as its mean over the pairs inside the group. The
    best x groups (a task in several takes the better test loss) are trained from scratch; singles
    and pairs among them are at hand.
    """
    check_splits(study, splits)
    n = len(study.tasks)
    letters = sort_tasks(study.tasks)
    singles = [study.from_scratch(a) for a in letters]
    pairs = [study.from_scratch(a + b) for a, b in combinations(letters, 2)]
    yield [Need(t, study.rounds) for t in (*singles, *pairs)]
    losses = {t.tasks: study.store.result(t)["test_best"] for t in (*singles, *pairs)}
    single_losses = np.array([losses[a][a] for a in letters])
    pair_losses = np.full((n, n), np.nan)
    for i, j in combinations(range(n), 2):
        of_pair = losses[letters[i] + letters[j]]
        pair_losses[i, j], pair_losses[j, i] = of_pair[letters[i]], of_pair[letters[j]]
    chosen = hoa_groups(single_losses, pair_losses, splits)
    groups = [study.letters(g) for g in chosen.groups]
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    search = [Part(t, 0, study.rounds) for t in (*singles, *pairs)]
    parts = [Part(t, 0, study.rounds) for t in trained if len(t.tasks) > 2]
    return _result(f"HOA-{splits}", study, groups, trained, parts, search)


def standalone(study: Study, client: int) -> Recipe:
    """All tasks in one network, trained by one client on its own data (MAS, section 4.5)."""
    study = study.unmeasured(clients=(client,), clients_per_round=1)
    return (yield from _train_groups(f"standalone-{client}", study, [study.tasks]))


def every_partition(study: Study, splits: int, initialised: bool) -> Generator:
    """All partitions into x groups, best first: the optimal and the worst (MAS, Table 1).

    Every group from scratch, or (`initialised`) from the all-in-one weights of round R0. Returns a
    list of MethodResult, ordered by total test loss.
    """
    check_splits(study, splits)
    start = study.settings.mas.merge_rounds if initialised else 0
    make = study.from_all_in_one if initialised else study.from_scratch
    choices = [
        [study.letters(g) for g in groups] for groups in partitions(len(study.tasks), splits)
    ]
    trained = {group: make(group) for group in sorted({g for groups in choices for g in groups})}
    trunk = [Part(study.all_in_one(), 0, start)] if initialised else []
    needs = [Need(t, study.rounds) for t in trained.values()]
    yield [Need(part.trajectory, start) for part in trunk] + needs
    name = f"{'initialised' if initialised else 'scratch'}-{splits}"
    results = []
    for groups in choices:
        branches = [trained[group] for group in groups]
        parts = [*trunk, *(Part(t, start, study.rounds) for t in branches)]
        results.append(_result(name, study, groups, branches, parts))
    return sorted(results, key=lambda r: r.total)


METHODS = {
    "one-by-one": one_by_one,
    "all-in-one": all_in_one,
    "fedprox": fedprox,
    "gradnorm": gradnorm,
    "hoa": hoa,
    "tag": tag,
    "mas": merge_and_split,
}
TAKES_SPLITS = ("hoa", "tag", "mas")


def affinity_before_split(study: Study, rounds: int | None = None) -> np.ndarray:
    """S-hat (n, n) that a split reads: the all-in-one affinities of the first rounds.

    Unweighted mean over steps (already taken), clients, then rounds < affinity_rounds, or the last
    of these rounds alone; never of rounds from `rounds` on, where the split is made earlier. The
    diagonal is 0, not measured: Eq. 4 defines it.
    """
    mas = study.settings.mas
    trunk = study.all_in_one()
    measured = study.store.affinities(trunk)
    if (measured.rounds != np.arange(len(measured.rounds))).any():
        raise UserError(f"{study.store.folder(trunk) / 'affinity.csv'} lacks rounds; restore it, "
                        "or delete the folder to train anew")  # fmt: skip
    values = measured.values[:rounds][: mas.affinity_rounds]
    per_round = values.mean(1)  # (T, K, n, n) -> (T, n, n)
    S = per_round[-1] if mas.affinity_at == "last" else per_round.mean(0)
    np.fill_diagonal(S, 0.0)
    return S


_COUNTED = (
    "round", "seconds", "affinity_seconds", "joules", "samples", "bytes_down", "bytes_up",
)  # fmt: skip


def part_cost(store: Store, part: Part, like: Trajectory | None = None) -> Cost:
    """What a stretch of a trajectory cost when it was trained, by its record.

    A trajectory that was not trained to its end does not say on what; then `like` speaks for it.

    Seconds are those of local training and averaging. Affinities are measured in more rounds than
    a method asks for; the time of those measurements is left out, and energy in proportion. In it
    goes one backward pass through the encoder a measured step, which training needs anyway.
    """
    table = store.rounds(part.trajectory)
    paid = table["round"].between(part.begin, part.end, inclusive="left").to_numpy()
    rows = {name: table[name].to_numpy()[paid] for name in _COUNTED}
    extra = np.where(rows["round"] >= part.affinity_rounds, rows["affinity_seconds"], 0.0)
    seconds = rows["seconds"] - extra
    with np.errstate(invalid="ignore"):  # a round planned, not trained, takes no time
        joules = rows["joules"].astype(float) * (seconds / rows["seconds"])
    result = store.result(part.trajectory) or store.result(like or part.trajectory) or {}
    estimate, source = estimated_kwh(seconds.sum(), result.get("device", ", 1 thread"))
    measured = np.isfinite(joules).all()
    return Cost(
        seconds=float(seconds.sum()),
        energy_kwh=float(joules.sum() / JOULES_PER_KWH) if measured else None,
        energy_kwh_estimated=estimate,
        energy_source=f"{result.get('energy_source', 'not measured')}; estimated from {source}",
        bytes_down=int(rows["bytes_down"].sum()),
        bytes_up=int(rows["bytes_up"].sum()),
        samples=int(rows["samples"].sum()),
        peak_memory_bytes=int(result.get("peak_memory_bytes") or 0),
    )


def _train_groups(name: str, study: Study, groups: Sequence[str]) -> Recipe:
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    return _result(name, study, groups, trained, [Part(t, 0, study.rounds) for t in trained])


def _result(
    name: str,
    study: Study,
    groups: Sequence[str],
    trained: Sequence[Trajectory],
    parts: Sequence[Part],
    search: Sequence[Part] = (),
) -> MethodResult:
    """Every task's lowest test loss among the groups that train it, and the costs."""
    found = [study.store.result(t) for t in trained]
    if len({result.get("data") for result in found}) > 1:
        ids = ", ".join(t.id for t in trained)
        raise UserError(f"{name} joins records trained on different images ({ids}); delete those "
                        "that are not of the data wanted")  # fmt: skip
    best, last = ([result[which] for result in found] for which in ("test_best", "test_last"))
    everything = (*search, *parts)
    costs = [part_cost(study.store, part, trained[0]) for part in everything]
    return MethodResult(
        method=name,
        tasks=study.tasks,
        seed=study.seed,
        groups=tuple(groups),
        losses={a: min(x[a] for x in best if a in x) for a in study.tasks},
        losses_last={a: min(x[a] for x in last if a in x) for a in study.tasks},
        cost=sum(costs),
        search_cost=sum(costs[: len(search)]) if search else None,
        parts=everything,
    )


def check_splits(study: Study, splits: int = 1) -> None:
    """A UserError for a number of groups that the task set does not have."""
    if not 1 <= splits <= len(study.tasks):
        raise UserError(f"splits={splits}; {study.tasks} allows 1 to {len(study.tasks)}")


def check_measured(study: Study) -> None:
    """A UserError where there will be nothing to split, or nothing to split by."""
    if len(study.tasks) == 1:
        raise UserError(f"tasks={study.tasks}: one task cannot be split; allowed: two and more")
    if not study.settings.fl.measure_rounds:
        raise UserError("fl.measure_rounds=0: no affinities to split by; allowed: 1 and more")
