"""What each figure asks for: recipes, what they share, what is said when it is not there."""

import shlex
from dataclasses import replace

import pytest

from mas import experiments
from mas.__main__ import _overrides, _parser
from mas.paper.experiments import Missing, ask, chosen, recipes_of, reproduce_command
from mas.run import workers
from mas.run.engine import collect
from mas_core.config import UserError
from mas_core.records import training
from mas_core.records.store import Store

TINY = {
    "data.source": "taskonomy", "data.size": 16, "data.buildings": 4, "fl.batch_size": 4,
    "fl.rounds": 4, "fl.measure_rounds": 4, "mas.merge_rounds": 2, "mas.affinity_rounds": 2,
}  # fmt: skip
METHODS = {"one-by-one", "all-in-one", "fedprox", "gradnorm"}


@pytest.fixture
def small(tmp_path):
    """An empty store of the small preset, as it is."""
    return Store(tmp_path / "results", "small")


def names(recipes):
    return {(method, tasks) for method, tasks, _ in recipes}


def of(tasks, *groups):
    return {(method, tasks) for group in groups for method in group}


def x(name, low, high):
    return {f"{name}-{i}" for i in range(low, high + 1)}


def test_figures_compare_the_papers_methods(small):
    five = METHODS | x("MAS", 2, 4) | x("TAG", 2, 4) | x("HOA", 2, 4)
    nine = METHODS | x("MAS", 2, 5) | x("TAG", 2, 4)
    assert names(experiments.figure_5(small, 0, {})) == of("sdnkt", five)
    assert names(experiments.figure_6(small, 0, {})) == of("erckt", five) | of("sdnkterca", nine)
    assert names(experiments.figure_1(small, 0, {})) == of("sdnkterca", nine)
    tables = {f"{s}-{n}" for s in ("MAS", "scratch", "initialised") for n in (2, 3)}
    assert names(experiments.table_1(small, 0, {})) == of("sdnkt", tables) | of("erckt", tables)
    alone = {f"standalone-{k}" for k in range(32)} | {"all-in-one", "MAS-2"}
    assert names(experiments.figure_9(small, 0, {})) == of("sdnkt", alone)
    sweep = {f"MAS-2 R0={r}" for r in range(10, 100, 10)}
    sets = ("sdnkt", "erckt", "sdnkterca")
    assert names(experiments.figure_8(small, 0, {})) == set().union(*(of(s, sweep) for s in sets))
    ek = {f"all-in-one E={e}" for e in (1, 2, 5, 10)}
    ek |= {f"all-in-one K={k}" for k in (2, 4, 6, 8, 16)}
    assert names(experiments.figure_10(small, 0, {})) == set().union(*(of(s, ek) for s in sets))
    more = {f"{m} K={k}" for m in ("all-in-one", "MAS-2") for k in (4, 8)}
    assert names(experiments.table_2(small, 0, {})) == of("sdnkt", more)
    assert names(experiments.figure_7(small, 0, {})) == {("all-in-one", "sdnkterca")}
    assert names(experiments.supplement_figure_3(small, 0, {})) == {("all-in-one", s) for s in sets}
    assert names(experiments.tour(small, 0, {})) == of("sdnkt", {"one-by-one", "all-in-one",
                                                                 "MAS-2"})  # fmt: skip


def first_needs(experiment, store, seed=0, overrides=None):
    return {n.trajectory for n in collect(experiment(store, seed, overrides or {}), store)[1]}


def test_the_trunk_is_one_trajectory_for_all_figures(small):
    """All-in-one of sdnkt serves the comparison, the R0 sweep, the tables and the defaults."""
    s = experiments.study(small, "sdnkt", 0, {})
    trunk = s.all_in_one()
    for experiment in (
        experiments.figure_5, experiments.figure_8, experiments.figure_9, experiments.figure_10,
        experiments.table_1, experiments.table_2, experiments.tour, experiments.ablation,
        experiments.supplement_tables_1_2, experiments.supplement_figure_3,
    ):  # fmt: skip
        assert trunk in first_needs(experiment, small), experiment.__name__
    # Nine merge rounds, three task sets: three trunks.
    assert len(first_needs(experiments.figure_8, small)) == 3
    # E and K once each but for the default, which is one trajectory.
    assert len(first_needs(experiments.figure_10, small)) == 3 * (3 + 4 + 1)


def test_singles_and_pairs_serve_one_by_one_and_hoa(small):
    needed = first_needs(experiments.figure_5, small)
    plain = {t for t in needed if t.fl.method == "fedavg"}
    assert sorted(len(t.tasks) for t in plain) == [1] * 5 + [2] * 10 + [5]
    assert len(needed - plain) == 2
    assert first_needs(experiments.tour, small) <= plain


def test_longer_rounds_train_little_that_other_figures_do_not(small):
    needed = first_needs(experiments.longer_rounds, small)
    assert {t for t in needed if t.fl.local_epochs == 1} <= first_needs(experiments.figure_5, small)
    five = {t for t in needed if t.fl.local_epochs == 5}
    assert sorted(t.tasks for t in five) == ["d", "k", "n", "s", "sdnkt", "sdnkt", "t"]
    shared = five & first_needs(experiments.figure_10, small)
    assert [t.tasks for t in shared] == ["sdnkt"]  # all-in-one; the trunk of MAS measures
    assert max(t.fl.measure_rounds for t in five) == 10
    five_already = {"fl.local_epochs": 5}
    needed = first_needs(experiments.longer_rounds, small, 0, five_already)
    assert {t.fl.local_epochs for t in needed} == {5}


def test_seeds_and_overrides_reach_every_trajectory(small):
    for seed, overrides in ((3, {}), (0, {"fl.local_epochs": 7}), (0, {"data.render_seed": 5})):
        changed = first_needs(experiments.figure_5, small, seed, overrides)
        assert changed.isdisjoint(first_needs(experiments.figure_5, small))
        assert {t.seed for t in changed} == {seed}
        assert {t.fl.local_epochs for t in changed} == {overrides.get("fl.local_epochs", 1)}


def test_when_to_split_has_the_local_epochs_that_it_says(small):
    recipes = experiments.when_to_split(small, 0, {"fl.local_epochs": 2}, ["sdnkt"])
    trunks = {E: next(recipes[f"all-in-one E={E}", "sdnkt", 0])[0].trajectory for E in (1, 2, 5)}
    assert {E: t.fl.local_epochs for E, t in trunks.items()} == {1: 1, 2: 2, 5: 5}


def test_missing_records_name_the_command(small):
    how = {"seeds": (0, 3), "overrides": {"fl.rounds": 50}}
    with pytest.raises(Missing, match="^at least 2 trajectories are not on record; ") as told:
        ask(experiments.figure_7, small, **how)
    command = str(told.value).partition("train them with: ")[2]
    assert command == (
        "mas reproduce figure_07_affinities --preset small --seeds 0 3 --set fl.rounds=50"
    )
    typed = _parser().parse_args(shlex.split(command)[1:])
    (stem,) = chosen(typed.notebooks)
    asked = recipes_of([stem], Store(small.results, typed.preset), typed.seeds, _overrides(typed))
    wanted = {n.trajectory for n in collect(asked, small)[1]}
    for seed in (0, 3):
        assert first_needs(experiments.figure_7, small, seed, {"fl.rounds": 50}) <= wanted
    text = reproduce_command("claims", "small", (0,), {"fl.method": "my module:Rule"})
    assert text == "mas reproduce claims --preset small --set 'fl.method=my module:Rule'"
    with pytest.raises(Missing, match="train them with: mas reproduce figure_07$"):
        ask(experiments.figure_7, small, command="mas reproduce figure_07")
    with pytest.raises(Missing, match=r"train them with: ask\(..., train_missing=True\)$"):
        ask(lambda *a: experiments.figure_7(*a), small)  # an experiment of one's own
    assert ask(experiments.figure_7, small, partial=True) == {}
    with pytest.raises(UserError, match="seeds=.*; name at least one"):
        ask(experiments.figure_7, small, seeds=[])
    assert not small.root.exists()


def test_asking_trains_what_is_missing_when_told_to_and_only_then(folder, tmp_path, monkeypatch):
    store, real, trained = Store(tmp_path, "smoke"), training.run_round, []

    def logged(net, state, trajectory, round_, data, *more):
        trained.append((trajectory.tasks, trajectory.seed, round_))
        return real(net, state, trajectory, round_, data, *more)

    monkeypatch.setattr(training, "run_round", logged)

    def pair(store, seed, overrides):
        return experiments.explore_affinities(store, seed, overrides, "dk")

    how = {"overrides": TINY, "seeds": (0, 1)}
    found = ask(pair, store, **how, train_missing=True, data_folder=str(folder))
    assert set(found) == {("all-in-one", "dk", 0), ("all-in-one", "dk", 1)}
    assert sorted(trained) == [("dk", s, r) for s in (0, 1) for r in range(4)]
    assert ask(pair, store, **how) == found and len(trained) == 8
    assert ask(pair, store, seeds=(0, 2), overrides=TINY, partial=True).keys() == {
        ("all-in-one", "dk", 0)
    }
    with pytest.raises(Missing, match="at least 1 "):
        ask(pair, store, seeds=(0, 2), overrides=TINY)


def test_asking_trains_on_the_gpu_there_is(small, folder, monkeypatch):
    used = []
    monkeypatch.setattr(workers, "choose_device", lambda name: "the GPU" if name is None else name)
    monkeypatch.setattr(workers, "run", lambda *a, **how: used.append(a[3]) or {})
    ask(experiments.figure_7, small, overrides=TINY, train_missing=True, data_folder=str(folder))
    assert used == ["the GPU"]


def test_needs_are_those_that_are_not_on_record(folder, tmp_path):
    store = Store(tmp_path, "smoke")
    s = experiments.study(store, "sdnkt", 0, TINY)
    asked = collect(experiments.tour(store, 0, TINY), store)[1]
    assert [n.trajectory.tasks for n in asked] == ["s", "d", "n", "k", "t", "sdnkt", "sdnkt"]
    training.train(s.from_scratch("k"), 4, store, folder)
    later = collect(experiments.tour(store, 0, TINY), store)[1]
    assert later == [n for n in asked if n.trajectory.tasks != "k"]
    assert collect({}, store) == ({}, [])


def test_small_buildings_limit_the_clients_asked_for(small):
    few = {"data.buildings": 6}
    keys = {m for m, _, _ in experiments.figure_10(small, 0, few)}
    assert keys & {f"all-in-one K={k}" for k in (2, 4, 6)} and "all-in-one K=8" not in keys
    settings = experiments.study(small, "sdnkt", 0, few).settings
    assert settings == replace(settings, data=replace(settings.data, buildings=6))
