"""Tasks that fare better alone leave the merged network at the split."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mas.paper.who_to_merge import better_alone, mas_apart
from mas_core.methods import Need, Part


class Trained:
    """A study whose trajectories are their names; validation losses are given by name."""

    def __init__(self, tasks, losses):
        self.tasks, self.split_round, self.rounds = tasks, 30, 100
        self.store = SimpleNamespace(rounds=lambda name: losses[name])

    def all_in_one(self):
        return "merged"

    def again(self, a):
        return SimpleNamespace(parent=f"alone {a}", name=f"again {a}")

    def from_all_in_one(self, group):
        return f"continued {group}"

    def result(self, name, groups, trained, parts):
        return SimpleNamespace(method=name, groups=groups, trained=trained, parts=parts)


def validated(**by_task):
    """A record of 30 rounds, each fifth one validated, with a loss of its own in each of them."""
    every = np.arange(30)
    return pd.DataFrame({"round": every} | {
        f"val_{a}": np.where(every % 5 == 4, np.repeat(losses, 5), np.nan)
        for a, losses in by_task.items()})  # fmt: skip


@pytest.fixture
def study():
    """Merged, d is better off, n by less than the margin worse, k worse but for one validation."""
    ones = np.ones(6)
    return Trained("dnk", {
        "merged": validated(d=0.9 * ones, n=1.01 * ones, k=[0.1, 2.0, 0.5, 2.0, 2.0, 2.0]),
        **{f"alone {a}": validated(**{a: ones}) for a in "dnk"},
    })  # fmt: skip


def test_validations_from_a_third_of_r0_on_decide(study):
    assert better_alone(study, "d") == pytest.approx(np.log(0.9))
    assert better_alone(study, "n") == pytest.approx(np.log(1.01))
    assert better_alone(study, "k") == pytest.approx(np.log(2.0) * 3 / 5)  # the first is not read


def test_fewer_rounds_may_decide(study):
    assert better_alone(study, "k", 10) == pytest.approx(np.log(0.1 * 2.0) / 2)
    assert better_alone(study, "k", 15) == pytest.approx(np.log(0.1 * 2.0 * 0.5) / 3)
    assert np.isnan(better_alone(study, "k", 4))


def test_tasks_that_fare_better_alone_leave_and_the_others_stay_together(study):
    recipe = mas_apart(study)
    first = next(recipe)
    assert first == [Need(t, 30) for t in ("merged", "alone d", "alone n", "alone k")]
    (staying, leaving) = next(recipe)
    assert staying == Need("continued dn", 100)
    assert (leaving.trajectory.name, leaving.until) == ("again k", 100)
    with pytest.raises(StopIteration) as end:
        next(recipe)
    result = end.value.value
    assert (result.method, result.groups) == ("MAS-apart", ["dn", "k"])
    assert result.parts[:4] == [Part(n.trajectory, 0, 30) for n in first]
    assert [(p.begin, p.end) for p in result.parts[4:]] == [(30, 100)] * 2


@pytest.mark.parametrize("merged, groups", [(5.0, ["d", "k"]), (0.2, ["dk"]), (np.nan, ["dk"])])
def test_all_may_leave_or_stay(merged, groups):
    """Where nothing is validated before R0, nobody leaves."""
    study = Trained("dk", {
        "merged": validated(d=[merged] * 6, k=[merged] * 6),
        **{f"alone {a}": validated(**{a: [1.0] * 6}) for a in "dk"},
    })  # fmt: skip
    recipe = mas_apart(study)
    next(recipe), next(recipe)
    with pytest.raises(StopIteration) as end:
        next(recipe)
    assert end.value.value.groups == groups
