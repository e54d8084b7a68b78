"""Verdicts on claims: by hand where that is possible, by simulation of noise where it is not."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mas.paper import verdicts
from mas.paper.verdicts import ABSENT, FAILS, HOLDS, ONE_SEED, OPEN, SAME, SEEMS, Finding
from mas_core.split import partitions

NOISE = 0.95  # per cent: sd of a paired difference of total losses over seeds of the small preset


def by_seed(*values):
    return pd.Series(values, dtype=float)


def share(found, *verdicts_):
    """Share of findings with one of these verdicts."""
    return np.mean([f.verdict in verdicts_ for f in found])


def most(n, level=0.05):
    """The level, and three standard errors of a share of n for what the draws are off."""
    return level + 3 * math.sqrt(level * (1 - level) / n)


@pytest.mark.parametrize(
    ("effect", "least", "verdict", "text"),
    [
        ([9.0], 0, ONE_SEED, "9.00, 1 seed"),
        ([], 0, ABSENT, ""),
        ([math.nan], 0, ABSENT, ""),
        # t of 97.5 %: 12.706 for two seeds, 4.303 for three.
        ([0.9, 1.1], 0, OPEN, "1.00 [-0.27, 2.27], 2 seeds"),
        ([1.9, 2.1], 0, HOLDS, "2.00 [0.73, 3.27], 2 seeds"),
        ([-1.9, -2.1], 0, FAILS, "-2.00 [-3.27, -0.73], 2 seeds"),
        ([1.0, 2.0, 3.0], 0, OPEN, "2.00 [-0.48, 4.48], 3 seeds"),
        ([1.5, 2.0, 2.5], 0, HOLDS, "2.00 [0.76, 3.24], 3 seeds"),
        ([1.5, 2.0, 2.5, math.nan], 4, FAILS, "2.00 [0.76, 3.24], 3 seeds"),
        # t of 95 % for three seeds is 2.920: 0.1 + 2.920 * 0.3 / sqrt(3) = 0.61 < 1
        ([-0.2, 0.1, 0.4], 0, SAME, "0.10 [-0.65, 0.85], 3 seeds"),
        ([0.2, 0.6, 1.0], 0, OPEN, "0.60 [-0.39, 1.59], 3 seeds"),
        ([0.5, 0.6, 0.7], 0, HOLDS, "0.60 [0.35, 0.85], 3 seeds"),  # a difference comes first
    ],
)
def test_effects_paired_by_seed(effect, least, verdict, text):
    found = verdicts.paired(by_seed(*effect), least)
    assert found.verdict == verdict and str(found) == text


def test_p_values_are_those_of_scipy():
    values = by_seed(0.3, 1.4, -0.2, 0.9)
    found = verdicts.paired(values, 0.1)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0.1).pvalue)
    ends = [stats.ttest_1samp(values, 0.1 - 1, alternative="greater").pvalue,
            stats.ttest_1samp(values, 0.1 + 1, alternative="less").pvalue]  # fmt: skip
    assert found.p_equivalent == pytest.approx(max(ends))
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval))
    assert math.isnan(verdicts.paired(values, 0.1, margin=None).p_equivalent)


def test_equal_values_have_no_spread_and_are_judged_by_sign():
    five, six = verdicts.paired(by_seed(*[1.0] * 5), 0.9), verdicts.paired(by_seed(*[1.0] * 6), 0.9)
    assert (five.verdict, five.p, five.basis) == (OPEN, 0.0625, "5 equal seeds")
    assert (six.verdict, six.p) == (HOLDS, 0.03125) and math.isnan(six.low)
    assert verdicts.paired(by_seed(1.0, 1.0), 1.0).p == 1


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_noise_alone_is_judged_at_most_as_often_as_the_level_says(n):
    """2000 effects of nothing: 5 % at most are called an effect (limit: three standard errors)."""
    rng = np.random.default_rng(n)
    found = [verdicts.paired(x) for x in rng.normal(0, NOISE, (2000, n))]
    assert 0.03 < share(found, HOLDS, FAILS) < most(2000)
    of_margin = [verdicts.paired(x) for x in rng.normal(1, NOISE, (2000, n))]
    assert share(of_margin, SAME) < most(2000)


def test_in_a_table_of_noise_a_false_verdict_is_rare():
    """300 tables of 40 effects of nothing, correlated as rows that share a method are."""
    rng = np.random.default_rng(0)
    alone = after = 0
    for _ in range(300):
        shared, own = rng.normal(0, NOISE, 3), rng.normal(0, NOISE, (40, 3))
        found = [verdicts.paired((shared + x) / math.sqrt(2)) for x in own]
        alone += any(f.verdict in (HOLDS, FAILS) for f in found)
        after += any(f.verdict in (HOLDS, FAILS) for f in verdicts.corrected(found))
    assert alone > 150  # without the correction most tables hold a false verdict
    assert after / 300 < most(300)


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03, math.nan, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, math.nan, 0.02], nan_ok=True
    )
    assert verdicts.holm([0.4, 0.5]).tolist() == [0.8, 0.8]
    assert verdicts.holm([]).tolist() == []
    assert verdicts.holm([0.01, math.nan, 0.02], size=4)[[0, 2]] == pytest.approx([0.04, 0.06])
    one = verdicts.paired({0: 1.0, 1: 1.1, 2: 1.2})
    absent = verdicts.paired({})
    assert verdicts.corrected([one, absent], size=6)[0].p == pytest.approx(6 * one.p)


def test_an_interval_lies_inside_or_not():
    near = verdicts.paired({0: -0.4, 1: -0.5, 2: -0.6})
    far = verdicts.paired({0: 3.0, 1: 3.1, 2: 3.2})
    assert verdicts.inside(near, -1.0).verdict == verdicts.HOLDS  # though clear of zero
    assert verdicts.inside(near, -0.5, 1.0).verdict == verdicts.OPEN
    assert verdicts.inside(far, -1.0, 1.0).verdict == verdicts.FAILS
    assert verdicts.inside(verdicts.paired({0: 0.1}), -1.0).verdict == verdicts.ONE_SEED
    equal = verdicts.paired(dict.fromkeys(range(6), 5.0))
    assert equal.verdict == HOLDS and verdicts.inside(equal, -1.0, 1.0).verdict == OPEN


def test_corrected_verdicts():
    clear, weak = Finding(HOLDS, 2, 1, 3, 3, 0.001, 0.9), Finding(FAILS, -1, -2, -0.1, 3, 0.03, 0.5)
    close = Finding(SAME, 0.1, -0.5, 0.7, 3, 0.6, 0.01)
    one = Finding(ONE_SEED, 5, seeds=1)
    after = verdicts.corrected([clear, weak, close, one])
    assert [f.verdict for f in after] == [HOLDS, SEEMS[FAILS], SAME, ONE_SEED]
    assert [f.p for f in after] == pytest.approx([0.003, 0.06, 0.6, math.nan], nan_ok=True)
    assert after[2].p_equivalent == pytest.approx(0.03)
    weakly_same = Finding(HOLDS, 0.4, 0.1, 0.7, 9, 0.04, 1e-4)
    assert [f.verdict for f in verdicts.corrected([weakly_same, weak])] == [SAME, SEEMS[FAILS]]
    barely = Finding(SAME, 0.4, -0.3, 1.1, 3, 0.2, 0.04)
    assert [f.verdict for f in verdicts.corrected([barely, weak])] == [SEEMS[SAME], SEEMS[FAILS]]
    assert verdicts.corrected([barely])[0].verdict == SAME


def test_what_is_clear_alone_only_seems_to_hold_in_a_table():
    found = Finding(HOLDS, 2, 1, 3, 3, 0.04), Finding(OPEN, 0, -1, 1, 3, 0.9)
    assert verdicts.uncorrected(Finding(SAME)).verdict == "seems equivalent within 1 %"
    shown = verdicts.table(zip("ab", ("1.5", ""), found))
    assert shown.verdict.tolist() == ["seems to hold", OPEN]
    assert [verdicts.uncorrected(f).verdict for f in found] == ["seems to hold", OPEN]
    assert shown.p_holm.tolist() == [0.08, 0.9] and shown.paper.tolist() == ["1.5", ""]
    assert verdicts.table([]).empty


def test_a_claim_of_several_effects_needs_them_all():
    strong, weak = by_seed(2.9, 3.0, 3.1), by_seed(-0.5, 0.5, 1.5)
    same, lost = by_seed(-0.2, 0.1, 0.2), by_seed(-2.9, -3.0, -3.1)

    def judged(*effects):
        return verdicts.all_of(verdicts.paired(e) for e in effects)

    assert judged(strong, strong).verdict == HOLDS
    assert judged(strong, weak).verdict == OPEN and judged(strong, weak).effect == 0.5
    assert judged(strong, weak).p == verdicts.paired(weak).p
    assert judged(strong, same).verdict == SAME
    failed = judged(strong, weak, lost)
    assert failed.verdict == FAILS and failed.effect == pytest.approx(-3)
    assert failed.p == pytest.approx(3 * verdicts.paired(lost).p)
    assert judged(strong, by_seed(4)).verdict == ONE_SEED
    assert judged(strong, by_seed()).verdict == judged().verdict == ABSENT


def test_the_least_of_many_cannot_fail():
    lost, won = by_seed(-3.0, -2.9, -3.1), by_seed(3.0, 2.9, 3.1)
    assert verdicts.paired(lost).verdict == FAILS
    bound = verdicts.at_least(verdicts.paired(lost))
    assert (bound.verdict, bound.p) == (OPEN, 1) and bound.high < 0
    assert verdicts.at_least(verdicts.paired(won)) == verdicts.paired(won)
    assert verdicts.at_least(verdicts.paired(by_seed(-3))).verdict == ONE_SEED


def test_noise_in_both_parts_seldom_makes_a_claim():
    """Neither part exists: the least of two is below zero on average, which is no failure."""
    rng = np.random.default_rng(1)
    found = [verdicts.all_of(verdicts.paired(x, margin=None) for x in pair)
             for pair in rng.normal(0, NOISE, (1000, 2, 4))]  # fmt: skip
    assert np.mean([f.effect for f in found]) < -0.2
    assert share(found, HOLDS, FAILS) < 0.05


def rounds(rng, T, mean=0.0, rho=0.3):
    """T rounds of a measured matrix (2, 2) whose noise carries over from round to round."""
    steps = rng.normal(size=(T, 2, 2))
    for t in range(1, T):
        steps[t] = rho * steps[t - 1] + math.sqrt(1 - rho**2) * steps[t]
    return steps + mean


def test_one_seed_of_rounds_is_judged_by_bootstrap():
    clear = {0: rounds(np.random.default_rng(0), 10, mean=5.0)}
    found = verdicts.over_rounds(clear, lambda S: S[0, 1])
    assert found.verdict == HOLDS and found.effect == clear[0][:, 0, 1].mean()
    assert found.basis == "bootstrap over 10 rounds" and found.low < 5 < found.high
    assert found == verdicts.over_rounds(clear, lambda S: S[0, 1])  # its draws are fixed
    short = verdicts.over_rounds({0: clear[0][:3]}, lambda S: S[0, 1])
    assert short.verdict == ONE_SEED and math.isnan(short.p)
    three = {seed: rounds(np.random.default_rng(seed), 10, mean=5.0) for seed in range(3)}
    assert verdicts.over_rounds(three, lambda S: S[0, 1]).basis == "t over 3 seeds"
    assert verdicts.over_rounds({}, lambda S: S[0, 1]).verdict == ABSENT


def test_noise_of_rounds_is_judged_at_most_as_often_as_the_level_says():
    rng = np.random.default_rng(2)
    found = [verdicts.over_rounds({0: rounds(rng, 10)}, lambda S: S[0, 1] - S[1, 0], draws=200)
             for _ in range(800)]  # fmt: skip
    assert share(found, HOLDS, FAILS) < most(800)


def test_yes_and_no_by_seed():
    assert verdicts.counted({0: True}).verdict == ONE_SEED
    assert verdicts.counted({}).verdict == ABSENT
    two = verdicts.counted({0: True, 1: True, 2: False}, chance=0.03)
    assert two.verdict == HOLDS and two.p == pytest.approx(0.045)
    assert two.basis == "2 of 3 seeds" and math.isnan(two.low)
    assert verdicts.counted(dict.fromkeys(range(9), True), chance=1 / 15).verdict == OPEN
    assert verdicts.counted(dict.fromkeys(range(9), False), chance=0.9).verdict == OPEN
    copied = np.repeat(np.random.default_rng(0).random(4000)[:, None] < 0.04, 5, 1)  # one draw
    held = [verdicts.counted(dict(enumerate(row)), 0.04).verdict == HOLDS for row in copied]
    assert np.mean(held) < most(4000)


def saving(best, gain):
    """What every partition of five tasks into as many groups saves: `gain` if it is `best`."""
    named = [frozenset("".join("abcde"[i] for i in g) for g in groups)
             for groups in partitions(5, len(best))]  # fmt: skip
    return {groups: gain * (groups == frozenset(best)) for groups in named}


def test_a_choice_is_judged_by_renaming_its_tasks():
    two, three = ("ab", "cde"), ("ab", "cd", "e")
    gains = {0: 1.0, 1: 1.1, 2: 1.2}
    saved = {(seed, 2): saving(two, gain) for seed, gain in gains.items()}
    found = verdicts.renamed(saved, dict.fromkeys(saved, two), "abcde")
    # Twelve of 120 renamings leave this split as it is: no p below 0.1 is possible.
    assert (found.effect, found.p) == pytest.approx((1.1, 0.1)) and found.verdict == OPEN
    assert (found.low, found.high) == pytest.approx((0.852, 1.348), abs=1e-3)
    assert "120 renamings" in found.basis and found.seeds == 3
    both = saved | {(seed, 3): saving(three, gain) for seed, gain in gains.items()}
    chosen = {key: two if key[1] == 2 else three for key in both}
    found = verdicts.renamed(both, chosen, "abcde")
    assert (found.effect, found.p) == pytest.approx((1.1, 4 / 120)) and found.verdict == HOLDS
    worst = verdicts.renamed(saved, dict.fromkeys(saved, ("ac", "bde")), "abcde")
    assert (worst.effect, worst.verdict) == (0, OPEN)
    assert verdicts.renamed({}, {}, "abcde").verdict == ABSENT
    assert verdicts.renamed(saved, {(0, 2): two}, "abcde").verdict == ONE_SEED


def test_a_choice_by_nothing_is_seldom_a_better_one():
    rng = np.random.default_rng(0)
    every = {x: list(saving("abc"[:x], 1))
             for x in (2, 3)}  # fmt: skip

    def one():
        """A data set: partitions differ, seeds agree on them, all choose the same by chance."""
        loss = {x: dict(zip(groups, rng.normal(size=len(groups)))) for x, groups in every.items()}
        saved = {(seed, x): {g: v + rng.normal(0, 0.1) for g, v in by.items()}
                 for seed in range(3) for x, by in loss.items()}  # fmt: skip
        to = dict(zip("abcde", rng.permutation(list("abcde"))))
        splits = {x: ["".join(sorted(to[a] for a in g)) for g in groups]
                  for x, groups in ((2, ("ab", "cde")), (3, ("ab", "cd", "e")))}  # fmt: skip
        return verdicts.renamed(saved, {(seed, x): splits[x] for seed, x in saved}, "abcde")

    assert share([one() for _ in range(150)], HOLDS, FAILS) < most(150)


def test_looking_as_records_come_and_rounds_that_depend_raise_the_level():
    """What README says of looks at 3, 5 and 10 seeds, and `over_rounds` of dependent rounds."""
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(4000, 10))
    looks = [stats.ttest_1samp(effects[:, :n], 0, axis=1).pvalue <= 0.05 for n in (3, 5, 10)]
    assert np.any(looks, axis=0).mean() == pytest.approx(0.125, abs=0.02)
    rounds = rng.normal(size=(600, 30))
    for t in range(1, 30):
        rounds[:, t] += 0.6 * rounds[:, t - 1]
    found = [verdicts.over_rounds({0: r[-10:]}, float) for r in rounds]
    assert share(found, HOLDS, FAILS) == pytest.approx(0.2, abs=0.05)


def test_times_of_one_run():
    assert verdicts.timed([2.0, 2.1, 1.9], 1.75).verdict == HOLDS
    assert verdicts.timed([2.0, 2.1, 1.9], 2.5).verdict == FAILS
    assert verdicts.timed([2.0, 2.1, 1.9], 1.95).verdict == OPEN
    assert verdicts.timed([3.0], 1).verdict == OPEN and verdicts.timed([], 1).verdict == ABSENT
    a, b = [4.0, 4.2, 3.9], [0.5, 0.52, 0.53]
    ratio = verdicts.timed(a, 7, b)
    logs = np.log(a), np.log(b)
    se = math.sqrt(sum(x.var(ddof=1) / 3 for x in logs))
    mean = logs[0].mean() - logs[1].mean()
    assert ratio.effect == pytest.approx(math.exp(mean)) and ratio.seeds == 0
    assert ratio.low == pytest.approx(math.exp(mean - 4.302653 * se), rel=1e-6)
    assert ratio.p == pytest.approx(2 * stats.t.sf((mean - math.log(7)) / se, 2))


PLACES = np.arange(10, 100, 10)


def curves(rng, best, seeds, noise=0.01, depth=4e-5):
    """Losses by seed (rows) and place (columns): a parabola, each seed's level, noise."""
    level = rng.normal(0, 0.02, (seeds, 1))
    values = 1.9 + level + depth * (PLACES - best) ** 2 + rng.normal(0, noise, (seeds, 9))
    return pd.DataFrame(values, columns=PLACES)


def test_where_curves_are_least():
    rng = np.random.default_rng(3)
    inside = verdicts.vertex(curves(rng, 35, 5, 0.001), (30, 40), (0, 100))
    assert inside.verdict == HOLDS and 33 < inside.low < 35.5 < inside.high + 1 < 38
    outside = verdicts.vertex(curves(rng, 55, 5, 0.001), (30, 40), (0, 100))
    assert outside.verdict == FAILS and inside.effect < 40 < outside.low < outside.effect
    assert verdicts.vertex(curves(rng, 35, 3, 0.05), (30, 40), (0, 100)).verdict == OPEN
    assert verdicts.vertex(curves(rng, 35, 1), (30, 40), (0, 100)).verdict == ONE_SEED
    hill = verdicts.vertex(-curves(rng, 35, 5), (30, 40), (0, 100))
    assert hill.verdict == OPEN and math.isnan(hill.effect)
    assert verdicts.vertex(pd.DataFrame(), (30, 40), (0, 100)).verdict == ABSENT


def test_fiellers_interval_covers_and_its_verdicts_are_seldom_false():
    rng = np.random.default_rng(4)
    covered = held = 0
    for _ in range(300):
        found = verdicts.vertex(curves(rng, 45, 4), (30, 40), (0, 100))
        covered += found.low <= 45 <= found.high
        held += found.verdict == HOLDS  # false: 45 lies outside the band
    assert covered / 300 > 1 - most(300) and held / 300 < 0.05
    flat = [verdicts.vertex(curves(rng, 45, 4, depth=0), (30, 40), (0, 100)) for _ in range(300)]
    assert share(flat, HOLDS, FAILS) < 0.05


def test_rand_index_and_its_distribution():
    assert verdicts.rand_index(["sdn", "kt"], ["sdn", "kt"], "sdnkt") == 1
    # together or apart alike: sd, sn, dn change with n moved; kt stays, nk and nt change
    assert verdicts.rand_index(["sd", "nkt"], ["sdn", "kt"], "sdnkt") == 0.6
    every = verdicts.rand_indices(["sdn", "kt"], "sdnkt", 2)
    assert len(every) == 15 and np.sum(every == 1) == 1
    assert len(verdicts.rand_indices(["dr", "snkteca"], "sdnkterca", 2)) == 255


def test_two_tasks_together_by_chance():
    assert verdicts.together_by_chance(5, 2) == 7 / 15
    shared = sum(any({0, 1} <= set(g) for g in p) for p in partitions(9, 4))
    assert verdicts.together_by_chance(9, 4) == shared / len(partitions(9, 4)) == 1701 / 7770


def test_likeness_is_compared_with_all_partitions():
    exact = verdicts.chance({0: ["sdn", "kt"], 1: ["sdn", "kt"]}, ["sdn", "kt"], "sdnkt")
    assert exact.verdict == OPEN and exact.p == pytest.approx(1 / 15)  # too few partitions
    assert exact.basis == "p = 1/15, all partitions into 2" and exact.seeds == 2
    nine = verdicts.chance({0: ["dr", "snkteca"]}, ["dr", "snkteca"], "sdnkterca")
    assert nine.verdict == HOLDS and nine.p == pytest.approx(1 / 255)
    assert verdicts.chance({}, ["sdn", "kt"], "sdnkt").verdict == ABSENT
    every = [["".join("sdnkterca"[i] for i in g) for g in p] for p in partitions(9, 3)][::60]
    found = [verdicts.chance({0: g}, ["dr", "kte", "snca"], "sdnkterca") for g in every]
    assert share(found, HOLDS, FAILS) < most(len(every))  # random splits


def test_intervals_over_buildings():
    rng = np.random.default_rng(5)
    building = rng.uniform(0.5, 1.5, (1, 32))
    worse = building + rng.normal(0, 0.01, (4, 32))
    better = 0.95 * worse
    found = verdicts.clustered(worse, better)
    assert found.effect == pytest.approx(5) and found.verdict == HOLDS
    assert found.basis == "bootstrap over 32 buildings, 4 seeds" and found.high - found.low < 1e-6
    better[:, 0] = np.nan  # no test views
    assert verdicts.clustered(worse, better).basis.startswith("bootstrap over 31")
    one = verdicts.clustered(worse[0], 0.95 * worse[0] + rng.normal(0, 0.02, 32))
    assert one.verdict == ONE_SEED and one.low < one.effect < one.high
    assert verdicts.clustered(np.empty((0, 32)), np.empty((0, 32))).verdict == ABSENT


def test_noise_over_buildings_is_judged_at_most_as_often_as_the_level_says():
    rng, found = np.random.default_rng(6), []
    for _ in range(400):
        a = rng.uniform(1, 2, (1, 16)) + np.zeros((3, 16))
        of_seed, of_building = rng.normal(0, 0.02, (3, 1)), rng.normal(0, 0.05, (1, 16))
        b = a + of_seed + of_building + rng.normal(0, 0.02, (3, 16))
        found.append(verdicts.clustered(a, b, draws=300))
    assert share(found, HOLDS, FAILS) < most(400)
