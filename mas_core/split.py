"""Which tasks continue together: the optimal split of MAS, and the groupings of TAG and HOA.

Affinities are arrays S of shape (n, n), dimensionless: S[i, j] is the affinity of task i onto
task j (row updates, column receives), higher is better. Tasks are indices 0..n-1. A set of tasks
is a bit mask inside this module (see masks.py) and a sorted tuple outside of it.

All three groupings are one problem: give every task a value in every group, then find the
partition of the tasks into at most (TAG, HOA) or exactly (MAS) x parts whose values sum highest,
which masks.py finds.

Sums that differ by less than 1e-12 n max|S|, which is what the order of a summation can change and
no more, count as equal. Among equals the lexicographically first partition is taken, groups being
sorted tuples ordered by their first task: ((0,), (1, 2)) before ((0, 1), (2,)).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from .config import UserError
from .masks import Group, best_partition, mask_of, members_of, partition_table, tasks_in

MAX_TASKS = 16  # the tables have 2^n rows and are filled from 3^n / 6 pairs: seconds at 16
TIE = 1e-12


@dataclass(frozen=True)
class Split:
    """A partition of the tasks, groups sorted by their first task, and its score."""

    groups: tuple[Group, ...]
    score: float


@dataclass(frozen=True)
class OverlappingSplit:
    """Groups that may share tasks; task j is served by groups[serving[j]].

    Every group serves a task. `score` is the sum over tasks of what the serving group gives them:
    mean affinity (TAG, higher is better) or estimated loss (HOA, lower is better).
    """

    groups: tuple[Group, ...]
    serving: tuple[int, ...]
    score: float


def self_affinity(S: ArrayLike) -> np.ndarray:
    """A copy of S (n, n) whose diagonal is that of Eq. 4; its own is not used.

    S[i, i] = sum over j != i of (S[i, j] + S[j, i]) / (2n - 2)   (MAS, Eq. 4)

    For n = 1 the equation divides by zero; the diagonal is then 0.
    """
    S = _diagonal_aside(S)
    np.fill_diagonal(S, (S.sum(0) + S.sum(1)) / max(2 * len(S) - 2, 1))
    return S


def grouping_score(S: ArrayLike, groups: Iterable[Sequence[int]]) -> float:
    """Sum over tasks of the mean affinity onto each inside its group (MAS, section 3.4).

    Task j in a group of several has the mean of S[i, j] over the group's other tasks i, alone it
    has S[j, j]: pass `self_affinity(S)` for the score MAS maximises. With Eq. 4 all tasks together
    and every task alone score the same, which is also the mean score of the n splits of one task
    against the rest. `groups` must hold every task once.
    """
    S = _square(S)
    groups = [list(group) for group in groups]
    if sorted(task for group in groups for task in group) != list(range(len(S))):
        raise UserError(f"groups {groups} do not hold each of the tasks 0..{len(S) - 1} once")
    incoming = _incoming(S)
    return float(sum(incoming[mask_of(group)].sum() for group in groups))


def best_split(S: ArrayLike, x: int) -> Split:
    """The partition of n tasks into exactly x groups with the highest `grouping_score`.

    The diagonal of S (n, n) is replaced by Eq. 4 first. The optimum is exact; ties are broken as
    the module says. The released code allows at most x groups; the paper counts exactly x
    ("fifteen and twenty-five combinations" of two and three splits of five tasks).
    Raises UserError for x outside 1..n and for S not square, not finite off its diagonal, empty,
    or of more than 16 tasks.
    """
    S = self_affinity(S)
    _check_count(x, len(S))
    return _best_splits(S, [x])[0]


def best_splits(S: ArrayLike) -> tuple[Split, ...]:
    """`best_split(S, x)` for x = 1..n, from one table."""
    S = self_affinity(S)
    return _best_splits(S, range(1, len(S) + 1))


def _best_splits(S: np.ndarray, numbers: Sequence[int]) -> tuple[Split, ...]:
    values = _incoming(S).sum(1)
    table = partition_table(values, max(numbers))
    return tuple(_split(S, best_partition(values, table, x, _tie(S))) for x in numbers)


def runner_up(S: ArrayLike, x: int) -> Split:
    """The best partition into exactly x groups other than `best_split(S, x)`; ties as there.

    Goes through all of them, at most 7,770 for nine tasks. Raises UserError where there is only
    one partition (x = 1 and x = n), and as best_split does.
    """
    best = best_split(S, x).groups
    S = self_affinity(S)
    if x in (1, len(S)):
        raise UserError(f"{len(S)} task(s) have only one partition into {x}: no runner-up")
    values = _incoming(S).sum(1)
    others = [[mask_of(g) for g in groups] for groups in partitions(len(S), x) if groups != best]
    scores = values[np.array(others)].sum(1)
    return _split(S, others[int(np.argmax(scores >= scores.max() - _tie(S)))])


def partitions(n: int, x: int) -> list[tuple[Group, ...]]:
    """All partitions of tasks 0..n-1 into exactly x groups, in lexicographic order.

    Their number is the Stirling number of the second kind: 15 and 25 for n = 5 and x = 2 and 3.
    """
    _check_count(x, n)
    return sorted(_partitions(tuple(range(n)), x))


def _partitions(tasks: Group, x: int) -> Iterator[tuple[Group, ...]]:
    if x == 1:
        yield (tasks,)
        return
    for more in range(len(tasks) - x + 1):  # besides its first task in the first group
        for group in combinations(tasks[1:], more):
            rest = tuple(task for task in tasks[1:] if task not in group)
            for others in _partitions(rest, x - 1):
                yield (tasks[0], *group), *others


def tag_groups(S: ArrayLike, x: int, singleton: float = 1e-6) -> OverlappingSplit:
    """TAG's grouping (Fifty et al., 2021): at most x groups, which may share tasks.

    Each task is served by the chosen group in which the mean affinity onto it is highest; the
    groups are those for which these means sum highest. Alone, a task has `singleton`: 1e-6 in the
    MAS paper; the released codes of TAG and MAS use -1e6. The diagonal of S (n, n) is not used.

    Exact: the tasks that one group serves are a part of it, so the best groups follow from the
    best partition into parts T, each worth the most that a group around T gives to T. Ties: the
    fewest groups, the first parts, the smallest, then first, group around each. Raises as
    best_split does.
    """
    S = _diagonal_aside(S)
    _check_count(x, len(S))
    if not np.isfinite(singleton):
        raise UserError(f"singleton={singleton!r}; allowed: a finite number")
    tie = _tie(S)
    np.fill_diagonal(S, singleton)
    return _overlapping(S, x, tie)


def hoa_groups(single_losses: ArrayLike, pair_losses: ArrayLike, x: int) -> OverlappingSplit:
    """HOA's grouping: at most x groups, which may share tasks, of the lowest estimated total loss.

    Alone task i loses single_losses[i], (n,); pair_losses[i, j] is what it loses trained together
    with j, (n, n), the diagonal not used. In a larger group it is estimated to lose their mean over
    the others in it (the higher-order approximation of Standley et al., 2020). A task takes the
    lowest estimate among the chosen groups that contain it. Exact, and ties, as in `tag_groups`.
    """
    single, pairs = np.array(single_losses, float), np.array(pair_losses, float)
    if single.ndim != 1 or pairs.shape != (len(single), len(single)):
        raise UserError(f"single and pair losses of shapes {single.shape} and {pairs.shape}; "
                        "allowed: (n,) and (n, n)")  # fmt: skip
    np.fill_diagonal(pairs, single)
    losses = _square(pairs)
    _check_count(x, len(losses))
    split = _overlapping(-losses.T, x, _tie(losses))
    return OverlappingSplit(split.groups, split.serving, -split.score)


def _overlapping(S: np.ndarray, x: int, tie: float) -> OverlappingSplit:
    """At most x groups, each task served by one, of highest sum of mean affinities onto tasks."""
    values = _most_around(S)
    table = partition_table(values, x)
    fewest = 1 + int(np.argmax(table[1:, -1] >= table[1:, -1].max() - tie))
    parts = best_partition(values, table, fewest, tie)
    incoming = _incoming(S)
    totals, around = zip(*(_group_around(incoming, part, tie) for part in parts), strict=True)
    groups = sorted(set(around))
    served = {t: groups.index(g) for part, g in zip(parts, around) for t in tasks_in(part)}
    serving = tuple(served[task] for task in sorted(served))
    return OverlappingSplit(tuple(groups), serving, float(np.sum(totals)))


def _most_around(S: np.ndarray) -> np.ndarray:
    """The most that any group around a set T of tasks gives to T, for every T; (2^n,).

    A group of m tasks gives T the sum over its members i of w_i / (m - 1), w_i being the sum of
    S[i, j] over j in T other than i. So the best group of m tasks is T with those m - |T| others
    whose w is highest, and sorting w takes the place of going through all 3^n pairs.
    """
    members = members_of(len(S))  # (2^n, n)
    others = S.copy()
    np.fill_diagonal(others, 0)
    w = members @ others.T  # (2^n, n): what task i gives to the set
    inside = (w * members).sum(1)
    outside = -np.sort(np.where(members, np.inf, -w), axis=1)  # highest first, then -inf
    sums = inside[:, None] + np.concatenate([np.zeros((len(w), 1)), outside.cumsum(1)], axis=1)
    size = members.sum(1)[:, None] + np.arange(len(S) + 1)  # m, (2^n, n + 1)
    most = (sums / np.maximum(size - 1, 1)).max(1, where=size > 1, initial=-np.inf)
    alone = 1 << np.arange(len(S))
    most[alone] = np.maximum(most[alone], S.diagonal())
    return most


def _group_around(incoming: np.ndarray, part: int, tie: float) -> tuple[float, Group]:
    """The most that a group around `part` gives to it, and the smallest (first) such group."""
    groups = np.arange(len(incoming))
    groups = groups[groups & part == part]
    totals = incoming[groups][:, tasks_in(part)].sum(1)
    tied = groups[totals >= totals.max() - tie].tolist()
    return totals.max(), min(map(tasks_in, tied), key=lambda group: (len(group), group))


def _incoming(S: np.ndarray) -> np.ndarray:
    """Mean affinity onto each task inside each group; (2^n, n), 0 where the task is not in it."""
    members = members_of(len(S))
    others = S.copy()
    np.fill_diagonal(others, 0)
    means = members @ others / np.maximum(members.sum(1, keepdims=True) - 1, 1)
    means[~members] = 0
    means[1 << np.arange(len(S)), np.arange(len(S))] = S.diagonal()
    return means


def _split(S: np.ndarray, masks: list[int]) -> Split:
    groups = tuple(tasks_in(mask) for mask in masks)
    return Split(groups, grouping_score(S, groups))


def _tie(S: np.ndarray) -> float:
    return TIE * len(S) * float(np.abs(S).max())


def _square(S: ArrayLike) -> np.ndarray:
    """A float64 copy of S, checked."""
    S = np.array(S, dtype=np.float64)
    if S.ndim != 2 or S.shape[0] != S.shape[1] or not 1 <= len(S) <= MAX_TASKS:
        raise UserError(f"a matrix of shape {S.shape}; "
                        f"allowed: square, with 1 to {MAX_TASKS} tasks")  # fmt: skip
    for i, j in np.argwhere(~np.isfinite(S)).tolist():
        raise UserError(f"entry [{i}, {j}] of the matrix is {S[i, j]}, not finite")
    if not np.isfinite(np.abs(S).sum()):
        raise UserError("the sum of the matrix's entries is not finite")
    return S


def _diagonal_aside(S: ArrayLike) -> np.ndarray:
    """A float64 copy of S with zeros on its diagonal, which may hold anything; else checked."""
    S = np.array(S, dtype=np.float64)
    if S.ndim == 2 and S.shape[0] == S.shape[1]:
        np.fill_diagonal(S, 0)
    return _square(S)


def _check_count(x: int, n: int) -> None:
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or not 1 <= x <= n:
        raise UserError(f"x={x!r} splits of {n} task(s); allowed: 1 to {n}")
