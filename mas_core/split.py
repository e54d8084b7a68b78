"""Which tasks go on together: the optimal split of MAS, and the groupings of TAG and HOA.

Affinities are arrays S of shape (n, n), dimensionless: S[i, j] is the affinity of task i onto
task j (row updates, column receives), higher is better. Tasks are indices 0..n-1. A set of tasks
is a bit mask inside this module, task t being bit 1 << t, and a sorted tuple outside of it.

All three groupings are one problem: give every task a value in every group, then find the
partition of the tasks into at most (TAG, HOA) or exactly (MAS) x parts whose values sum highest.
Dynamic programming over subsets solves it exactly, in about x 3^(n-1) / 2 additions.

Sums that differ by less than 1e-12 n max|S|, which is what the order of a summation can change and
no more, count as equal. Among equals the lexicographically first partition is taken, groups being
sorted tuples ordered by their first task: ((0,), (1, 2)) before ((0, 1), (2,)).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .config import UserError

MAX_TASKS = 16  # the tables have 2^n rows and are filled from 3^n / 6 pairs: seconds at 16
TIE = 1e-12

Group = tuple[int, ...]


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
    """A copy of S (n, n) whose diagonal is that of Eq. 4; what stood there is not used.

    S[i, i] = sum over j != i of (S[i, j] + S[j, i]) / (2n - 2)   (MAS, Eq. 4)

    For n = 1 the equation divides by zero; the diagonal is then 0.
    """
    S = _square(S)
    np.fill_diagonal(S, 0)
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
    score = 0.0
    for group in groups:
        block = S[np.ix_(group, group)]
        if len(group) > 1:
            np.fill_diagonal(block, 0)
        score += block.sum() / max(len(group) - 1, 1)
    return float(score)


def best_split(S: ArrayLike, x: int) -> Split:
    """The partition of n tasks into exactly x groups with the highest `grouping_score`.

    The diagonal of S (n, n) is replaced by Eq. 4 first. The optimum is exact; ties are broken as
    the module says. The released code allows at most x groups; the paper counts exactly x
    ("fifteen and twenty-five combinations" of two and three splits of five tasks).
    Raises UserError for x outside 1..n and for S not square, not finite (the diagonal included),
    empty, or of more than 16 tasks.
    """
    S = self_affinity(S)
    _check_count(x, len(S))
    values = _incoming(S).sum(1)
    best = _partition_table(values, x)
    return _split(S, _first_partition(values, best, len(values) - 1, x, _tie(S)))


def best_splits(S: ArrayLike) -> tuple[Split, ...]:
    """`best_split(S, x)` for x = 1..n, from one table."""
    S = self_affinity(S)
    values = _incoming(S).sum(1)
    best = _partition_table(values, len(S))
    return tuple(
        _split(S, _first_partition(values, best, len(values) - 1, x, _tie(S)))
        for x in range(1, len(S) + 1)
    )


def runner_up(S: ArrayLike, x: int) -> Split:
    """The best partition into exactly x groups other than `best_split(S, x)`; ties as there.

    Exact without enumeration: the runner-up agrees with the best partition up to some group and
    opens the next one differently, so one look at every group of the best partition is enough.
    Raises UserError where there is only one partition (x = 1 and x = n), and as best_split does.
    """
    S = self_affinity(S)
    _check_count(x, len(S))
    if x in (1, len(S)):
        raise UserError(f"{len(S)} task(s) have only one partition into {x}: no runner-up")
    values, tie = _incoming(S).sum(1), _tie(S)
    best = _partition_table(values, x)
    full = len(values) - 1
    first = _first_partition(values, best, full, x, tie)
    departures = []  # (best score, common groups, tasks left)
    for kept in range(x - 1):
        common, left = first[:kept], full ^ sum(first[:kept])
        groups, totals = _openings(values, best, left, x - kept)
        score = values[common].sum() + totals[groups != first[kept]].max()
        departures.append((score, common, left))
    top = max(score for score, _, _ in departures)
    tied = [
        common
        + _first_partition(
            values, best, left, x - len(common), tie - (top - score), first[len(common)]
        )
        for score, common, left in departures
        if score >= top - tie
    ]
    return _split(S, min(tied, key=lambda masks: [_tasks(mask) for mask in masks]))


def partitions(n: int, x: int) -> Iterator[tuple[Group, ...]]:
    """All partitions of tasks 0..n-1 into exactly x groups, in lexicographic order.

    Their number is the Stirling number of the second kind: 15 and 25 for n = 5 and x = 2 and 3.
    """
    _check_count(x, n)
    return _partitions(tuple(range(n)), x)


def tag_groups(S: ArrayLike, x: int, singleton: float = 1e-6) -> OverlappingSplit:
    """TAG's grouping (Fifty et al., 2021): at most x groups, which may share tasks.

    Each task is served by the chosen group in which the mean affinity onto it is highest; the
    groups are those for which these means sum highest. Alone, a task has `singleton`: 1e-6, as the
    MAS paper says of TAG, rules out singletons where affinities are larger; the released codes of
    TAG and MAS use -1e6, which rules them out always. The diagonal of S (n, n) is not used.

    Exact, where both released codes search exponentially: the tasks that one group serves are a
    part of it, so the best groups follow from the best partition into parts T, each worth the most
    that a group around T gives to T. Among equal scores the fewest groups, then the
    lexicographically first parts, then the smallest and lexicographically first group around each.
    Raises as best_split does.
    """
    S = _square(S)
    _check_count(x, len(S))
    if not np.isfinite(singleton):
        raise UserError(f"singleton={singleton!r}; allowed: a finite number")
    np.fill_diagonal(S, 0)
    tie = _tie(S)
    np.fill_diagonal(S, singleton)
    return _overlapping(_incoming(S), x, tie)


def hoa_estimate(
    single_losses: ArrayLike, pair_losses: ArrayLike, group: Sequence[int]
) -> np.ndarray:
    """Estimated loss of each task of `group` when the group is trained together; (len(group),).

    Task i has the mean of pair_losses[i, j] over the group's other tasks j, alone it has
    single_losses[i] (the higher-order approximation of Standley et al., 2020). single_losses is
    (n,); pair_losses is (n, n), entry [i, j] the loss of task i trained together with j, its
    diagonal not used.
    """
    losses = _losses(single_losses, pair_losses)
    group = list(group)
    if not group or len(set(group)) < len(group) or not set(group) <= set(range(len(losses))):
        raise UserError(f"group {group}; allowed: different tasks out of 0..{len(losses) - 1}")
    return _incoming(losses.T)[sum(1 << task for task in group), group]


def hoa_groups(single_losses: ArrayLike, pair_losses: ArrayLike, x: int) -> OverlappingSplit:
    """HOA's grouping: at most x groups, which may share tasks, of the lowest estimated total loss.

    Losses as in `hoa_estimate`; each task takes the lowest estimate among the chosen groups that
    contain it. Exact, and ties, as in `tag_groups`; `score` is the estimated total loss.
    """
    losses = _losses(single_losses, pair_losses)
    _check_count(x, len(losses))
    split = _overlapping(-_incoming(losses.T), x, _tie(losses))
    return OverlappingSplit(split.groups, split.serving, -split.score)


def _overlapping(incoming: np.ndarray, x: int, tie: float) -> OverlappingSplit:
    """At most x groups, each task served by one, of highest sum of incoming[group, task]."""
    full = len(incoming) - 1
    values = _serving_values(incoming)
    best = _partition_table(values, x)
    scores = best[1:, full]
    fewest = 1 + int(np.argmax(scores >= scores.max() - tie))
    parts = _first_partition(values, best, full, fewest, tie)
    around = [_smallest_group(incoming, part, tie) for part in parts]
    groups = sorted(set(around), key=_tasks)
    serving, score = [0] * incoming.shape[1], 0.0
    for part, group in zip(parts, around, strict=True):
        for task in _tasks(part):
            serving[task] = groups.index(group)
            score += float(incoming[group, task])
    return OverlappingSplit(tuple(_tasks(group) for group in groups), tuple(serving), score)


def _serving_values(incoming: np.ndarray) -> np.ndarray:
    """For every set T of tasks the most that a group around T gives to T; (2^n,)."""
    values = np.full(len(incoming), -np.inf)
    size = _members(incoming.shape[1]).sum(1)
    for p in range(1, incoming.shape[1] + 1):
        groups = np.flatnonzero(size == p)
        served = _subsets(groups)
        totals = np.zeros((len(groups), 1))
        tasks = _split_bits(groups)
        for c in range(p):  # in the order in which _subsets doubles
            gain = incoming[groups, tasks[:, c]][:, None]
            totals = np.concatenate([totals, totals + gain], axis=1)
        np.maximum.at(values, served, totals)
    return values


def _smallest_group(incoming: np.ndarray, part: int, tie: float) -> int:
    """The smallest, then lexicographically first, of the groups that serve `part` best."""
    groups = np.arange(len(incoming))
    groups = groups[groups & part == part]
    totals = incoming[groups][:, _tasks(part)].sum(1)
    groups = groups[totals >= totals.max() - tie]
    size = _members(incoming.shape[1])[groups].sum(1)
    return _first(groups[size == size.min()])


def _incoming(S: np.ndarray) -> np.ndarray:
    """Mean affinity onto each task inside each group; (2^n, n), 0 where the task is not in it."""
    members = _members(len(S))
    others = S.copy()
    np.fill_diagonal(others, 0)
    means = members @ others / np.maximum(members.sum(1, keepdims=True) - 1, 1)
    means[~members] = 0
    means[1 << np.arange(len(S)), np.arange(len(S))] = S.diagonal()
    return means


def _partition_table(values: np.ndarray, x: int) -> np.ndarray:
    """best[k, mask]: highest sum of values over partitions of `mask` into exactly k groups.

    (x + 1, 2^n), -inf where there is none. The lowest task left always opens the next group, so
    besides the full set only sets without task 0 are ever left over, and only those are filled.
    """
    full = len(values) - 1
    best = np.full((x + 1, full + 1), -np.inf)
    best[0, 0] = 0
    best[1, 1:] = values[1:]
    masks = np.append(np.arange(2, full, 2), full)
    size = _members(full.bit_length())[masks].sum(1)
    for p in range(2, full.bit_length() + 1):
        of_size = masks[size == p]
        left = _subsets(of_size & (of_size - 1))  # (sets, 2^(p-1)): all but the group just opened
        opened = values[of_size[:, None] ^ left]
        for k in range(2, min(p, x) + 1):
            best[k, of_size] = (opened + best[k - 1][left]).max(1)
    return best


def _openings(
    values: np.ndarray, best: np.ndarray, mask: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every first group of a partition of `mask` into k groups, and the best sum it leads to."""
    left = _subsets(np.array([mask & (mask - 1)]))[0]
    return mask ^ left, values[mask ^ left] + best[k - 1][left]


def _first_partition(
    values: np.ndarray, best: np.ndarray, mask: int, k: int, tie: float, barred: int = 0
) -> list[int]:
    """The lexicographically first best partition of `mask` into k groups, as masks.

    `barred` may not be its first group.
    """
    chosen: list[int] = []
    slack = tie  # how much the sum may still lose against the best one
    for left in range(k, 0, -1):
        groups, totals = _openings(values, best, mask, left)
        if barred and not chosen:
            groups, totals = groups[groups != barred], totals[groups != barred]
        group = _first(groups[totals >= totals.max() - slack])
        slack = max(0.0, slack - (totals.max() - totals[groups == group][0]))
        chosen.append(group)
        mask ^= group
    return chosen


def _first(masks: np.ndarray) -> int:
    """The mask whose sorted tuple of tasks comes first: (0, 1), then (0, 1, 2), then (0, 2)."""
    prefix = 0
    while not (masks == prefix).any():
        rest = masks ^ prefix
        lowest = rest & -rest
        masks = masks[lowest == lowest.min()]
        prefix |= int(lowest.min())
    return prefix


def _partitions(left: Group, x: int) -> Iterator[tuple[Group, ...]]:
    if x == 1:
        yield (left,)
        return
    for group in _groups(left[:1], left[1:], len(left) - x):
        rest = tuple(task for task in left if task not in group)
        for groups in _partitions(rest, x - 1):
            yield group, *groups


def _groups(group: Group, later: Group, more: int) -> Iterator[Group]:
    """`group` with up to `more` of the `later` tasks, in lexicographic order."""
    yield group
    if more:
        for i, task in enumerate(later):
            yield from _groups((*group, task), later[i + 1 :], more - 1)


def _members(n: int) -> np.ndarray:
    """Whether task t is in mask m; (2^n, n) bool."""
    return np.arange(1 << n)[:, None] >> np.arange(n) & 1 == 1


def _split_bits(masks: np.ndarray) -> np.ndarray:
    """The tasks of masks that have p tasks each, ascending; (len(masks), p)."""
    bits = int(masks.max()).bit_length()
    members = masks[:, None] >> np.arange(bits) & 1
    return np.nonzero(members)[1].reshape(len(masks), -1)


def _subsets(masks: np.ndarray) -> np.ndarray:
    """All subsets of masks that have p tasks each, the empty one first; (len(masks), 2^p)."""
    subsets = np.zeros((len(masks), 1), dtype=np.int64)
    for task in _split_bits(masks).T:
        subsets = np.concatenate([subsets, subsets | 1 << task[:, None]], axis=1)
    return subsets


def _tasks(mask: int) -> Group:
    return tuple(task for task in range(int(mask).bit_length()) if mask >> task & 1)


def _split(S: np.ndarray, masks: list[int]) -> Split:
    groups = tuple(_tasks(mask) for mask in masks)
    return Split(groups, grouping_score(S, groups))


def _tie(S: np.ndarray) -> float:
    return TIE * len(S) * float(np.abs(S).max())


def _square(S: ArrayLike) -> np.ndarray:
    """A float64 copy of S, checked."""
    S = np.array(S, dtype=np.float64)
    if S.ndim != 2 or S.shape[0] != S.shape[1] or not 1 <= len(S) <= MAX_TASKS:
        raise UserError(
            f"a matrix of shape {S.shape}; allowed: square, with 1 to {MAX_TASKS} tasks"
        )
    if not np.isfinite(np.abs(S).sum()):
        raise UserError("the matrix (or the sum of its entries) is not finite")
    return S


def _losses(single_losses: ArrayLike, pair_losses: ArrayLike) -> np.ndarray:
    """pair_losses with single_losses as its diagonal, checked."""
    single = np.array(single_losses, dtype=np.float64)
    pairs = np.array(pair_losses, dtype=np.float64)
    if single.ndim != 1 or pairs.shape != (len(single), len(single)):
        raise UserError(
            f"single and pair losses of shapes {single.shape} and {pairs.shape}; "
            "allowed: (n,) and (n, n)"
        )
    np.fill_diagonal(pairs, single)
    return _square(pairs)


def _check_count(x: int, n: int) -> None:
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or not 1 <= x <= n:
        raise UserError(f"x={x!r} splits of {n} task(s); allowed: 1 to {n}")
