"""Splits against arrays worked by hand, brute force in exact arithmetic, an integer program."""

from fractions import Fraction
from itertools import combinations, product
from time import process_time

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from mas_core import split
from mas_core.config import UserError

HAND = np.array([[9.0, 4.0, 1.0], [2.0, 9.0, 0.0], [3.0, -2.0, 9.0]])  # row onto column


def all_partitions(n, x):
    """Every partition of n tasks into exactly x groups, by labelling each task; sorted."""
    found = set()
    for labels in product(range(x), repeat=n):
        if len(set(labels)) == x:
            groups = [tuple(t for t in range(n) if labels[t] == label) for label in range(x)]
            found.add(tuple(sorted(groups)))
    return sorted(found)


def exact_score(S, groups):
    """grouping_score in rationals, Eq. 4 on the diagonal, S integers."""
    n, score = len(S), Fraction(0)
    for group in groups:
        for j in group:
            if len(group) == 1:
                others = [i for i in range(n) if i != j]
                score += Fraction(sum(S[j][i] + S[i][j] for i in others), 2 * n - 2)
            else:
                score += Fraction(sum(S[i][j] for i in group if i != j), len(group) - 1)
    return score


def block_affinity(blocks, seed=0):
    """Affinities near 1 inside the planted blocks and near 0 between them."""
    n = sum(len(block) for block in blocks)
    S = np.random.default_rng(seed).uniform(-0.1, 0.1, (n, n))
    for block in blocks:
        S[np.ix_(block, block)] += 1
    return S


def test_self_affinity_by_hand():
    S = HAND.copy()
    expected = HAND.copy()
    np.fill_diagonal(expected, [10 / 4, 4 / 4, 2 / 4])  # (4+1 + 2+3, 2+0 + 4-2, 3-2 + 1+0) / 4
    assert np.array_equal(split.self_affinity(S), expected)
    assert np.array_equal(S, HAND)  # the argument is left alone


def test_score_by_hand():
    # onto 0: (2 + 3) / 2, onto 1: (4 - 2) / 2, onto 2: (1 + 0) / 2
    assert split.grouping_score(HAND, [(0, 1, 2)]) == 4.0
    # 1 -> 0 is S[1, 0] = 2, 0 -> 1 is S[0, 1] = 4, and task 2 alone has the diagonal
    assert split.grouping_score(HAND, [(0, 1), (2,)]) == 2 + 4 + 9


def test_the_example_of_the_paper():
    """{1, 2} and {3, 4, 5}: onto 1 it is S[2, 1], onto 3 it is (S[4, 3] + S[5, 3]) / 2."""
    S = np.arange(25.0).reshape(5, 5)
    onto = [S[1, 0], S[0, 1], (S[3, 2] + S[4, 2]) / 2, (S[2, 3] + S[4, 3]) / 2]
    onto.append((S[2, 4] + S[3, 4]) / 2)
    assert split.grouping_score(S, [(0, 1), (2, 3, 4)]) == sum(onto)


def test_best_split_by_hand():
    # Eq. 4 gives 2.5, 1, 0.5 alone; {0, 1} scores 6, {0, 2} scores 4, {1, 2} scores -2
    one, two, three = split.best_splits(HAND)
    assert one == split.Split(((0, 1, 2),), 4.0)
    assert two == split.Split(((0, 1), (2,)), 6.5)  # 4 + 1 and -2 + 2.5 are the others
    assert three == split.Split(((0,), (1,), (2,)), 4.0)
    assert split.runner_up(HAND, 2) == split.Split(((0, 2), (1,)), 5.0)


def test_the_diagonal_is_replaced():
    S = HAND.copy()
    np.fill_diagonal(S, -100)
    assert split.best_splits(S) == split.best_splits(HAND)


@pytest.mark.parametrize(
    "blocks", [((0, 1, 2), (3, 4)), ((0, 4), (1, 3), (2, 5)), ((0, 6, 7, 8), (1, 4), (2, 3, 5))]
)
def test_planted_blocks_are_found(blocks):
    found = split.best_split(block_affinity(blocks), len(blocks))
    assert found.groups == blocks


def test_direction_of_affinity_counts():
    """Of two pairs, what counts for a task is what it receives, divided by its group's size."""
    S = np.zeros((4, 4))
    S[0, 1:] = 1.0  # task 0 helps everybody and gains nothing: 3 x 1/3 together, 1 in a pair
    S[3, 2] = 0.5
    assert split.best_split(S, 1).score == pytest.approx(3.5 / 3, rel=1e-12)
    best = split.best_split(S, 2)
    assert best.groups == ((0, 1), (2, 3))
    assert best.score == 1.5


@pytest.mark.parametrize("n", range(1, 7))
def test_agrees_with_brute_force(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        S = rng.normal(size=(n, n))
        filled = split.self_affinity(S)
        for x, found in enumerate(split.best_splits(S), start=1):
            scored = [(split.grouping_score(filled, p), p) for p in all_partitions(n, x)]
            assert (found.score, found.groups) == max(scored)
            assert split.best_split(S, x) == found
            if 1 < x < n:
                second = split.runner_up(S, x)
                assert (second.score, second.groups) == sorted(scored)[-2]


@pytest.mark.parametrize("n", range(2, 7))
def test_ties_go_to_the_lexicographically_first_partition(n):
    """Tenths of small integers tie exactly in rationals, but not in floating point."""
    rng = np.random.default_rng(100 + n)
    differed = 0
    for _ in range(30):
        whole = rng.integers(-1, 3, (n, n))
        for x, found in enumerate(split.best_splits(whole / 10), start=1):
            ranked = sorted(
                ((-exact_score(whole.tolist(), p), p) for p in all_partitions(n, x)),
            )
            assert found.groups == ranked[0][1]
            assert found.score == pytest.approx(-float(ranked[0][0]) / 10, abs=1e-12)
            if 1 < x < n:
                assert split.runner_up(whole / 10, x).groups == ranked[1][1]
                differed += ranked[0][0] == ranked[1][0]
    assert differed > 10 or n < 4  # there were ties to break


def test_all_equal_affinities():
    groups = [s.groups for s in split.best_splits(np.full((4, 4), 0.1))]
    assert groups == [
        ((0, 1, 2, 3),),
        ((0,), (1, 2, 3)),
        ((0,), (1,), (2, 3)),
        ((0,), (1,), (2,), (3,)),
    ]


@pytest.mark.parametrize("n", [2, 3, 5, 9, 12])
def test_together_and_alone_score_the_mean_of_one_against_the_rest(n):
    S = split.self_affinity(np.random.default_rng(n).normal(size=(n, n)))
    together = split.grouping_score(S, [range(n)])
    alone = split.grouping_score(S, [[t] for t in range(n)])
    against = [split.grouping_score(S, [[t], [u for u in range(n) if u != t]]) for t in range(n)]
    assert together == pytest.approx(alone, abs=1e-12)
    assert together == pytest.approx(np.mean(against), abs=1e-12)
    assert split.best_split(S, 2).score >= together - 1e-12


def test_twelve_tasks():
    blocks = ((0, 5, 7), (1, 2, 10), (3, 4, 6, 8), (9, 11))
    S = block_affinity(blocks, seed=1)
    best = split.best_splits(S)
    assert best[3].groups == blocks
    for x, found in enumerate(best, start=1):
        assert len(found.groups) == x
        assert sorted(t for group in found.groups for t in group) == list(range(12))
        if x in (2, 11):
            assert split.runner_up(S, x).score < found.score
    # no partition drawn at random scores higher than the optimum of its number of groups
    rng, filled = np.random.default_rng(2), split.self_affinity(S)
    for labels in rng.integers(0, 4, (200, 12)):
        groups = [np.flatnonzero(labels == label).tolist() for label in set(labels.tolist())]
        assert split.grouping_score(filled, groups) <= best[len(groups) - 1].score + 1e-12


def test_one_task():
    assert split.self_affinity([[5.0]]).tolist() == [[0.0]]
    assert split.best_splits([[5.0]]) == (split.Split(((0,),), 0.0),)


@pytest.mark.parametrize("n", range(1, 7))
def test_partitions_are_complete_and_in_order(n):
    for x in range(1, n + 1):
        assert list(split.partitions(n, x)) == all_partitions(n, x)


def test_number_of_partitions():
    assert [sum(1 for _ in split.partitions(5, x)) for x in range(1, 6)] == [1, 15, 25, 10, 1]
    assert sum(1 for _ in split.partitions(9, 4)) == 7770


@pytest.mark.parametrize("x", [0, -1, 4, 1.0, True, "2", None])
@pytest.mark.parametrize("choose", [split.best_split, split.runner_up, split.tag_groups])
def test_impossible_numbers_of_splits(choose, x):
    with pytest.raises(UserError, match="allowed: 1 to 3"):
        choose(HAND, x)
    with pytest.raises(UserError, match="allowed: 1 to 3"):
        split.partitions(3, x)
    with pytest.raises(UserError, match="allowed: 1 to 3"):
        split.hoa_groups(HAND[0], HAND, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_matrices_that_are_not_finite(bad):
    S = HAND.copy()
    S[0, 1] = bad
    for choose in (split.best_splits, split.self_affinity, lambda S: split.tag_groups(S, 2)):
        with pytest.raises(UserError, match=rf"entry \[0, 1\] of the matrix is {bad}, not finite"):
            choose(S)


@pytest.mark.parametrize("anything", [np.nan, np.inf, 1e9])
def test_what_stands_on_the_diagonal_is_not_used(anything):
    S = HAND.copy()
    np.fill_diagonal(S, anything)
    assert split.best_splits(S) == split.best_splits(HAND)
    assert split.tag_groups(S, 2) == split.tag_groups(HAND, 2)
    assert np.array_equal(split.self_affinity(S), split.self_affinity(HAND))


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 0), (2, 2, 2), (17, 17)])
def test_matrices_that_are_not_square(shape):
    with pytest.raises(UserError, match="square, with 1 to 16 tasks"):
        split.best_split(np.zeros(shape), 1)


@pytest.mark.parametrize("groups", [[(0, 1)], [(0, 1), (1, 2)], [(0, 1, 2, 3)], [(0, 0, 1, 2)]])
def test_groups_that_are_no_partition(groups):
    with pytest.raises(UserError, match="each of the tasks 0..2 once"):
        split.grouping_score(HAND, groups)


def test_no_runner_up_where_there_is_one_partition():
    for x in (1, 3):
        with pytest.raises(UserError, match="only one partition"):
            split.runner_up(HAND, x)


def received(S, single):
    """(groups, what every task has in every group, -inf outside), by the definition."""
    n = len(S)
    groups = [g for size in range(1, n + 1) for g in combinations(range(n), size)]
    table = np.full((len(groups), n), -np.inf)
    for row, group in enumerate(groups):
        for j in group:
            others = [S[i, j] for i in group if i != j]
            table[row, j] = np.mean(others) if others else single[j]
    return groups, table


def brute_force_overlapping(table, x):
    """The highest sum over tasks of the best among x groups, over all choices of x groups."""
    choices = np.array(list(combinations(range(len(table)), min(x, len(table)))))
    return table[choices].max(1).sum(1).max()


def facility_location(table, x):
    """The same optimum as an integer program: open y_g, assign task j to one open group."""
    groups, tasks = np.nonzero(np.isfinite(table))
    m, k = len(table), len(groups)
    rows = np.arange(k)
    linked = coo_array(  # assigned - open <= 0
        (np.r_[np.ones(k), -np.ones(k)], (np.r_[rows, rows], np.r_[m + rows, groups])), (k, m + k)
    )
    served = coo_array((np.ones(k), (tasks, m + rows)), (table.shape[1], m + k))
    opened = coo_array((np.ones(m), (np.zeros(m, int), np.arange(m))), (1, m + k))
    solved = milp(
        np.r_[np.zeros(m), -table[groups, tasks]],
        integrality=np.r_[np.ones(m), np.zeros(k)],
        bounds=(0, 1),
        constraints=[
            LinearConstraint(linked, -np.inf, 0),
            LinearConstraint(served, 1, 1),
            LinearConstraint(opened, 0, x),
        ],
        options={"mip_rel_gap": 0},
    )
    assert solved.success
    return -solved.fun


def check_overlapping(found, groups, table, x):
    """The groups say what the score says, every task is served at its best, none idles."""
    assert 1 <= len(found.groups) <= x
    assert list(found.groups) == sorted(set(found.groups))
    assert set(found.serving) == set(range(len(found.groups)))
    chosen = table[[groups.index(group) for group in found.groups]]
    for task, server in enumerate(found.serving):
        assert task in found.groups[server]
        assert chosen[server, task] == pytest.approx(chosen[:, task].max(), abs=1e-12)
    return chosen.max(0).sum()


def test_tag_by_hand():
    """1 and 2 both gain most from 0, so both groups hold it; 0 gains most from 2."""
    found = split.tag_groups(HAND, 2)
    assert found == split.OverlappingSplit(((0, 1), (0, 2)), (1, 0, 1), 3.0 + 4.0 + 1.0)
    assert split.tag_groups(HAND, 3) == found  # a third group has nothing to serve
    assert split.tag_groups(HAND, 1) == split.OverlappingSplit(((0, 1, 2),), (0, 0, 0), 4.0)


def test_tag_singletons():
    """1e-6 rules a task alone out only while the others do not harm it; -1e6 always does."""
    harm = np.array([[0.0, 0.3, -0.2], [0.2, 0.0, -0.1], [0.1, 0.1, 0.0]])
    assert split.tag_groups(harm, 2) == split.OverlappingSplit(
        ((0, 1), (2,)), (0, 0, 1), 0.2 + 0.3 + 1e-6
    )
    never = split.tag_groups(harm, 2, singleton=-1e6)
    assert never.groups == ((0, 1), (1, 2))
    assert never.score == 0.2 + 0.3 - 0.1
    with pytest.raises(UserError, match="singleton"):
        split.tag_groups(harm, 2, singleton=np.nan)


def test_tag_fewest_then_smallest_groups():
    together = split.tag_groups(np.full((5, 5), 0.5), 3)
    assert together == split.OverlappingSplit(((0, 1, 2, 3, 4),), (0,) * 5, 2.5)
    # (0, 1), (0, 2) and (0, 1, 2) all give 1 to task 0, which harms the three that help each other
    S = np.array([[0, -1, -1, -1], [1, 0, 1, 1], [1, 1, 0, 1], [-1, 1, 1, 0]])
    found = split.tag_groups(S, 2)
    assert found == split.OverlappingSplit(((0, 1), (1, 2, 3)), (0, 1, 1, 1), 4.0)


def test_tag_takes_the_smallest_of_the_groups_that_give_the_same():
    """Around {1, 2}, (1, 2) gives 2 + 0 and (0, 1, 2), which is before it, (0 + 0) / 2 + 4 / 2."""
    S = np.array([[2, 0, 2, 2], [1, -1, 2, -1], [1, 0, 2, -1], [2, -1, 1, 1]])
    assert split.tag_groups(S, 2).groups == ((0, 3), (1, 2))


@pytest.mark.parametrize("n", range(1, 6))
def test_tag_agrees_with_brute_force(n):
    rng = np.random.default_rng(n)
    for _ in range(5 if n == 5 else 20):
        S = rng.normal(0.1, 0.3, (n, n))
        groups, table = received(S, np.full(n, 1e-6))
        for x in range(1, min(n, 4) + 1):
            found = split.tag_groups(S, x)
            expected = brute_force_overlapping(table, x)
            assert found.score == pytest.approx(expected, abs=1e-12)
            assert check_overlapping(found, groups, table, x) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("x", [2, 4, 6])
def test_tag_agrees_with_the_integer_program(x):
    S = np.random.default_rng(x).normal(0.1, 0.3, (9, 9))
    groups, table = received(S, np.full(9, 1e-6))
    found = split.tag_groups(S, x)
    assert found.score == pytest.approx(facility_location(table, x), abs=1e-6)
    assert check_overlapping(found, groups, table, x) == pytest.approx(found.score, abs=1e-12)


def test_the_most_that_a_group_gives_is_that_of_all_groups():
    rng = np.random.default_rng(5)
    for n in (1, 2, 6):
        for S in (rng.normal(size=(n, n)), rng.integers(-2, 3, (n, n)).astype(float)):
            incoming = split._incoming(S)
            most = [split._group_around(incoming, part, 0.0)[0] for part in range(1, 2**n)]
            np.testing.assert_allclose(split._most_around(S)[1:], most, rtol=0, atol=1e-12)


def test_sixteen_tasks_are_grouped_in_a_second():
    S = np.random.default_rng(0).normal(size=(16, 16))
    began = process_time()
    found = split.tag_groups(S, 4)
    assert process_time() - began < 3  # 0.3 s of one core; going through all pairs takes 9
    group = [found.groups[g] for g in found.serving]
    means = [S[[i for i in g if i != j], j].mean() for j, g in enumerate(group)]
    assert found.score == pytest.approx(sum(means), abs=1e-12)


SINGLE = [1.0, 2.0, 3.0]
PAIRS = [[np.nan, 0.5, 1.5], [2.5, np.nan, 1.0], [4.0, 2.0, np.nan]]


def test_hoa_groups_by_hand():
    # apart: 0 is best with 1 (0.5), 1 with 2 (1.0), 2 with 1 (2.0)
    found = split.hoa_groups(SINGLE, PAIRS, 2)
    assert found == split.OverlappingSplit(((0, 1), (1, 2)), (0, 1, 1), 3.5)
    # together: 0 loses (0.5 + 1.5) / 2, 1 (2.5 + 1) / 2, 2 (4 + 2) / 2
    assert split.hoa_groups(SINGLE, PAIRS, 1).score == 1.0 + 1.75 + 3.0
    assert split.hoa_groups([1.0, 0.5, 3.0], PAIRS, 2).groups == ((0, 1), (1, 2))
    assert split.hoa_groups([0.1, 0.5, 3.0], PAIRS, 3).groups == ((0,), (1,), (1, 2))


@pytest.mark.parametrize("n", range(1, 6))
def test_hoa_agrees_with_brute_force(n):
    rng = np.random.default_rng(n)
    for _ in range(3 if n == 5 else 10):
        single, pairs = rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, (n, n))
        groups, table = received(-pairs.T, -single)
        for x in range(1, min(n, 4) + 1):
            found = split.hoa_groups(single, pairs, x)
            expected = brute_force_overlapping(table, x)
            assert found.score == pytest.approx(-expected, abs=1e-12)
            assert check_overlapping(found, groups, table, x) == pytest.approx(expected, abs=1e-12)


def test_hoa_bad_input():
    with pytest.raises(UserError, match=r"allowed: \(n,\) and \(n, n\)"):
        split.hoa_groups(PAIRS, SINGLE, 1)
    with pytest.raises(UserError, match="not finite"):
        split.hoa_groups([1.0, np.nan, 3.0], PAIRS, 1)
