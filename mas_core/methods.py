"""The methods the paper compares, each a page-short recipe over trajectories.

A recipe is a generator: it yields what it needs trained next, as a list of `Need`, is resumed once
that is on record, and returns a `records.study.MethodResult`. A driver (`run.engine`) runs one or
many of them and trains what they share once. What a method costs is counted as if it ran alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from .config import Settings, UserError
from .fedavg import rule_of
from .split import best_split, hoa_groups, partitions, tag_groups

Trajectory = Any  # a records.trajectory.Trajectory: recipes only pass them on


@dataclass(frozen=True)
class Need:
    """A trajectory, and the round it is needed to."""

    trajectory: Trajectory
    until: int


@dataclass(frozen=True)
class Part:
    """A stretch of a trajectory that a method pays for."""

    trajectory: Trajectory
    begin: int
    end: int
    affinity_rounds: int = 0  # affinities of rounds before this one belong to the method


class Study(Protocol):
    """What a recipe works on; `records.study.Study` is the one over records."""

    tasks: str
    settings: Settings
    rounds: int  # R
    split_round: int  # R0; a UserError unless it is less

    def letters(self, group: Iterable[int]) -> str:
        """Indices of an affinity matrix as task letters."""

    def unmeasured(self, **changes: Any) -> Study:
        """The same without affinities, and with `changes` to its federated training."""

    def all_in_one(self) -> Trajectory:
        """All tasks merged, affinities measured on the way: the trunk of MAS and TAG."""

    def from_scratch(self, group: str) -> Trajectory:
        """The tasks of `group` trained from the seed's initial weights."""

    def from_all_in_one(self, group: str) -> Trajectory:
        """The tasks of `group` continued from the all-in-one weights of round R0."""

    def again(self, group: str) -> Trajectory:
        """The tasks of `group` from scratch, their schedule restarted at R0."""

    def affinities(self, window: int, rounds: int | None = None, at: str = "mean") -> np.ndarray:
        """S-hat (n, n): the trunk's affinities of rounds < window (and < rounds)."""

    def deciding_losses(self, trajectory: Trajectory) -> dict[str, float]:
        """The losses by task that decide between groups: on validation or on test views."""

    def result(self, name, groups, trained, parts, search=()) -> Any:
        """What the method returns: every task's test loss, and what all parts cost."""


Recipe = Generator[list[Need], None, Any]


def one_by_one(study: Study) -> Recipe:
    """Every task alone, one after the other (Bonawitz et al., 2019; MAS, section 1)."""
    return (yield from train_groups("one-by-one", study, study.tasks))


def all_in_one(study: Study) -> Recipe:
    """All tasks in one multi-task network by FedAvg: min sum_i L_i (MAS, Eq. 2)."""
    return (yield from train_groups("all-in-one", study, [study.tasks]))


def fedprox(study: Study) -> Recipe:
    """All-in-one with FedProx's mu/2 |theta - theta_server|^2, mu 0.004 if 0 (Li et al., 2020)."""
    study = study.unmeasured(method="fedprox", prox_mu=study.settings.fl.prox_mu or 0.004)
    return (yield from train_groups("fedprox", study, [study.tasks]))


def gradnorm(study: Study) -> Recipe:
    """All-in-one with GradNorm's loss weights on the shared representation (Chen et al., 2018)."""
    alpha, lr = study.settings.fl.gradnorm_alpha or 1.5, study.settings.fl.gradnorm_lr or 0.025
    study = study.unmeasured(method="gradnorm", gradnorm_alpha=alpha, gradnorm_lr=lr)
    return (yield from train_groups("gradnorm", study, [study.tasks]))


def merge_and_split(study: Study, splits: int = 2) -> Recipe:
    """MAS-x (Algorithm 1): merge, measure, split into exactly x groups, continue each group.

    All-in-one for R0 rounds; the split with the highest total affinity (Eq. 3, 4); every group
    from the all-in-one weights for the remaining R - R0 rounds.
    """
    check_splits(study, splits)
    mas, trunk = study.settings.mas, study.all_in_one()
    R0 = study.split_round
    check_measured(study, min(mas.affinity_rounds, R0))
    yield [Need(trunk, R0)]
    split = best_split(study.affinities(mas.affinity_rounds, R0, mas.affinity_at), splits)
    groups = [study.letters(g) for g in split.groups]
    branches = [study.from_all_in_one(group) for group in groups]
    yield [Need(branch, study.rounds) for branch in branches]
    parts = [Part(trunk, 0, R0, mas.affinity_rounds)]
    parts += [Part(branch, R0, study.rounds) for branch in branches]
    return study.result(f"MAS-{splits}", groups, branches, parts)


def tag(study: Study, splits: int = 2) -> Recipe:
    """TAG-x (Fifty et al., 2021): groups that may overlap, from all-in-one's affinities.

    All-in-one for R rounds, the best grouping (`split.tag_groups`) by the mean affinity of all of
    them (or of rounds < `tag.affinity_rounds`), every group from scratch; a task in several groups
    takes the better one, by `choice.by`.
    """
    check_splits(study, splits)
    check_measured(study)
    trunk = study.all_in_one()
    yield [Need(trunk, study.rounds)]
    read, fl = study.settings.tag.affinity_rounds or study.rounds, study.settings.fl
    read = min(read, study.rounds, fl.measure_rounds)
    chosen = tag_groups(study.affinities(read), splits)
    groups = [study.letters(g) for g in chosen.groups]
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    search = [Part(trunk, 0, study.rounds, read)]
    parts = [Part(t, 0, study.rounds) for t in trained if t != trunk]
    return study.result(f"TAG-{splits}", groups, trained, parts, search)


def hoa(study: Study, splits: int = 2) -> Recipe:
    """HOA-x (Standley et al., 2020): groups from the losses of all single tasks and pairs.

    A larger group's loss of a task is estimated as its mean over the pairs inside the group. The
    best x groups (a task in several takes the better one) are trained from scratch; singles and
    pairs among them are trained already. `choice.by` says which losses decide.
    """
    check_splits(study, splits)
    letters = study.letters(range(len(study.tasks)))
    small = {frozenset(g): study.from_scratch("".join(g))
             for m in (1, 2) for g in combinations(letters, m)}  # fmt: skip
    yield [Need(t, study.rounds) for t in small.values()]
    losses = {group: study.deciding_losses(t) for group, t in small.items()}
    L = np.array([[losses[frozenset(a + b)][a] for b in letters] for a in letters])  # a beside b
    chosen = hoa_groups(L.diagonal(), L, splits)
    groups = [study.letters(g) for g in chosen.groups]
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    search = [Part(t, 0, study.rounds) for t in small.values()]
    parts = [Part(t, 0, study.rounds) for t in trained if len(t.tasks) > 2]
    return study.result(f"HOA-{splits}", groups, trained, parts, search)


def standalone(study: Study, client: int) -> Recipe:
    """All tasks in one network, trained by one client on its own data (MAS, section 4.5)."""
    study = study.unmeasured(clients=(client,), clients_per_round=1)
    return (yield from train_groups(f"standalone-{client}", study, [study.tasks]))


def every_partition(study: Study, splits: int, initialised: bool) -> Generator:
    """All partitions into x groups, best first: the optimal and the worst (MAS, Table 1).

    Every group from scratch, or (`initialised`) from the all-in-one weights of round R0. Returns a
    list of MethodResult, ordered by total test loss.
    """
    check_splits(study, splits)
    start = study.settings.mas.merge_rounds if initialised else 0
    make = study.from_all_in_one if initialised else study.from_scratch
    choices = [[study.letters(g) for g in p] for p in partitions(len(study.tasks), splits)]
    trained = {group: make(group) for group in sorted({g for groups in choices for g in groups})}
    trunk = [Part(study.all_in_one(), 0, start)] if initialised else []
    needs = [Need(t, study.rounds) for t in trained.values()]
    yield [Need(part.trajectory, start) for part in trunk] + needs
    name = f"{'initialised' if initialised else 'scratch'}-{splits}"
    results = []
    for groups in choices:
        branches = [trained[group] for group in groups]
        parts = [*trunk, *(Part(t, start, study.rounds) for t in branches)]
        results.append(study.result(name, groups, branches, parts))
    return sorted(results, key=lambda r: r.total)


def restarted(study: Study, groups: Sequence[str], name: str) -> Recipe:
    """Groups trained from scratch whose schedule restarts at R0: the control of MAS's restart.

    Every group's network starts its learning rate anew after R0 rounds, as MAS's do. All tasks in
    one group: MAS-1, which is all-in-one where `mas.lr_schedule` is "continue".
    """
    whole = sorted(study.tasks)
    branches = [study.from_all_in_one(g) if sorted(g) == whole else study.again(g) for g in groups]
    yield [Need(t.parent, t.start_round) for t in branches]
    yield [Need(t, study.rounds) for t in branches]
    parts = [Part(t.parent, 0, t.start_round) for t in branches]
    parts += [Part(t, t.start_round, study.rounds) for t in branches]
    return study.result(name, groups, branches, parts)


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


def train_groups(name: str, study: Study, groups: Sequence[str]) -> Recipe:
    """Every group from scratch, each on its own."""
    trained = [study.from_scratch(group) for group in groups]
    yield [Need(t, study.rounds) for t in trained]
    parts = [Part(t, 0, study.rounds) for t in trained]
    return study.result(name, groups, trained, parts)


def check_splits(study: Study, splits: int = 1) -> None:
    """A UserError for a number of groups that the task set does not have."""
    if not 1 <= splits <= len(study.tasks):
        raise UserError(f"splits={splits}; {study.tasks} allows 1 to {len(study.tasks)}")


def check_measured(study: Study, rounds: int = 1) -> None:
    """A UserError where there will be nothing to split, or nothing to split by."""
    fl = study.settings.fl
    if len(study.tasks) == 1:
        raise UserError(f"tasks={study.tasks}: one task cannot be split; allowed: two and more")
    if not rule_of(fl).measures:
        raise UserError(f"fl.method={fl.method} measures no affinities to split by; "
                        "allowed: one that does, like fedavg")  # fmt: skip
    if not fl.measure_rounds:
        raise UserError("fl.measure_rounds=0: no affinities to split by; allowed: 1 and more")
    if fl.measure_rounds < rounds:
        raise UserError(f"affinities of {rounds} rounds are read, but fl.measure_rounds="
                        f"{fl.measure_rounds}; raise it, or lower mas.affinity_rounds")  # fmt: skip
