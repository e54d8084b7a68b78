"""Rules that choose R0, on training whose turn is known, and MAS with one of them."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mas.run import engine
from mas_core.records.store import Affinities

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

import when_to_split as when  # noqa: E402

T = 60


def seen(fall, noise=0.0, across=None):
    """Training of two tasks and a third whose losses are `fall`; a and b help each other."""
    rng = np.random.default_rng(0)
    S = np.tile([[np.nan, 0.1, 0.0], [0.1, np.nan, 0.0], [0.0, 0.0, np.nan]], (T, 4, 1, 1))
    if across is not None:
        S[:, :, 2, 0] = across[:, None]
    S = S + noise * rng.normal(size=S.shape)
    rounds = pd.DataFrame({"round": range(T)})
    for a in "abc":
        rounds[f"train_{a}"] = fall
        rounds[f"val_{a}"] = np.where((rounds["round"] + 1) % 5 == 0, fall, np.nan)
    measured = Affinities(np.arange(T), *(np.zeros((T, 4), int),) * 2, S)
    return when.Seen(rounds, measured, "abc", first=10)


def first(rule, found):
    return next((r for r in range(10, T, 5) if when.RULES[rule](found, r)), None)


def test_b_and_d_wait_for_the_loss_to_level_off():
    line, bend = np.linspace(1, 0.4, T), np.maximum(np.linspace(1, -0.8, T), 0.4)  # bends at 20
    assert [first(rule, seen(line)) for rule in "BD"] == [None, None]
    # At 30 a validation of before the bend still stands among the last four.
    assert [first(rule, seen(bend)) for rule in "BD"] == [35, 35]


def test_a_waits_for_the_affinity_between_groups_to_fall():
    rising = np.linspace(0.01, 0.02, T)
    falling = np.where(np.arange(T) < 25, 0.02, 0.0)
    assert first("A", seen(np.ones(T), across=rising)) is None
    assert first("A", seen(np.ones(T), across=falling)) == 30  # 4 of 10 smoothed rounds at zero


def test_c_waits_for_a_split_that_resampling_leaves():
    assert first("C", seen(np.ones(T))) == 20  # three looks after the first
    assert first("C", seen(np.ones(T), noise=3.0)) is None


def test_regret_is_against_the_best_of_a_curve():
    curve = {20: 2.0, 40: 1.0, 60: 1.5}
    assert when.loss_at(curve, 30) == 1.5 and when.loss_at(curve, 90) == 1.5
    assert when.regret(curve, 30) == pytest.approx(50) and when.regret(curve, 40) == 0


def test_a_restart_with_few_rounds_left_is_warned_of_at_any_length():
    found = seen(np.ones(T))
    assert [when.worse_than_merged(found, r, 100, "restart") for r in (10, 85, 86, 95)] == [
        False, False, True, True,
    ]  # fmt: skip
    assert [when.worse_than_merged(found, r, 20, "restart") for r in (17, 18)] == [False, True]
    assert not when.worse_than_merged(found, 95, 100, "continue")


def test_what_the_candidates_read_of_a_bend_at_20():
    """B and D see it from 35 on; before, `pace` takes the rounds so far."""
    bend = seen(np.maximum(np.linspace(1, -0.8, T), 0.4))
    line = seen(np.linspace(1, 0.4, T))
    assert when.left(bend, 45, T) == 0.25
    assert when.settled(bend, 45, T) == 0.25
    assert when.settled(line, 45, T) == when.settled(bend, 30, T) == np.inf
    assert when.pace(bend, 45, T) == pytest.approx(15 / 35)
    assert when.pace(line, 45, T) == pytest.approx(15 / 45)


def test_thresholds_are_judged_on_the_trunk_left_out():
    """A, B and C are worse from 0.2 left on. D never is: with its own threshold it had no alarm."""
    late = (-1, 0.5, 2)
    rows = [(trunk, schedule, share, loss * (schedule == "restart"))
            for trunk, losses in {"A": late, "B": late, "C": late, "D": (-1, -1, -1)}.items()
            for schedule in ("restart", "continue")
            for share, loss in zip((0.5, 0.2, 0.1), losses)]  # fmt: skip
    points = pd.DataFrame(rows, columns=["trunk", "schedule", "left", "worse"])
    points["settled"] = np.inf
    points["pace"] = 9.0
    counts = when.judged(points, 0).set_index("warning")
    found = {name: counts.loc[name, ["hits", "misses", "false alarms", "errors"]].tolist()
             for name in counts.index}  # fmt: skip
    assert found == {"never": [0, 6, 0, 6], "left": [6, 0, 2, 2], "settled": [0, 6, 0, 6],
                     "pace": [0, 6, 0, 6]}  # fmt: skip
    assert counts.loc["left", "threshold of all"] == pytest.approx(0.25)
    at_one = when.judged(points, 1).set_index("warning")
    assert at_one.loc["left", ["hits", "misses", "false alarms"]].tolist() == [3, 0, 1]
    assert at_one.loc["left", "threshold of all"] == pytest.approx(0.15)


LATE = [("restart", 3, False), ("restart", 4, True), ("continue", 4, False)]


@pytest.mark.parametrize(("schedule", "R0", "warned"), LATE)
def test_mas_auto_warns(schedule, R0, warned, settings, folder, store, monkeypatch):
    from dataclasses import replace

    from mas_core.records.study import Study

    monkeypatch.setattr(when, "EVERY", 1)
    monkeypatch.setattr(when, "FEW", 0.3)
    monkeypatch.setitem(when.RULES, "B", lambda found, r: r >= R0)
    mas = replace(settings.mas, affinity_rounds=1, lr_schedule=schedule)
    longer = replace(settings, mas=mas, fl=replace(settings.fl, rounds=5))
    study = Study("dk", longer, 0, store)
    made = engine.run({"auto": when.mas_auto(study)}, store, folder)["auto"]
    assert made.merge_rounds == R0
    assert made.warning.startswith(f"a split after {R0} of 5 rounds") == warned
    assert bool(made.warning) == warned


def test_mas_auto_is_mas_with_the_round_that_its_rule_chose(settings, folder, store, monkeypatch):
    from dataclasses import replace

    from mas_core import methods
    from mas_core.records.study import Study

    monkeypatch.setattr(when, "EVERY", 1)
    monkeypatch.setitem(when.RULES, "B", lambda found, r: r >= 3)
    mas = replace(settings.mas, affinity_rounds=1, merge_rounds=3)
    study = Study("dk", replace(settings, mas=replace(mas, merge_rounds=1)), 0, store)
    fixed = Study("dk", replace(settings, mas=mas), 0, store)
    made = engine.run({"auto": when.mas_auto(study), "fixed": methods.merge_and_split(fixed, 2)},
                      store, folder)  # fmt: skip
    assert made["auto"].method == "MAS-auto-2"
    assert made["auto"].losses == made["fixed"].losses
    assert [t.trajectory for t in made["auto"].parts] == [t.trajectory for t in made["fixed"].parts]
