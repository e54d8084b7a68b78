"""What a measured effect says about a claim: intervals, p values, verdicts, Holm's correction.

An effect is positive where the claim is true: per cent of total test loss saved, points of a share,
a ratio. Effects are paired by seed: both methods are trained with each seed, and the difference is
taken before the mean. Every function here returns a `Finding`, one for each kind of quantity:

    paired      an effect by seed                  two-sided interval of Student's t over seeds
    all_of      a claim of several effects         holds if all hold (intersection-union)
    over_rounds a statistic of measured rounds     one seed: bootstrap over blocks of rounds
    counted     yes or no by seed                  bound on a share by chance, seeds alike or not
    renamed     a choice of splits                 exact over all renamings of the tasks
    timed       ratios repeated in one run         Student's t of their logarithms
    vertex      curves by seed, where they are least   Fieller's interval of the parabola's vertex
    chance      likeness of two partitions         exact distribution over all partitions
    clustered   losses by seed and client          bootstrap over seeds and clients

Student's t leans on effects that are near normal: with five seeds and fewer no test without that
assumption could reach 0.05. And it speaks of training again on the same buildings and tasks. What
is one draw for all seeds of a data set (which split affinities choose) is judged by `renamed`,
`chance` or `counted`, which do not take seeds for independent draws of it.

A difference is claimed at p <= 0.05, two-sided. Equivalence, for losses alone, is two one-sided
tests: the 90 % interval lies inside +-1 % (Schuirmann, 1987). A difference is told first, however
small. One seed says nothing about a loss. `corrected` applies Holm (1979) to a table of findings;
what is clear alone but not after it "seems to hold", not to, or equivalent. `uncorrected` says so
of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from mas_core.split import partitions

HOLDS, FAILS, SAME = "holds", "does not hold", "equivalent within 1 %"
# Clear alone, not among many rows.
SEEMS = {HOLDS: "seems to hold", FAILS: "seems not to hold", SAME: f"seems {SAME}"}
OPEN, ONE_SEED, ABSENT = "cannot be judged", "one seed", "not on record"
VERDICTS = (HOLDS, FAILS, SAME, *SEEMS.values(), OPEN, ONE_SEED, ABSENT)

LEVEL = 0.05  # how often a verdict may be false, alone or (Holm) anywhere in a table
MARGIN = 1.0  # per cent of total loss: what counts as equivalent
DRAWS = 2000  # of a bootstrap
NAN = math.nan


@dataclass(frozen=True)
class Finding:
    """What was measured of one claim, and the verdict."""

    verdict: str  # one of VERDICTS
    effect: float = NAN  # the estimate; positive (or above `least`) where the claim is true
    low: float = NAN  # the 95 % interval of the effect
    high: float = NAN
    seeds: int = 0  # how many seeds the estimate is a mean of
    p: float = NAN  # two-sided, of the difference from `least`
    p_equivalent: float = NAN  # of |effect - least| >= the margin, by two one-sided tests
    least: float = 0.0  # the claim is true of effects above
    basis: str = ""  # what the interval comes from

    def __str__(self) -> str:
        """For a table: "2.64 [1.88, 3.39], 3 seeds"."""
        if math.isnan(self.effect):
            return ""
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        seeds = f", {self.seeds} seed{'s' if self.seeds != 1 else ''}" if self.seeds else ""
        return f"{self.effect:.2f}{interval}{seeds}"


def paired(
    effect: Mapping[int, float] | pd.Series,
    least: float = 0.0,
    margin: float | None = MARGIN,
    level: float = LEVEL,
) -> Finding:
    """The mean of an effect by seed; no `margin` where it is not in per cent of a loss.

    t = (mean - least) / (s / sqrt(n)) with n - 1 degrees of freedom; NaNs are left out. Effects
    that are all equal (shares, counts) have no s: the p value is then that of the sign test,
    2^(1 - n), and there is no interval.
    """
    values = np.array(list(effect.values()) if isinstance(effect, dict) else effect, float)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return Finding(ABSENT, least=least)
    if n == 1:
        return Finding(ONE_SEED, float(values[0]), seeds=1, least=least, basis="one seed")
    mean, se = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    basis = f"t over {n} seeds"
    if se <= 1e-12 * max(1.0, abs(mean)):
        p = 1.0 if math.isclose(mean, least, abs_tol=1e-12) else 2.0 ** (1 - n)
        verdict = _read(mean - least, p, NAN, level)
        return Finding(verdict, mean, NAN, NAN, n, p, NAN, least, f"{n} equal seeds")
    return _student(mean, se, n - 1, least, margin, level, n, basis)


def all_of(findings: Iterable[Finding], level: float = LEVEL) -> Finding:
    """A claim that needs several effects: holds if each does, fails if any does.

    No correction is needed for "holds" (all have to be wrong at once: intersection-union, Berger,
    1982); a failure is one of k and its p value is multiplied by k. Equivalent: each part holds or
    is equivalent. Effect, interval and seeds are those of the part with the least effect.
    """
    parts = list(findings)
    if not parts or any(f.verdict == ABSENT for f in parts):
        return Finding(ABSENT, least=parts[0].least if parts else 0.0)
    weakest = min(parts, key=lambda f: f.effect - f.least)
    ups = [f.p if f.effect > f.least else 1.0 for f in parts]
    downs = [f.p if f.effect < f.least else 1.0 for f in parts]
    equal = [min(up, f.p_equivalent) for f, up in zip(parts, ups)]
    if any(f.verdict == OPEN and math.isnan(f.p) for f in parts):
        return replace(weakest, verdict=OPEN, p=NAN, p_equivalent=NAN)
    if any(f.verdict == ONE_SEED for f in parts):
        return Finding(ONE_SEED, weakest.effect, seeds=1, least=weakest.least, basis="one seed")
    up = weakest.effect > weakest.least
    p = max(ups) if up else min(1.0, len(parts) * min(downs))
    p_equivalent = NAN if any(math.isnan(f.p_equivalent) for f in parts) else max(equal)
    verdict = _read(weakest.effect - weakest.least, p, p_equivalent, level)
    return replace(weakest, verdict=verdict, p=p, p_equivalent=p_equivalent)


def at_least(finding: Finding, level: float = LEVEL) -> Finding:
    """A finding whose effect is only a bound from below, such as the least of many: it cannot fail.

    The mean of a least value lies below every mean, so "holds" is safe; what lies below zero may do
    so by noise alone.
    """
    if not finding.effect < finding.least or math.isnan(finding.p):
        return finding
    return replace(finding, verdict=_read(-1, 1.0, finding.p_equivalent, level), p=1.0)


def over_rounds(
    values: Mapping[int, np.ndarray],
    statistic: Callable[[np.ndarray], float],
    least: float = 0.0,
    level: float = LEVEL,
    block: int = 2,
    draws: int = DRAWS,
) -> Finding:
    """A statistic of the mean over rounds of something measured, such as affinities.

    values     by seed, (T, ...): one entry a round, already the mean over a round's clients
    statistic  of the mean over rounds (...)

    Several seeds: `paired`. One seed: circular blocks of `block` rounds are drawn with replacement
    (Politis and Romano, 1992), which keeps neighbouring rounds and the clients of a round together;
    the standard error of the drawn statistics, times sqrt(T / (T - block)) for what drawing few
    blocks misses, is read with T / block - 1 degrees of freedom. Where rounds depend on those
    further back it claims too much (an autocorrelation of 0.6: in one of five null cases).
    """
    effect = {seed: float(statistic(v.mean(0))) for seed, v in values.items()}
    if len(effect) != 1:
        return paired(effect, least, None, level)
    (rounds,), (estimate,) = values.values(), effect.values()
    T = len(rounds)
    if T < 2 * block:
        return Finding(ONE_SEED, estimate, seeds=1, least=least, basis="one seed, few rounds")
    rng = np.random.default_rng(0)
    starts = rng.integers(T, size=(draws, -(-T // block)))
    picked = ((starts[..., None] + np.arange(block)) % T).reshape(draws, -1)[:, :T]
    drawn = np.array([statistic(rounds[rows].mean(0)) for rows in picked])
    se = float(drawn.std(ddof=1)) * math.sqrt(T / (T - block))
    basis = f"bootstrap over {T} rounds"
    return _student(estimate, se, T // block - 1, least, None, level, 1, basis)


def counted(
    yes: Mapping[int, bool] | pd.Series, chance: float = 0.5, level: float = LEVEL
) -> Finding:
    """Whether something is so with more seeds than by `chance`, from yes or no by seed.

    Seeds share their buildings and tasks, so they may all agree by one chance: p is Markov's bound
    chance / share of P(share or more), whatever the dependence between seeds. It is no test of the
    other side, and one seed is never judged.
    """
    answers = pd.Series(yes, dtype=float).dropna()
    n, k = len(answers), int(answers.sum())
    if n == 0:
        return Finding(ABSENT, least=chance)
    if n == 1:
        return Finding(ONE_SEED, float(k), seeds=1, least=chance, basis="one seed")
    p = min(1.0, chance * n / k) if k else 1.0
    verdict = _read(k / n - chance, p, NAN, level)
    return Finding(verdict, k / n, NAN, NAN, n, p, NAN, chance, f"{k} of {n} seeds")


def renamed(
    saved: Mapping[tuple[int, int], Mapping[Iterable[str], float]],
    chosen: Mapping[tuple[int, int], Sequence[str]],
    tasks: str,
    level: float = LEVEL,
) -> Finding:
    """Whether the splits that affinities choose are better than by chance.

    saved   by (seed, x): what each partition saves; its key is its groups, in any order
    chosen  by (seed, x): the groups chosen by that seed's affinities

    Affinities with their tasks renamed choose the renamed split. p is exact: the share of all n!
    renamings, each applied to every seed and x, whose mean saving lies at least as far from the
    mean over renamings as ours. The interval is Student's t over seeds, means over x: how much the
    saving of these splits varies from training to training.
    """
    keys = [key for key in chosen if key in saved]
    sets = {k: {frozenset(map(frozenset, g)): v for g, v in saved[k].items()} for k in keys}
    drawn = pd.DataFrame({
        k: [sets[k][frozenset(frozenset(order[tasks.index(a)] for a in g) for g in chosen[k])]
            for order in permutations(tasks)] for k in keys
    })  # fmt: skip
    alone = paired(drawn.iloc[0].groupby(level=0).mean() if keys else {}, margin=None)
    if alone.seeds < 2:
        return alone
    away = drawn.mean(axis=1).to_numpy() - drawn.mean(axis=None)
    p = float(np.mean(np.abs(away) >= abs(away[0]) - 1e-12))
    verdict = _read(float(away[0]), p, NAN, level)
    basis = f"p over {len(drawn)} renamings, t over {alone.seeds} seeds"
    return replace(alone, verdict=verdict, p=p, p_equivalent=NAN, basis=basis)


def timed(
    ratios: Sequence[float],
    least: float,
    divided_by: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Finding:
    """A ratio of times repeated in one run, or the quotient of two, against `least` > 0.

    Times are multiplicative, so Student's t is taken of logarithms. A quotient adds the variances
    of both and keeps the fewer degrees of freedom. Seeds do not enter: `seeds` is 0.
    """
    groups = [np.log(np.asarray(r, float)) for r in (ratios, divided_by) if r is not None]
    n = min(len(group) for group in groups)
    if n == 0:
        return Finding(ABSENT, least=least)
    mean = float(groups[0].mean() - (groups[1].mean() if len(groups) == 2 else 0.0))
    if n == 1:
        return Finding(OPEN, math.exp(mean), least=least, basis="timed once")
    se = math.sqrt(sum(g.var(ddof=1) / len(g) for g in groups))
    f = _student(mean, se, n - 1, math.log(least), None, level, 0, f"timed {n} times in one run")
    return replace(
        f, effect=math.exp(mean), low=math.exp(f.low), high=math.exp(f.high), least=least
    )


def vertex(
    curves: pd.DataFrame, inside: tuple[float, float], ends: tuple[float, float],
    level: float = LEVEL,
) -> Finding:  # fmt: skip
    """Whether curves are least inside a band; the effect is the place of the least value.

    curves  one row a seed, one column for each place v (such as R0), loss as value
    inside  the band (low, high); ends: the least and the highest v that can be

    Each seed's curve is fitted by a + b v + c v^2 (least squares). The vertex of the expected curve
    solves E[b + 2 v c] = 0, so a place v is rejected by Student's t of b + 2 v c over seeds; the
    places not rejected are Fieller's (1954) interval. "Holds" rejects all places outside the band,
    "does not hold" all inside it, and both a flat curve (c = 0).
    """
    curves = curves.dropna()
    n, places = len(curves), curves.columns.to_numpy(float)
    if n == 0 or len(places) < 3:
        return Finding(ABSENT)
    c, b, _ = np.polyfit(places, curves.to_numpy(float).T, 2)  # each (seeds,)
    valley = c.mean() > 0
    best = float(np.clip(-b.mean() / (2 * c.mean()), *ends)) if valley else NAN
    if n == 1:
        return Finding(ONE_SEED, best, seeds=1, basis="one seed")

    def p(slopes: np.ndarray) -> np.ndarray:  # (seeds, places): p values of a mean of zero
        t = slopes.mean(0) / (slopes.std(0, ddof=1) / math.sqrt(n))
        return 2 * stats.t.sf(np.abs(t), n - 1)

    def slope(v: Sequence[float] | np.ndarray) -> np.ndarray:
        return b[:, None] + 2 * c[:, None] * np.asarray(v)

    grid = np.linspace(*ends, 1001)
    kept = grid[p(slope(grid)) > LEVEL]
    holds = inside[0] <= best <= inside[1]
    # |t| is 0 at the vertex and has one maximum: over a stretch without it, least at an end.
    edges = [*inside, *ends] if holds else [*inside]
    value = float(max(*p(slope(edges)), *p(c[:, None]))) if valley else 1.0
    verdict = _read(1 if holds else -1, value, NAN, level)
    low, high = (kept[0], kept[-1]) if len(kept) else (best, best)
    return Finding(verdict, best, float(low), float(high), n, value, NAN, NAN,
                   f"vertex of a parabola, {n} seeds")  # fmt: skip


def rand_index(groups: Sequence[str], others: Sequence[str], tasks: str) -> float:
    """Share of pairs of tasks on which two groupings agree, together or apart (Rand, 1971)."""
    pairs = list(combinations(tasks, 2))
    together = [[any(a in g and b in g for g in gs) for a, b in pairs] for gs in (groups, others)]
    return sum(x == y for x, y in zip(*together)) / len(pairs)


def rand_indices(others: Sequence[str], tasks: str, x: int) -> np.ndarray:
    """Rand index with `others` of every partition of the tasks into exactly x groups."""
    return np.array([
        rand_index(["".join(tasks[i] for i in g) for g in partition], others, tasks)
        for partition in partitions(len(tasks), x)
    ])  # fmt: skip


def chance(
    groups: Mapping[int, Sequence[str]], others: Sequence[str], tasks: str, level: float = LEVEL
) -> Finding:
    """Whether splits are more like another's than a partition drawn at random; groups by seed.

    Exact: p is the share of all partitions into as many groups whose Rand index lies at least as
    far from their mean as ours. The seeds of one data set are no independent draws of a split, so
    their mean is judged as if it were one. The interval is where 95 % of random partitions lie.
    """
    if not groups:
        return Finding(ABSENT)
    (x,) = {len(g) for g in groups.values()}
    value = float(np.mean([rand_index(g, others, tasks) for g in groups.values()]))
    drawn = rand_indices(others, tasks, x)
    mean = float(drawn.mean())
    p = float(np.mean(np.abs(drawn - mean) >= abs(value - mean) - 1e-12))
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    verdict = _read(value - mean, p, NAN, level)
    basis = f"p = {round(p * len(drawn))}/{len(drawn)}, all partitions into {x}"
    return Finding(verdict, value, float(low), float(high), len(groups), p, NAN, mean, basis)


def together_by_chance(n: int, x: int) -> float:
    """How often two given tasks of n share a group in a random partition into exactly x groups.

    S(n-1, x) / S(n, x) with Stirling numbers of the second kind; an upper bound of how often they
    do so for several numbers of groups up to x at once, whatever the dependence.
    """
    return len(partitions(n - 1, x)) / len(partitions(n, x)) if x < n else 0.0


def clustered(
    worse: ArrayLike, better: ArrayLike, draws: int = DRAWS, level: float = LEVEL
) -> Finding:
    """Per cent of loss that `better` saves, with an interval over buildings as well as seeds.

    worse, better  test losses, (seeds, clients), of the same seeds and clients (a client is a
                   building); NaN for clients without test views, which are left out

    effect = 100 (1 - mean better / mean worse), every building with equal weight. Seeds and clients
    are drawn with replacement independently, which is slightly wide (Owen, 2007); the standard
    error of the draws is read with min(seeds, clients) - 1 degrees of freedom. One seed: an
    interval over buildings alone, which says nothing of training again, and no verdict.
    """
    a, b = (np.atleast_2d(np.asarray(x, float)) for x in (worse, better))
    kept = np.isfinite(a).all(0) & np.isfinite(b).all(0)
    a, b = a[:, kept], b[:, kept]
    seeds, clients = a.shape
    if seeds == 0 or clients < 2:
        return Finding(ABSENT)
    effect = 100 * (1 - b.mean() / a.mean())
    rng = np.random.default_rng(0)
    rows = rng.integers(seeds, size=(draws, seeds, 1))
    columns = rng.integers(clients, size=(draws, 1, clients))
    drawn = 100 * (1 - b[rows, columns].mean((1, 2)) / a[rows, columns].mean((1, 2)))
    few = min(seeds, clients) if seeds > 1 else clients
    se = float(drawn.std(ddof=1)) * math.sqrt(few / (few - 1))
    basis = f"bootstrap over {clients} buildings, {seeds} seed{'s' if seeds > 1 else ''}"
    f = _student(float(effect), se, few - 1, 0.0, MARGIN, level, seeds, basis)
    return f if seeds > 1 else replace(f, verdict=ONE_SEED, p=NAN, p_equivalent=NAN)


def inside(finding: Finding, low: float, high: float = math.inf) -> Finding:
    """A claim that the whole 95 % interval of an effect lies between `low` and `high`.

    It holds if so, does not hold if the interval lies outside, and is open in between.
    """
    if math.isnan(finding.low):
        known = finding.verdict in (ONE_SEED, ABSENT)
        return finding if known else replace(finding, verdict=OPEN)
    holds = low < finding.low and finding.high < high
    fails = finding.high < low or high < finding.low
    return replace(finding, verdict=HOLDS if holds else FAILS if fails else OPEN, p=NAN)


def holm(p_values: ArrayLike, size: int | None = None) -> np.ndarray:
    """p values corrected for their number m (Holm, 1979); NaNs are no tests and stay.

    size: m, where tests that were written down have no p value yet; None: all have.

    In ascending order p_(k) becomes the largest of (m - i + 1) p_(i) for i <= k, at most 1.
    Rejecting what is at most alpha then makes any false rejection as rare as alpha, whatever the
    dependence.
    """
    p = np.array(p_values, float)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = (size or len(order)) - np.arange(len(order))
    p[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return p


def corrected(
    findings: Sequence[Finding], level: float = LEVEL, size: int | None = None
) -> list[Finding]:
    """The findings of one table with Holm's p values (of `size` tests) and the verdicts they leave.

    Two families, each at `level`: all differences of the table, and all equivalences. Intervals
    stay those of single rows. What is not left is SEEMS.
    """
    differences = holm([f.p for f in findings], size)
    equivalences = holm([f.p_equivalent for f in findings], size)
    result = []
    for f, p, equal in zip(findings, differences.tolist(), equivalences.tolist(), strict=True):
        verdict = f.verdict
        if not math.isnan(p):
            kept = verdict in (HOLDS, FAILS) and p <= level
            verdict = verdict if kept else SAME if equal <= level else SEEMS.get(verdict, OPEN)
        result.append(replace(f, verdict=verdict, p=p, p_equivalent=equal))
    return result


def uncorrected(finding: Finding) -> Finding:
    """A finding of a table whose number of rows is not corrected for: it only seems to hold."""
    return replace(finding, verdict=SEEMS.get(finding.verdict, finding.verdict))


def table(rows: Iterable[tuple[str, str, Finding]]) -> pd.DataFrame:
    """Claims with their findings, a row each: what `claims.ipynb` shows and the site reads.

    rows: (claim, the paper's number, finding). Holm's correction is over these rows.
    """
    rows = list(rows)
    alone = [finding for *_, finding in rows]
    after = corrected(alone)
    return pd.DataFrame({
        "claim": [claim for claim, *_ in rows],
        "verdict": [f.verdict for f in after],
        "effect": [f.effect for f in alone], "low": [f.low for f in alone],
        "high": [f.high for f in alone], "least": [f.least for f in alone],
        "seeds": [f.seeds for f in alone], "p": [f.p for f in alone],
        "p_holm": [f.p for f in after], "p_equivalent_holm": [f.p_equivalent for f in after],
        "basis": [f.basis for f in alone], "paper": [str(printed) for _, printed, _ in rows],
    })  # fmt: skip


def _student(
    mean: float, se: float, df: int, least: float, margin: float | None, level: float, seeds: int,
    basis: str,
) -> Finding:  # fmt: skip
    """A finding from a mean and its standard error, by Student's t of `df` degrees of freedom."""
    away, reach = mean - least, float(stats.t.ppf(0.975, df)) * se
    p = 2 * float(stats.t.sf(abs(away) / se, df)) if se else float(away == 0)
    equal = NAN
    if margin is not None and se:
        equal = float(stats.t.sf((margin - abs(away)) / se, df))  # the nearer end decides
    verdict = _read(away, p, equal, level)
    return Finding(verdict, mean, mean - reach, mean + reach, seeds, p, equal, least, basis)


def _read(away: float, p: float, p_equivalent: float, level: float) -> str:
    """The verdict on a claim whose effect lies `away` from the least at which it is true."""
    if p <= level and away:
        return HOLDS if away > 0 else FAILS
    return SAME if p_equivalent <= level else OPEN
