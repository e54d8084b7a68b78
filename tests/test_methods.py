"""Recipes: which trajectories they need, how they choose groups, what they cost."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from safetensors.torch import load_file

from mas import engine
from mas.paper.experiments import first_rounds, groups_again
from mas_core import federated
from mas_core.config import Choice, Settings, Tag, UserError, stream
from mas_core.methods import (
    METHODS,
    TAKES_SPLITS,
    Need,
    Part,
    all_in_one,
    every_partition,
    fedprox,
    gradnorm,
    hoa,
    merge_and_split,
    one_by_one,
    restarted,
    standalone,
    tag,
)
from mas_core.records import training
from mas_core.records.cost import estimated_kwh
from mas_core.records.store import Store
from mas_core.records.study import Study, measuring_seconds, part_cost
from mas_core.split import best_split, hoa_groups, partitions, tag_groups

FIVE = "sdnkt"
DEVICE = "a CPU, 1 thread"


@pytest.fixture
def study(settings, store):
    return Study(FIVE, settings, 0, store)


def with_mas(study, **changes):
    settings = replace(study.settings, mas=replace(study.settings.mas, **changes))
    return replace(study, settings=settings)


def planted(n, blocks, inside=0.1, outside=-0.1):
    S = np.full((n, n), outside)
    for block in blocks:
        S[np.ix_(block, block)] = inside
    np.fill_diagonal(S, np.nan)
    return S


def make_record(store, need, affinity=None, losses=None, joules=True):
    """A record as training leaves it, with numbers of its own that no other trajectory has."""
    trajectory, until = need.trajectory, need.until
    rng = stream(0, trajectory.id)
    columns = list(trajectory.tasks)
    per_round = rng.uniform(10, 20, (trajectory.fl.rounds, 3))
    rows, measured = [], []
    for r in range(trajectory.start_round, until):
        seconds, part, energy = per_round[r]
        measuring = r < trajectory.fl.measure_rounds and len(columns) > 1
        rows.append({
            "round": r, "clients": "1 3", "samples": int(rng.integers(10, 99)),
            "affinity_seconds": f"{part / 4 if measuring else 0:.3f}",
            "bytes_down": int(rng.integers(1000, 9999)), "bytes_up": int(rng.integers(1000, 9999)),
            "seconds": f"{seconds:.3f}", "joules": f"{energy:.1f}" if joules else "",
            **{f"val_{a}": x for a, x in zip(columns, rng.uniform(1, 2, len(columns)).round(3))},
        })  # fmt: skip
        if measuring:
            S = planted(len(columns), [range(len(columns))]) if affinity is None else affinity(r)
            noise = rng.normal(size=S.shape)  # it cancels in the mean over clients
            for k, sign in ((1, 1.0), (3, -1.0)):
                measured.append({"round": r, "client": k, "measurements": 2} | {
                    f"{a}>{b}": "" if a == b else repr(float((S + sign * noise)[i, j]))
                    for i, a in enumerate(columns) for j, b in enumerate(columns)
                })  # fmt: skip
    store.write_config(trajectory)
    store.write_rows(trajectory, "rounds.csv", rows)
    if measured:
        store.write_rows(trajectory, "affinity.csv", measured)
    if until == trajectory.fl.rounds:
        best = dict(zip(columns, rng.uniform(1, 2, len(columns)).round(3), strict=True))
        store.write_result(trajectory, {
            "test_best": losses(trajectory) if losses else best,
            "test_last": {a: x + 0.5 for a, x in best.items()},
            "energy_source": "nvml" if joules else "not measured", "best_round": until - 1,
            "device": DEVICE, "peak_memory_bytes": int(rng.integers(10**6, 10**7)),
        })  # fmt: skip


def drive(make, study, **how):
    """Run one recipe on made-up records; its result, and what it asked for, in order."""
    asked = []
    while True:
        results, missing = engine.collect({0: make(study)}, study.store)
        if 0 in results:
            return results[0], asked
        asked.append(missing)
        for need in missing:
            make_record(study.store, need, **how)


def validated(study, trajectory):
    """Validation losses of the model with the least one, read from the record's text."""
    row = study.store.read_rows(trajectory, "rounds.csv", 4)[2 - trajectory.start_round]
    return {a: float(row[f"val_{a}"]) for a in trajectory.tasks}


def rows_of(study, trajectory, begin=0, end=4):
    rows = study.store.rounds(trajectory)
    return rows[(rows["round"] >= begin) & (rows["round"] < end)]


def assert_cost(cost, counted):
    """The cost against sums by hand over (rows, rounds whose affinities belong to the method)."""
    seconds = joules = samples = down = up = 0
    for rows, affinity_rounds in counted:
        for row in rows.to_dict("records"):
            own = row["seconds"]
            if row["round"] >= affinity_rounds:
                own -= row["affinity_seconds"]
            seconds += own
            joules += row["joules"] * own / row["seconds"]
            samples += row["samples"]
            down, up = down + row["bytes_down"], up + row["bytes_up"]
    assert cost.seconds == pytest.approx(seconds, rel=1e-9)
    assert cost.energy_kwh == pytest.approx(joules / 3.6e6, rel=1e-9)
    assert cost.energy_kwh_estimated == pytest.approx(estimated_kwh(seconds, DEVICE)[0], rel=1e-9)
    assert (cost.samples, cost.bytes_down, cost.bytes_up) == (samples, down, up)


# --- Each method on made-up records ---------------------------------------------------------------


def test_one_by_one(study):
    result, asked = drive(one_by_one, study)
    assert [n.trajectory.tasks for n in asked[0]] == list(FIVE) and len(asked) == 1
    assert {(n.until, n.trajectory.parent, n.trajectory.fl.measure_rounds) for n in asked[0]} == {
        (4, None, 0)
    }
    best = {a: study.store.result(study.from_scratch(a))["test_best"][a] for a in FIVE}
    assert result.losses == best and result.total == pytest.approx(sum(best.values()))
    assert (result.method, result.groups, result.search_cost) == ("one-by-one", tuple(FIVE), None)
    assert_cost(result.cost, [(rows_of(study, study.from_scratch(a)), 0) for a in FIVE])
    peaks = [study.store.result(study.from_scratch(a))["peak_memory_bytes"] for a in FIVE]
    assert result.cost.peak_memory_bytes == max(peaks)


def test_all_in_one_pays_for_no_affinities(study):
    result, asked = drive(all_in_one, study)
    trunk = study.all_in_one()
    assert asked == [[Need(trunk, 4)]] and trunk.fl.measure_rounds == 4
    rows = rows_of(study, trunk)
    assert_cost(result.cost, [(rows, 0)])
    assert result.cost.seconds < rows["seconds"].sum() - 1
    assert result.losses == study.store.result(trunk)["test_best"]
    assert result.losses_last == study.store.result(trunk)["test_last"]
    assert result.total_last == pytest.approx(sum(result.losses_last.values()))


def test_fedprox_and_gradnorm_are_trajectories_of_their_own(study):
    prox, asked_prox = drive(fedprox, study)
    norm, asked_norm = drive(gradnorm, study)
    (p,), (g,) = asked_prox[0], asked_norm[0]
    assert (p.trajectory.fl.method, p.trajectory.fl.prox_mu) == ("fedprox", 0.004)
    given = replace(study.settings, fl=replace(study.settings.fl, prox_mu=0.5, gradnorm_lr=0.1))
    (need,), (other,) = (next(m(replace(study, settings=given))) for m in (fedprox, gradnorm))
    assert need.trajectory.fl.prox_mu == 0.5
    assert (other.trajectory.fl.gradnorm_alpha, other.trajectory.fl.gradnorm_lr) == (1.5, 0.1)
    with pytest.raises(UserError, match="method=fedprox needs fl.prox_mu"):
        replace(study.settings, fl=replace(study.settings.fl, method="fedprox"))
    assert (g.trajectory.fl.method, g.trajectory.fl.gradnorm_alpha) == ("gradnorm", 1.5)
    assert g.trajectory.fl.gradnorm_lr > 0 and p.until == g.until == 4
    assert p.trajectory.fl.measure_rounds == g.trajectory.fl.measure_rounds == 0
    assert len({p.trajectory.id, g.trajectory.id, study.all_in_one().id}) == 3
    assert (prox.groups, norm.groups) == ((FIVE,), (FIVE,))


def by_round(r):
    """Rounds 0 and 1 speak for sdn,kt, round 1 alone for st,dnk, the later ones for sd,nkt."""
    if r == 0:
        return planted(5, [(0, 1, 2), (3, 4)], 0.5, -0.5)
    if r == 1:
        return planted(5, [(0, 4), (1, 2, 3)], 0.1, -0.1)
    return planted(5, [(0, 1), (2, 3, 4)], 5.0, -5.0)


@pytest.mark.parametrize(
    "changes, groups",
    [
        ({"affinity_rounds": 2}, ("sdn", "kt")),
        ({"affinity_rounds": 2, "affinity_at": "last"}, ("st", "dnk")),
        ({"affinity_rounds": 1}, ("sdn", "kt")),
        ({"affinity_rounds": 4, "merge_rounds": 3}, ("sd", "nkt")),
        # Affinities of rounds that the merged task is not trained for do not exist yet.
        ({"affinity_rounds": 4, "merge_rounds": 1}, ("sdn", "kt")),
        ({"affinity_rounds": 4, "merge_rounds": 2, "affinity_at": "last"}, ("st", "dnk")),
    ],
)
def test_mas_splits_by_the_affinities_of_the_first_rounds(study, changes, groups):
    study = with_mas(study, **changes)
    R0 = study.settings.mas.merge_rounds
    result, asked = drive(merge_and_split, study, affinity=by_round)
    assert result.groups == groups and result.method == "MAS-2"
    trunk = study.all_in_one()
    assert asked[0] == [Need(trunk, R0)]
    branches = [n.trajectory for n in asked[1]]
    assert [b.tasks for b in branches] == list(groups)
    for branch in branches:
        assert (branch.parent, branch.start_round, branch.lr_from) == (trunk, R0, 0)
        assert branch.fl == replace(trunk.fl, measure_rounds=0) and branch.seed == 0
    assert {n.until for n in asked[1]} == {4}
    # R0 rounds of the trunk, with the affinities it reads, and R - R0 rounds of every group.
    read = min(R0, study.settings.mas.affinity_rounds)
    counted = [(rows_of(study, trunk, 0, R0), read)]
    counted += [(rows_of(study, b, R0, 4), 0) for b in branches]
    assert_cost(result.cost, counted)
    assert result.losses == {
        a: study.store.result(b)["test_best"][a] for b in branches for a in b.tasks
    }


def test_mas_costs_the_same_when_its_trunk_was_trained_further(study):
    """Other methods may have trained the all-in-one trajectory to its end, measuring on."""
    alone, _ = drive(merge_and_split, study, affinity=by_round)
    make_record(study.store, Need(study.all_in_one(), 4), affinity=by_round)
    again, asked = drive(merge_and_split, study)
    assert asked == [] and again.groups == alone.groups
    assert again.cost.seconds == pytest.approx(alone.cost.seconds)
    assert again.cost.energy_kwh == pytest.approx(alone.cost.energy_kwh)


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5])
def test_mas_x_has_exactly_x_groups(study, splits):
    result, _ = drive(lambda s: merge_and_split(s, splits), study, affinity=by_round)
    S = study.affinities(2)
    expected = best_split(S, splits).groups
    assert result.groups == tuple("".join(FIVE[i] for i in g) for g in expected)
    assert len(result.groups) == splits and sorted("".join(result.groups)) == sorted(FIVE)
    assert result.method == f"MAS-{splits}" and set(result.losses) == set(FIVE)


def test_the_schedule_after_the_split(study):
    restart = with_mas(study, lr_schedule="restart")
    one, other = study.from_all_in_one("kt"), restart.from_all_in_one("kt")
    assert (one.lr_from, other.lr_from) == (0, 2) and one.id != other.id
    assert one.parent == other.parent
    assert study.all_in_one() == restart.all_in_one()


def test_affinities_are_plain_means_over_clients_and_rounds(study):
    make_record(study.store, Need(study.all_in_one(), 4), affinity=by_round)
    S = study.affinities(2)
    expected = np.nan_to_num((by_round(0) + by_round(1)) / 2)
    assert S == pytest.approx(expected, abs=1e-12) and (np.diag(S) == 0).all()
    assert abs(expected[0, 1] - expected[3, 4]) < 0.2 < abs(expected[0, 1] - expected[0, 3])


def overlapping(r):
    """d and n gain most from s, which helps k and t, too: TAG's groups around s overlap."""
    S = planted(5, [], outside=-0.2)
    S[2, 1] = S[1, 2] = 0.3
    S[3, 4] = S[4, 3] = 0.25
    S[0, 1:] = 0.4
    S[4, 0] = 0.1
    np.fill_diagonal(S, np.nan)
    return S


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_tag(study, splits):
    result, asked = drive(lambda s: tag(s, splits), study, affinity=overlapping)
    trunk = study.all_in_one()
    assert asked[0] == [Need(trunk, 4)]
    read = study.settings.fl.measure_rounds  # all that the search measured, worked out apart
    measured = study.store.affinities(trunk).values[:read]
    S = np.nan_to_num(measured).mean((0, 1))
    chosen = tag_groups(S, splits)
    assert result.groups == tuple("".join(FIVE[i] for i in g) for g in chosen.groups)
    trained = [study.from_scratch(group) for group in result.groups]
    if splits > 1:
        assert len("".join(result.groups)) > 5  # tasks in several groups
    assert all(t.parent is None for t in trained)
    for a in FIVE:
        found = [t for t in trained if a in t.tasks]
        best = min(found, key=lambda t: validated(study, t)[a])  # noqa: B023
        assert result.losses[a] == study.store.result(best)["test_best"][a]
    search = [(rows_of(study, trunk), read)]
    groups = [(rows_of(study, t), 0) for t in trained if t != trunk]  # nothing is trained twice
    assert_cost(result.search_cost, search)
    assert_cost(result.cost, search + groups)
    assert result.method == f"TAG-{splits}"


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_hoa(study, splits):
    result, asked = drive(lambda s: hoa(s, splits), study)
    singles = [study.from_scratch(a) for a in FIVE]
    pairs = [study.from_scratch(a + b) for a, b in combinations(FIVE, 2)]
    assert [n.trajectory for n in asked[0]] == singles + pairs and len(pairs) == 10
    single = [validated(study, t)[t.tasks] for t in singles]
    pair = np.full((5, 5), np.nan)
    for t in pairs:
        i, j = (FIVE.index(a) for a in t.tasks)
        losses = validated(study, t)
        pair[i, j], pair[j, i] = losses[FIVE[i]], losses[FIVE[j]]
    chosen = hoa_groups(single, pair, splits)
    assert result.groups == tuple("".join(FIVE[i] for i in g) for g in chosen.groups)
    trained = [study.from_scratch(group) for group in result.groups]
    large = [t for t in trained if len(t.tasks) > 2]
    assert [[n.trajectory for n in needs] for needs in asked[1:]] == [large] * bool(large)
    search = [(rows_of(study, t), 0) for t in singles + pairs]
    assert_cost(result.search_cost, search)
    assert_cost(result.cost, search + [(rows_of(study, t), 0) for t in trained if len(t.tasks) > 2])
    for a in FIVE:
        best = min((t for t in trained if a in t.tasks), key=lambda t: validated(study, t)[a])  # noqa: B023
        assert result.losses[a] == study.store.result(best)["test_best"][a]


def test_choosing_by_test_loss_is_the_papers_way(study):
    """Of two groups that serve a task, validation may choose the one of higher test loss."""
    by_test = replace(study, settings=replace(study.settings, choice=Choice("test")))
    chosen, other = (drive(lambda s: tag(s, 3), s, affinity=overlapping)[0]
                     for s in (study, by_test))  # fmt: skip
    trained = [study.from_scratch(group) for group in chosen.groups]
    for a in FIVE:
        found = [study.store.result(t)["test_best"][a] for t in trained if a in t.tasks]
        assert other.losses[a] == min(found) <= chosen.losses[a]
    assert other.total < chosen.total


def test_tag_reads_all_rounds_it_measured_or_a_window(study):
    def late(r):  # the first rounds group s with d, the mean of all of them s with n
        S = planted(5, [[0, 1]] if r < 2 else [[0, 2]], inside=1.0 if r < 2 else 3.0)
        return S

    whole, _ = drive(lambda s: tag(s, 4), study, affinity=late)
    window = replace(study, settings=replace(study.settings, tag=Tag(2)))
    early, _ = drive(lambda s: tag(s, 4), window, affinity=late)
    assert "sn" in whole.groups and "sd" in early.groups and whole.groups != early.groups


def test_more_measurements_on_record_serve_a_trajectory_that_needs_none(study):
    make_record(study.store, Need(study.all_in_one(), 4))
    assert study.unmeasured().from_scratch(FIVE) == study.all_in_one()
    assert study.unmeasured(local_epochs=3).from_scratch(FIVE) != study.all_in_one()
    branch = study.from_all_in_one(FIVE)
    assert branch.parent == study.all_in_one() and branch.fl.measure_rounds == 0


def test_a_record_with_fewer_or_other_measurements_serves_nothing_more(study):
    """On record: two rounds, every second batch."""
    fl, store = replace(study.settings.fl, measure_rounds=2, affinity_every=2), study.store
    recorded = replace(study.all_in_one(), fl=fl)
    make_record(store, Need(recorded, 4))
    for rounds, every, served in ((1, 2, True), (0, 3, True), (3, 2, False), (1, 3, False)):
        t = replace(recorded, fl=replace(fl, measure_rounds=rounds, affinity_every=every))
        assert store.served_by(t) == (recorded if served else t)


def test_the_last_rounds_losses_choose_between_the_last_models(study):
    """Task d is in two groups: sd had the lower loss in the best round, dn has it in the last."""
    study, losses = replace(study, tasks="sdn"), {"sd": ("1", "2"), "dn": ("2", "1")}
    sd, dn = trained = [study.from_scratch(group) for group in losses]
    for t in trained:
        make_record(study.store, Need(t, 4))
        rows = study.store.read_rows(t, "rounds.csv", 4)
        rows[2]["val_d"], rows[3]["val_d"] = losses[t.tasks]
        study.store.write_rows(t, "rounds.csv", rows)
    result = study.result("two", list(losses), trained, [])
    assert result.losses["d"] == study.store.result(sd)["test_best"]["d"]
    assert result.losses_last["d"] == study.store.result(dn)["test_last"]["d"]


def test_mas_1_pays_for_the_rounds_before_the_restart_and_after(study):
    study = with_mas(study, lr_schedule="restart")
    trunk, branch = study.all_in_one(), study.from_all_in_one(FIVE)
    make_record(study.store, Need(trunk, 2))
    result, asked = drive(lambda s: restarted(s, [FIVE], "MAS-1"), study)
    assert asked == [[Need(branch, 4)]] and branch.lr_from == 2
    assert_cost(result.cost, [(rows_of(study, trunk, 0, 2), 0), (rows_of(study, branch, 2, 4), 0)])


def test_groups_restarted_pay_for_their_own_first_rounds(study):
    for group in ("sd", "nkt"):
        make_record(study.store, Need(study.again(group).parent, 2))
    result, _ = drive(lambda s: restarted(s, ["sd", "nkt"], "restarted"), study)
    counted = []
    for group in ("sd", "nkt"):
        branch = study.again(group)
        assert (branch.start_round, branch.lr_from) == (2, 2)
        counted += [(rows_of(study, branch.parent, 0, 2), 0), (rows_of(study, branch, 2, 4), 0)]
    assert_cost(result.cost, counted)


@pytest.mark.parametrize("method", [tag, hoa])
def test_the_groups_of_a_method_are_trained_again_with_a_restart(study, method):
    chosen, _ = drive(lambda s: method(s, 2), study, affinity=overlapping)
    result, asked = drive(lambda s: groups_again(s, method(s, 2), "again"), study)
    assert (result.method, result.groups) == ("again", chosen.groups)
    branches = [study.again(group) for group in chosen.groups]
    assert [t.parent for t in branches] == [study.from_scratch(group) for group in chosen.groups]
    assert all((t.start_round, t.lr_from) == (2, 2) for t in branches)
    assert asked[-1] == [Need(t, 4) for t in branches]
    for a in FIVE:
        best = min((t for t in branches if a in t.tasks), key=lambda t: validated(study, t)[a])  # noqa: B023
        assert result.losses[a] == study.store.result(best)["test_best"][a]


def test_the_first_rounds_are_those_whose_affinities_a_split_reads(study):
    assert next(first_rounds(study)) == [Need(study.all_in_one(), 2)]
    longer = with_mas(study, affinity_rounds=3)
    assert next(first_rounds(longer)) == [Need(longer.all_in_one(), 3)]


def test_too_few_affinities_are_refused_before_anything_is_trained(study):
    fl = replace(study.settings.fl, measure_rounds=1)
    short = replace(study, settings=replace(study.settings, fl=fl))
    assert min(short.settings.mas.affinity_rounds, short.settings.mas.merge_rounds) > 1
    with pytest.raises(UserError, match="rounds are read, but fl.measure_rounds=1; raise it"):
        next(merge_and_split(short, 2))


def test_too_few_affinities_are_refused_by_name(study):
    make_record(study.store, Need(study.all_in_one(), 4))
    with pytest.raises(UserError, match="affinities of 5 rounds are read, but fl.measure_rounds=4"):
        study.affinities(5)
    rows = study.store.read_rows(study.all_in_one(), "affinity.csv", 1)
    study.store.write_rows(study.all_in_one(), "affinity.csv", rows)
    with pytest.raises(UserError, match="affinity.csv lacks rounds of the first 2"):
        study.affinities(2)


def test_standalone_trains_one_client(study):
    result, asked = drive(lambda s: standalone(s, 2), study)
    ((need,),) = asked
    assert (need.trajectory.fl.clients, need.trajectory.fl.clients_per_round) == ((2,), 1)
    assert need.trajectory.fl.measure_rounds == 0 and result.groups == (FIVE,)
    other = engine.collect({0: standalone(study, 3)}, study.store)[1][0].trajectory
    assert other.id != need.trajectory.id
    assert_cost(result.cost, [(rows_of(study, need.trajectory), 0)])


@pytest.mark.parametrize("splits, count", [(2, 15), (3, 25), (1, 1), (5, 1)])
@pytest.mark.parametrize("initialised", [False, True])
def test_every_partition(study, splits, count, initialised):
    start = 2 if initialised else 0
    results, asked = drive(lambda s: every_partition(s, splits, initialised), study)
    assert len(results) == count == len({r.groups for r in results})
    assert {r.groups for r in results} == {
        tuple("".join(FIVE[i] for i in g) for g in p) for p in partitions(5, splits)
    }
    totals = [r.total for r in results]
    assert totals == sorted(totals) and (count == 1 or totals[0] < totals[-1])
    asked = [n.trajectory for n in asked[0]]
    if initialised:  # paid for, so it must be on record
        assert asked.pop(0) == study.all_in_one()
    assert len(asked) == len(set(asked)) == {2: 30, 3: 25, 1: 1, 5: 5}[splits]
    make = study.from_all_in_one if initialised else study.from_scratch
    for r in (results[0], results[-1]):
        trained = [make(group) for group in r.groups]
        assert {t.start_round for t in trained} == {start}
        counted = [(rows_of(study, t, start, 4), 0) for t in trained]
        if initialised:
            counted.append((rows_of(study, study.all_in_one(), 0, 2), 0))
        assert_cost(r.cost, counted)
        assert r.total == pytest.approx(
            sum(sum(study.store.result(t)["test_best"].values()) for t in trained)
        )


def test_energy_that_was_not_measured_is_none_and_stays_apart(study):
    result, _ = drive(merge_and_split, study, joules=False)
    assert result.cost.energy_kwh is None
    assert result.cost.energy_kwh_estimated > 0 and "not measured" in result.cost.energy_source
    assert "estimated from 10 W" in result.cost.energy_source


def test_a_stretch_of_a_trajectory_costs_its_own_rows(study):
    trunk = study.all_in_one()
    make_record(study.store, Need(trunk, 4))
    assert_cost(part_cost(study.store, Part(trunk, 1, 3, 2)), [(rows_of(study, trunk, 1, 3), 2)])
    rows = study.store.rounds(trunk)
    spent = measuring_seconds(study.store, trunk, rows, DEVICE)
    assert spent.tolist() == rows["affinity_seconds"].tolist()
    # On a GPU the record has whole steps: of the seconds left, the share of theirs is plain.
    measured = study.store.affinities(trunk).measurements.sum(1)
    share = measured * trunk.fl.batch_size / rows["samples"]
    left = rows["seconds"] - rows["affinity_seconds"]
    known = (share < 0.9).to_numpy()
    plain = rows["seconds"] - measuring_seconds(study.store, trunk, rows, "a GPU")
    assert known.any()
    assert plain[known].to_numpy() == pytest.approx((left / (1 - share))[known].to_numpy())
    nothing = part_cost(study.store, Part(trunk, 0, 0))
    assert (nothing.seconds, nothing.samples) == (0, 0)


# --- Studies --------------------------------------------------------------------------------------


def test_trajectories_have_the_tables_order_whatever_the_study_is_called(study):
    jumbled = replace(study, tasks="tkdsn")
    assert jumbled.all_in_one() == study.all_in_one()
    assert jumbled.from_scratch("tk") == study.from_scratch("kt")
    assert jumbled.from_all_in_one("ns") == study.from_all_in_one("sn")
    a, b = drive(merge_and_split, study, affinity=by_round)[0], drive(merge_and_split, jumbled)[0]
    assert (a.groups, a.losses) == (b.groups, b.losses)


def test_all_tasks_from_scratch_are_the_all_in_one_trajectory(study):
    assert study.from_scratch(FIVE) == study.all_in_one()
    assert study.from_scratch("sd").fl.measure_rounds == 0


@pytest.mark.parametrize("method", [merge_and_split, tag, hoa])
@pytest.mark.parametrize("splits", [0, 6, -1])
def test_splits_that_a_task_set_does_not_have(study, method, splits):
    with pytest.raises(UserError, match=rf"splits={splits}; sdnkt allows 1 to 5"):
        next(method(study, splits))


def test_what_cannot_be_split_is_said_before_anything_is_trained(study):
    for R0 in (4, 5):
        with pytest.raises(UserError, match=f"merge_rounds={R0}; allowed: 1 to 3"):
            next(merge_and_split(with_mas(study, merge_rounds=R0)))
        with pytest.raises(UserError, match=f"merge_rounds={R0}; allowed: 1 to 3"):
            next(restarted(with_mas(study, merge_rounds=R0), list(FIVE), "restarted"))
    settings = replace(study.settings, fl=replace(study.settings.fl, measure_rounds=0))
    for method in (merge_and_split, tag):
        with pytest.raises(UserError, match="fl.measure_rounds=0"):
            next(method(replace(study, settings=settings)))


def test_tag_reads_no_more_rounds_than_there_are(study):
    def with_tag(rounds):
        fl = replace(study.settings.fl, measure_rounds=99)
        settings = replace(study.settings, fl=fl, tag=Tag(rounds))
        return drive(tag, replace(study, settings=settings))[0]

    assert with_tag(99).groups == with_tag(None).groups


def test_one_task_cannot_be_split(study):
    for method in (merge_and_split, tag):
        with pytest.raises(UserError, match="tasks=d: one task cannot be split"):
            next(method(replace(study, tasks="d"), 1))


def test_affinities_that_lack_their_first_round_are_refused(study):
    trunk = study.all_in_one()
    make_record(study.store, Need(trunk, 4))
    rows = study.store.read_rows(trunk, "affinity.csv", 4)
    study.store.write_rows(trunk, "affinity.csv", [row for row in rows if row["round"] != "0"])
    with pytest.raises(UserError, match="affinity.csv lacks rounds"):
        study.affinities(2)


def test_records_of_different_images_do_not_make_one_result(study):
    recipe = one_by_one(study)
    for need in next(recipe):
        make_record(study.store, need)
        result = study.store.result(need.trajectory)
        images = "others" if need.trajectory.tasks == "k" else "these"
        study.store.write_result(need.trajectory, result | {"data": images})
    with pytest.raises(UserError, match="one-by-one joins records trained on different images"):
        next(recipe)


def test_a_study_of_no_tasks(settings, store):
    for tasks in ("", "sx", "ss"):
        with pytest.raises(UserError):
            Study(tasks, settings, 0, store)


def test_a_client_that_does_not_exist(study):
    with pytest.raises(UserError, match="client 4"):
        next(standalone(study, 4))


def test_the_table_of_methods():
    assert list(METHODS) == [
        "one-by-one", "all-in-one", "fedprox", "gradnorm", "hoa", "tag", "mas"
    ]  # fmt: skip
    assert set(TAKES_SPLITS) == {"hoa", "tag", "mas"}


# --- Trained for real -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(settings, folder, tmp_path_factory):
    """MAS-2, MAS-3, TAG-2, all-in-one and one-by-one on three tasks; and the rounds run for it."""
    study = Study("dkt", settings, 0, Store(tmp_path_factory.mktemp("trained"), "small"))
    real, rounds = training.run_round, []

    def logged(net, state, trajectory, round_, data, *more):
        rounds.append((trajectory.id, round_))
        return real(net, state, trajectory, round_, data, *more)

    recipes = {
        "MAS-2": merge_and_split(study, 2),
        "MAS-3": merge_and_split(study, 3),
        "TAG-2": tag(study, 2),
        "all-in-one": all_in_one(study),
        "one-by-one": one_by_one(study),
        "restart": merge_and_split(with_mas(study, lr_schedule="restart"), 2),
        "MAS-1": merge_and_split(study, 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_round", logged)
        results = engine.run(recipes, study.store, folder)
    return study, results, rounds


def test_what_methods_share_is_trained_once(trained):
    study, results, rounds = trained
    assert set(Counter(rounds).values()) == {1}
    per_trajectory = Counter(id_ for id_, _ in rounds)
    assert per_trajectory[study.all_in_one().id] == 4  # the trunk of five methods
    assert len(per_trajectory) == len(study.store.ids())
    sizes = {len(r.parts) for r in results.values()}
    assert (
        sum(per_trajectory.values())
        < sum(part.end - part.begin for r in results.values() for part in r.parts)
        and sizes
    )


def test_groups_are_the_best_split_of_the_recorded_affinities(trained):
    study, results, _ = trained
    values = study.store.affinities(study.all_in_one()).values
    S = np.nan_to_num(values[:2].mean((0, 1)))
    for x in (2, 3):
        expected = tuple("".join("dkt"[i] for i in g) for g in best_split(S, x).groups)
        assert results[f"MAS-{x}"].groups == expected
    assert results["MAS-3"].groups == ("d", "k", "t")
    assert results["restart"].groups == results["MAS-2"].groups
    assert results["restart"].losses != results["MAS-2"].losses


def test_mas_1_on_a_continued_schedule_is_all_in_one(trained):
    """The split changes nothing when nothing is split: same clients, batches, learning rates."""
    study, results, _ = trained
    path = study.store.checkpoint_path
    whole, branch = study.all_in_one(), study.from_all_in_one("dkt")
    a, b = load_file(path(whole, "last")), load_file(path(branch, "last"))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert results["MAS-1"].losses_last == results["all-in-one"].losses_last
    assert results["MAS-1"].cost.samples == results["all-in-one"].cost.samples


def test_counted_images_by_hand(trained):
    """Full batches of 4 out of 6, 10, 14 and 18 views: 4, 8, 12 and 16 images a client."""
    study, results, _ = trained
    images = [4, 8, 12, 16]
    per_round = [
        sum(images[k] for k in federated.select_clients(study.all_in_one(), 4, r)) for r in range(4)
    ]
    assert results["all-in-one"].cost.samples == sum(per_round)
    assert results["one-by-one"].cost.samples == 3 * sum(per_round)
    for x in (2, 3):
        expected = sum(per_round[:2]) + x * sum(per_round[2:])
        assert results[f"MAS-{x}"].cost.samples == expected


def test_a_second_run_trains_nothing(trained, folder, monkeypatch):
    study, results, _ = trained
    monkeypatch.setattr(training, "run_round", None)
    again = engine.run({"MAS-2": merge_and_split(study, 2), "TAG-2": tag(study, 2)},
                       study.store, folder)  # fmt: skip
    assert again == {name: results[name] for name in again}
    assert engine.collect({0: one_by_one(study)}, study.store) == ({0: results["one-by-one"]}, [])


def test_settings_beside_the_trajectory_do_not_change_ids(study):
    mas = replace(study.settings.mas, affinity_rounds=1, affinity_at="last")
    other = replace(study, settings=replace(study.settings, mas=mas))
    assert other.all_in_one().id == study.all_in_one().id
    assert other.from_all_in_one("kt").id == study.from_all_in_one("kt").id
    assert isinstance(other.settings, Settings)
